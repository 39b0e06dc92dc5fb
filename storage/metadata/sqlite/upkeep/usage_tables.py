"""The tables that count the blobs, bytes and tags of sets of repositories: `usage_scope`, `usage_member` and
`usage_blob`.

A *scope* is a set of repositories whose content is counted (`storage.usage`). A repository that belongs to a scope is a
*member*. A *link* is a row that lets a repository serve a blob. Triggers in the migrations keep the counts exact, and
refuse blobs and tags that exceed a quota. The functions in this module define the scopes, count the content that was
stored before a scope was defined, and find the quota that a refused change would exceed. Functions that change rows run
inside a transaction that the caller commits.

A scope can consist of all mirrored repositories of one upstream. While the functions count such a scope, they also add
the manifests of its members to `cached_manifest`, the table of the candidates for eviction.

Three columns of `usage_member` say up to which row a member is counted. In their names, "to" means "up to". NULL means
that nothing is left to count or to add.

- `links_to`: row id of the last blob whose link was counted. Links are counted in the order of these ids.
- `tags_to`: name of the last tag that was counted.
- `manifests_to`: row id of the last manifest that was added to `cached_manifest`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

import apsw

from storage.names import Digest, RepositoryName
from storage.usage import ScopeDefinition, ScopeUsage, bytes_quota_error, tags_quota_error

_HIGHEST_INTEGER: Final = 2**63 - 1
"""Largest integer of SQLite."""
BATCH_ROWS: Final = 500
"""Limits the work of one transaction:

- `_delete_batch` deletes at most this many rows.
- `_count_member` counts at most this many rows.
- `count_batch` adds up the costs of the calls of `_count_member`. The cost of a call is the number of rows that the
  call counts, plus `_COUNT_CALL_COST`. When the sum has reached `BATCH_ROWS`, `count_batch` makes no further call."""
_REPOSITORIES_PER_BATCH: Final = 2000
"""Number of repositories whose names one transaction compares with the prefixes of a scope."""
_COUNT_CALL_COST: Final = 5
"""Cost of a call of `_count_member` that counts no rows. The unit is the cost of counting one row."""
_COLUMNS: Final = "name, prefixes, excluded, upstream, max_bytes, max_tags, blobs, bytes, tags, complete"
_CONFIGURED: Final = "prefixes <> '[]'"
"""SQL condition that is true for the scopes in the settings. Scopes with no prefixes are being deleted."""
_QUOTA_MESSAGE: Final = "a quota is exceeded"
"""The message with which the triggers abort a statement."""
_RECOUNT = """
SELECT (SELECT count(*) FROM blob WHERE id IN (
               SELECT l.blob FROM usage_member m JOIN blob_link l ON l.repository = m.repository WHERE m.scope = ?1)),
       (SELECT coalesce(sum(size), 0) FROM blob WHERE id IN (
               SELECT l.blob FROM usage_member m JOIN blob_link l ON l.repository = m.repository WHERE m.scope = ?1)),
       (SELECT count(*) FROM usage_member m JOIN tag t ON t.repository = m.repository WHERE m.scope = ?1)"""


def configure(db: apsw.Connection, definitions: Sequence[ScopeDefinition]) -> None:
    """Replaces the scopes by `definitions`. New scopes begin with nothing counted."""
    rows: list[Any] = db.execute(
        f"SELECT id, name, prefixes, excluded, upstream FROM usage_scope WHERE {_CONFIGURED}"
    ).fetchall()
    definitions_by_name = {definition.name: definition for definition in definitions}
    for scope, name, *contents in rows:
        definition = definitions_by_name.get(name)
        if definition is None or contents != [*_as_json(definition), definition.upstream]:
            # With `complete` at 0, the scope's quota is not enforced any more.
            db.execute(
                "UPDATE usage_scope SET name = 'removed ' || id, prefixes = '[]', complete = 0 WHERE id = ?", (scope,)
            )
    for definition in definitions:
        # The statement uses the name `excluded` for two things. In the list of columns, `excluded` is the column with
        # the prefixes of repositories that do not belong to the scope. After ON CONFLICT, `excluded` is SQLite's name
        # for the new row, which SQLite does not insert if the scope exists already.
        db.execute(
            "INSERT INTO usage_scope (name, prefixes, excluded, upstream, max_bytes, max_tags) "
            "VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET max_bytes = excluded.max_bytes, "
            "max_tags = excluded.max_tags",
            (
                definition.name,
                *_as_json(definition),
                definition.upstream,
                definition.max_bytes,
                definition.max_tags,
            ),
        )


def _as_json(definition: ScopeDefinition) -> tuple[str, str]:
    return json.dumps(definition.prefixes), json.dumps(definition.excluded)


def count_batch(db: apsw.Connection) -> bool:
    """Counts a small part of the uncounted content, or deletes a small part of a removed scope. Returns False if
    nothing is left to do."""
    removed_scope = db.execute(f"SELECT id FROM usage_scope WHERE NOT {_CONFIGURED} LIMIT 1").get
    if removed_scope is not None:
        _delete_batch(db, removed_scope)
        return True
    scope: Any = db.execute(
        "SELECT id, prefixes, excluded, upstream, position FROM usage_scope WHERE complete = 0 LIMIT 1"
    ).get
    if scope is None:
        return False
    scope_id, prefixes, excluded, upstream, position = scope
    cost = 0
    while cost < BATCH_ROWS:
        member: Any = db.execute(
            "SELECT repository, links_to, tags_to, manifests_to FROM usage_member WHERE scope = ? "
            "AND (links_to IS NOT NULL OR tags_to IS NOT NULL OR manifests_to IS NOT NULL) LIMIT 1",
            (scope_id,),
        ).get
        if member is None:
            break
        cost += _COUNT_CALL_COST + _count_member(db, scope_id, upstream, *member)
    if not cost and not _add_members(db, scope_id, json.loads(prefixes), json.loads(excluded), position):
        db.execute("UPDATE usage_scope SET complete = 1 WHERE id = ?", (scope_id,))
    return True


def _delete_batch(db: apsw.Connection, scope: int) -> None:
    """Deletes some rows of a removed scope. Deletes the members first, because without members, no trigger changes the
    other rows of the scope. Deletes the scope itself last."""
    for table, key in (("usage_member", "repository"), ("usage_blob", "blob")):
        db.execute(
            f"DELETE FROM {table} WHERE scope = ?1 AND {key} IN (SELECT {key} FROM {table} WHERE scope = ?1 LIMIT ?2)",
            (scope, BATCH_ROWS),
        )
        if db.changes():
            return
    # Manifests of an upstream that is no longer in the settings are no candidates for eviction.
    db.execute(
        "DELETE FROM cached_manifest WHERE manifest IN (SELECT manifest FROM cached_manifest c "
        "WHERE c.upstream = (SELECT upstream FROM usage_scope WHERE id = ?1) AND NOT EXISTS ("
        f"SELECT 1 FROM usage_scope s WHERE s.upstream = c.upstream AND {_CONFIGURED}) LIMIT ?2)",
        (scope, BATCH_ROWS),
    )
    if not db.changes():
        db.execute("DELETE FROM usage_scope WHERE id = ?", (scope,))


def _add_members(db: apsw.Connection, scope: int, prefixes: list[str], excluded: list[str], position: int) -> bool:
    """Compares the names of the next repositories with the prefixes of the scope. Adds the repositories that belong to
    the scope as members, with nothing counted. Does not change a repository that is a member already. `position`:
    highest row id of the repositories that earlier calls compared. Returns False if no repository was left."""
    rows: list[Any] = db.execute(
        "SELECT id, name FROM repository WHERE id > ? ORDER BY id LIMIT ?", (position, _REPOSITORIES_PER_BATCH)
    ).fetchall()
    if not rows:
        return False
    members = [
        (repository, scope)
        for repository, name in rows
        if name.startswith(tuple(prefixes)) and not name.startswith(tuple(excluded))
    ]
    db.executemany(
        "INSERT INTO usage_member (repository, scope, links_to, tags_to, manifests_to) VALUES (?, ?, 0, '', 0) "
        "ON CONFLICT DO NOTHING",
        members,
    )
    db.execute("UPDATE usage_scope SET position = ? WHERE id = ?", (rows[-1][0], scope))
    return True


def _count_member(
    db: apsw.Connection,
    scope: int,
    upstream: str | None,
    repository: int,
    links_to: int | None,
    tags_to: str | None,
    manifests_to: int | None,
) -> int:
    """Counts the next links of a member. If no links are left, counts its next tags. If no tags are left either, adds
    its next manifests to `cached_manifest`. Handles at most `BATCH_ROWS` links, tags or manifests, and returns their
    number. `links_to`, `tags_to`, `manifests_to`: the columns of the member's row in `usage_member`."""
    column: str
    last_done: int | str | None
    if links_to is not None:
        column, (last_done, row_count) = "links_to", _count_links(db, scope, repository, links_to)
    elif tags_to is not None:
        column, (last_done, row_count) = "tags_to", _count_tags(db, scope, repository, tags_to)
    else:
        column, (last_done, row_count) = "manifests_to", _add_manifests(db, upstream, repository, manifests_to or 0)
    db.execute(
        f"UPDATE usage_member SET {column} = ? WHERE repository = ? AND scope = ?", (last_done, repository, scope)
    )
    return row_count


def _count_links(db: apsw.Connection, scope: int, repository: int, after: int) -> tuple[int | None, int]:
    """Counts the next links of the repository. Returns the row id of the last blob whose link this call counted (None:
    no links are left), and the number of links that it counted."""
    rows: list[Any] = db.execute(
        "SELECT l.blob, b.size FROM blob_link l JOIN blob b ON b.id = l.blob "
        "WHERE l.repository = ? AND l.blob > ? ORDER BY l.blob LIMIT ?",
        (repository, after, BATCH_ROWS),
    ).fetchall()
    db.executemany(
        "INSERT INTO usage_blob (scope, blob, size, links) VALUES (?, ?, ?, 1) "
        "ON CONFLICT (scope, blob) DO UPDATE SET links = links + 1",
        [(scope, blob, size) for blob, size in rows],
    )
    return int(rows[-1][0]) if len(rows) == BATCH_ROWS else None, len(rows)


def _count_tags(db: apsw.Connection, scope: int, repository: int, after: str) -> tuple[str | None, int]:
    """Counts the next tags of the repository. Returns the name of the last tag that this call counted (None: no tags
    are left), and the number of tags that it counted."""
    rows: list[Any] = db.execute(
        "SELECT name FROM tag WHERE repository = ? AND name > ? ORDER BY name LIMIT ?", (repository, after, BATCH_ROWS)
    ).fetchall()
    db.execute("UPDATE usage_scope SET tags = tags + ? WHERE id = ?", (len(rows), scope))
    return str(rows[-1][0]) if len(rows) == BATCH_ROWS else None, len(rows)


def _add_manifests(db: apsw.Connection, upstream: str | None, repository: int, after: int) -> tuple[int | None, int]:
    """Adds the next manifests of a mirrored repository to `cached_manifest`. The `rank` of a new row, by which eviction
    sorts manifests, is the time of the last push. Returns the row id of the last manifest that this call added (None:
    no manifests are left, or the scope does not belong to an upstream), and the number of added manifests."""
    if upstream is None:
        return None, 0
    rows: list[Any] = db.execute(
        "SELECT id, pushed FROM manifest WHERE repository = ? AND id > ? ORDER BY id LIMIT ?",
        (repository, after, BATCH_ROWS),
    ).fetchall()
    db.executemany(
        "INSERT INTO cached_manifest (manifest, upstream, rank) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
        [(manifest, upstream, pushed) for manifest, pushed in rows],
    )
    return int(rows[-1][0]) if len(rows) == BATCH_ROWS else None, len(rows)


def read_scope(db: apsw.Connection, name: str) -> ScopeUsage | None:
    """Returns the usage of a scope; None if there is no such scope."""
    row: Any = db.execute(f"SELECT {_COLUMNS} FROM usage_scope WHERE name = ? AND {_CONFIGURED}", (name,)).get
    return None if row is None else _to_scope_usage(row)


def read_scopes(db: apsw.Connection) -> list[ScopeUsage]:
    """Returns the usage of all scopes, sorted by name."""
    rows: list[Any] = db.execute(f"SELECT {_COLUMNS} FROM usage_scope WHERE {_CONFIGURED} ORDER BY name").fetchall()
    return [_to_scope_usage(row) for row in rows]


def _to_scope_usage(row: tuple[Any, ...]) -> ScopeUsage:
    name, prefixes, excluded, upstream, max_bytes, max_tags, blobs, size, tags, complete = row
    definition = ScopeDefinition(
        name, tuple(json.loads(prefixes)), tuple(json.loads(excluded)), upstream, max_bytes, max_tags
    )
    return ScopeUsage(definition, blobs, size, tags, bool(complete))


def recount(db: apsw.Connection, name: str) -> ScopeUsage | None:
    """Counts all links and tags of a scope's members again. Returns the result, and does not store it. Returns None if
    there is no such scope."""
    stored = read_scope(db, name)
    scope_id = db.execute("SELECT id FROM usage_scope WHERE name = ?", (name,)).get
    if stored is None or scope_id is None:
        return None
    row: Any = db.execute(_RECOUNT, (scope_id,)).get
    blobs, size, tags = row
    return ScopeUsage(stored.definition, blobs, size, tags, stored.is_complete)


def check_quota(db: apsw.Connection, repo: RepositoryName, size: int, digest: Digest | None) -> None:
    """Raises QuotaExceeded if a blob of `size` bytes does not fit into a quota of `repo`. Ignores quotas whose scope
    has the blob already. `size` comes from a client, and may be larger than SQLite's integers. `digest`: the blob's
    digest; None if the digest is not known."""
    rows: list[Any] = db.execute(
        "SELECT id, prefixes, excluded, max_bytes, bytes FROM usage_scope "
        "WHERE complete = 1 AND max_bytes IS NOT NULL AND bytes + ? > max_bytes",
        (min(size, _HIGHEST_INTEGER),),
    ).fetchall()
    for scope_id, prefixes, excluded, max_bytes, used_bytes in rows:
        is_member = repo.startswith(tuple(json.loads(prefixes))) and not repo.startswith(tuple(json.loads(excluded)))
        if is_member and not (digest and _has_blob(db, scope_id, digest)):
            raise bytes_quota_error(json.loads(prefixes)[0], max_bytes, used_bytes, size)


def _has_blob(db: apsw.Connection, scope_id: int, digest: Digest) -> bool:
    row = db.execute(
        "SELECT 1 FROM usage_blob WHERE scope = ? AND blob = (SELECT id FROM blob WHERE digest = ?)", (scope_id, digest)
    ).get
    return row is not None


def link_refusal(db: apsw.Connection, error: apsw.ConstraintError, repository: int, blob: int) -> Exception:
    """Returns the error for the client after SQLite has raised `error` for a new link of the repository to the blob.
    Returns `error` itself if no quota caused `error`."""
    if not _is_from_trigger(error):
        return error
    row: Any = db.execute(
        "SELECT s.prefixes, s.max_bytes, s.bytes, b.size FROM usage_member m JOIN usage_scope s ON s.id = m.scope "
        "JOIN blob b ON b.id = ?2 WHERE m.repository = ?1 AND s.complete = 1 AND s.bytes + b.size > s.max_bytes "
        "AND NOT EXISTS (SELECT 1 FROM usage_blob u WHERE u.scope = s.id AND u.blob = b.id) LIMIT 1",
        (repository, blob),
    ).get
    if row is None:
        return error
    prefixes, max_bytes, used_bytes, size = row
    return bytes_quota_error(json.loads(prefixes)[0], max_bytes, used_bytes, size)


def tag_refusal(db: apsw.Connection, error: apsw.ConstraintError, repository: int) -> Exception:
    """Returns the error for the client after SQLite has raised `error` for a new tag of the repository. Returns `error`
    itself if no quota caused `error`."""
    if not _is_from_trigger(error):
        return error
    row: Any = db.execute(
        "SELECT s.prefixes, s.max_tags, s.tags FROM usage_member m JOIN usage_scope s ON s.id = m.scope "
        "WHERE m.repository = ? AND s.complete = 1 AND s.tags + 1 > s.max_tags LIMIT 1",
        (repository,),
    ).get
    if row is None:
        return error
    prefixes, max_tags, tags = row
    return tags_quota_error(json.loads(prefixes)[0], max_tags, tags)


def _is_from_trigger(error: apsw.ConstraintError) -> bool:
    """Returns whether `error` comes from a trigger that refuses changes beyond a quota. SQLite has then rolled back the
    changes of the statement."""
    return _QUOTA_MESSAGE in str(error)
