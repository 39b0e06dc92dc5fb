"""The tables of the search index, and the functions that update them from the tables of the content.

A push does not write to the index. The functions below index the new rows of four tables: repositories, manifests,
blobs and the tag history. For each of these tables, the table `search_progress` has a *position*: the highest row id
that the index has processed. A new row gets the row id after the highest row id in its table. So after the row with the
highest row id was deleted, the next new row gets the same row id again. If the position stayed at this row id, the
index would never process the new row. Therefore a trigger runs after each deletion of a manifest or blob. If the
position is above the highest remaining row id of the table, the trigger sets the position to this highest row id.

The index reads only those entries of the tag history that were written after the index was created. The function
`_add_stored_tags` adds older tags from the table of tags. The columns `tag_repository` and `tag_name` of
`search_progress` name the last tag that this function added. They are NULL after the last older tag.

Each function that changes the index runs inside a transaction that the caller commits. `rebuild` changes any number of
rows, and the other functions change a bounded number. All functions except `set_labels` read texts of the content as
bytes, so that damaged texts raise no error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import closing, suppress
from typing import Any, Final

import apsw

from storage.content_search import IncompleteManifestPage, ManifestBatch, ManifestLabels, ManifestToIndex
from storage.errors import RegistryError
from storage.metadata.sqlite.database import migrations
from storage.names import Digest, RepositoryName

REPOSITORIES_PER_BATCH: Final = 100
"""Largest number of repositories in a batch. With the limits below, the transaction that adds a batch takes a few
milliseconds. Changes by clients wait for the transaction."""
TAGS_PER_BATCH: Final = 200
"""Largest number of tags, or of changes in the tag history, in a batch."""
MANIFESTS_PER_BATCH: Final = 100
"""Largest number of manifests in a batch."""
MAX_BATCH_BYTES: Final = 1024 * 1024
"""A batch of manifests ends when their annotations together have more than this number of bytes."""
INCOMPLETE_PER_PAGE: Final = 50
"""Largest number of incomplete manifests that `read_incomplete_manifests` checks in one call. A manifest is
*incomplete* if the manifest was damaged, or its config could not be read, when it was indexed."""
BLOBS_PER_BATCH: Final = 2000
"""Largest number of new blobs that one batch checks. A new blob can be a config that was missing when the manifest was
indexed."""
MAX_LAG: Final = 2000
"""`is_indexing` returns True if the index is more than this number of rows behind one of the tables of repositories,
manifests and tag history."""
MAX_WORDS_OF_TAG: Final = 5
"""Largest number of words by which a tag is found. The whole tag is one of these words."""
MAX_INDEXED_MANIFEST_BYTES: Final = 64 * 1024
"""Largest size in bytes of a manifest whose body is read to find its config."""
MAX_ANNOTATION_BYTES: Final = 64 * 1024
"""Largest size in bytes of a manifest's annotations that the index reads."""
MIGRATION: Final = 10
"""Number of the migration that creates the tables of the index. No other migration changes these tables."""
START_OF_NAME: Final = "^"
"""The character before each name in `search_name`. A search for this character and a text finds the names that begin
with the text."""
_WORD_START = re.compile(r"[-_](?=[^-_])")
_LAG = """
SELECT coalesce((SELECT max(id) FROM repository), 0) - repositories,
       coalesce((SELECT max(id) FROM manifest), 0) - manifests,
       coalesce((SELECT max(id) FROM blob), 0) - blobs,
       coalesce((SELECT max(id) FROM tag_history), 0) - tag_changes, tag_repository IS NOT NULL
  FROM search_progress"""
"""Reads how many row ids each position is behind its table, and whether `_add_stored_tags` still has tags to add."""
_CHANGED_TAGS = """
SELECT count(*), max(id),
       CAST(json_group_array(json_array(repository, tag)) FILTER (WHERE is_stored AND NOT is_indexed) AS BLOB),
       CAST(json_group_array(json_array(repository, tag)) FILTER (WHERE is_deleted AND NOT is_stored) AS BLOB)
  FROM (SELECT h.id, h.repository, h.tag, h.digest IS NULL AS is_deleted,
               EXISTS (SELECT 1 FROM tag t WHERE t.repository = h.repository AND t.name = h.tag) AS is_stored,
               EXISTS (SELECT 1 FROM search_tag s
                        WHERE s.word = lower(h.tag) AND s.repository = h.repository AND s.tag = h.tag) AS is_indexed
          FROM tag_history h WHERE h.id > (SELECT tag_changes FROM search_progress) ORDER BY h.id LIMIT ?)"""
"""Reads the next changes in the tag history: their number, the last row id, the tags to add, and the tags to remove.
The tags to add are only those that the index lacks."""
_MANIFEST = f"""
SELECT m.id, CAST(r.name AS BLOB), CAST(m.digest AS BLOB),
       CASE WHEN octet_length(m.annotations) <= {MAX_ANNOTATION_BYTES} THEN CAST(m.annotations AS BLOB) END,
       CASE WHEN octet_length(m.body) <= {MAX_INDEXED_MANIFEST_BYTES} AND json_valid(CAST(m.body AS TEXT))
            THEN CAST(json_extract(CAST(m.body AS TEXT), '$.config.digest') AS BLOB) END,
       m.size = 0
  FROM manifest m JOIN repository r ON r.id = m.repository"""
_NEW_MANIFESTS = _MANIFEST + " WHERE m.id > ?1 ORDER BY m.id LIMIT ?2"
_MANIFESTS_WITH_NEW_CONFIG = (
    _MANIFEST
    + """ WHERE m.id IN (SELECT c.manifest FROM blob b JOIN search_missing_config c ON c.digest = b.digest
                   WHERE b.id > ?1 AND b.id <= ?2 LIMIT ?3) ORDER BY m.id"""
)
_INCOMPLETE = """
SELECT digest, manifest FROM search_missing_config WHERE (digest, manifest) > (?, ?)
 ORDER BY digest, manifest LIMIT ?"""
_READABLE_NOW = (
    _MANIFEST
    + """
 WHERE m.id IN (SELECT value FROM json_each(?1))
   AND EXISTS (SELECT 1 FROM search_missing_config c WHERE c.manifest = m.id AND (
               iif(c.digest = '', m.size > 0, EXISTS (
                   SELECT 1 FROM blob b JOIN blob_link l ON l.blob = b.id AND l.repository = m.repository
                    WHERE b.digest = c.digest AND b.place <> '')))) ORDER BY m.id"""
)
"""Selects the incomplete manifests that can be read now: those that are not damaged any more, and those whose config is
in their repository now. `?1`: the row ids of incomplete manifests, as JSON. The table `search_missing_config` has the
digest of the missing config, or an empty text for a damaged manifest."""
_INDEX_OBJECTS = r"""
SELECT type, name FROM sqlite_schema WHERE type IN ('table', 'trigger') AND name LIKE 'search\_%' ESCAPE '\'
 ORDER BY type DESC, sql LIKE 'CREATE VIRTUAL%' DESC"""
"""Lists the triggers of the index, then its virtual tables, then its other tables. SQLite keeps the data of a virtual
table in other tables, and drops them with the virtual table."""


def has_unindexed(db: apsw.Connection) -> bool:
    """Returns whether there is content that is not in the index."""
    lag: tuple[int, ...] = db.execute(_LAG).get
    return any(count > 0 for count in lag)


def is_indexing(db: apsw.Connection) -> bool:
    """Returns whether the index lacks much content: tags that are older than the index, or more than `MAX_LAG` rows of
    a table. Does not count blobs, because few blobs are configs."""
    repositories, manifests, _, tag_changes, lacks_old_tags = db.execute(_LAG).get
    return bool(lacks_old_tags) or max(repositories, manifests, tag_changes) > MAX_LAG


def index_names(db: apsw.Connection) -> bool:
    """Adds the names of the next repositories and tags, and removes deleted tags. Returns whether more names may be
    left, because a batch of names was full."""
    is_full = _add_repositories(db)
    is_full |= _add_stored_tags(db)
    return _follow_tag_changes(db) or is_full


def _add_repositories(db: apsw.Connection) -> bool:
    """Adds the names of the next repositories, in one batch. Returns whether the batch was full."""
    row_count, last_id = db.execute(
        "SELECT count(*), max(id) FROM ("
        "SELECT id FROM repository WHERE id > (SELECT repositories FROM search_progress) ORDER BY id LIMIT ?)",
        (REPOSITORIES_PER_BATCH,),
    ).get
    if last_id is None:
        return False
    db.execute(
        "INSERT INTO search_name (rowid, name) SELECT id, ? || name FROM repository "
        "WHERE id > (SELECT repositories FROM search_progress) AND id <= ? ORDER BY id",
        (START_OF_NAME, last_id),
    )
    db.execute("UPDATE search_progress SET repositories = ?", (last_id,))
    return bool(row_count == REPOSITORIES_PER_BATCH)


def _add_stored_tags(db: apsw.Connection) -> bool:
    """Adds the next tags that were stored before the index was created, in one batch. Returns whether the batch was
    full."""
    position: Any = db.execute("SELECT tag_repository, CAST(tag_name AS BLOB) FROM search_progress").get
    if position[0] is None:
        return False
    rows: list[Any] = db.execute(
        "SELECT repository, CAST(name AS BLOB) FROM tag WHERE (repository, name) > (?, CAST(? AS TEXT)) "
        "ORDER BY repository, name LIMIT ?",
        (*position, TAGS_PER_BATCH),
    ).fetchall()
    _add_tags(db, [(repository, name.decode("utf-8", "replace")) for repository, name in rows])
    next_position = rows[-1] if len(rows) == TAGS_PER_BATCH else (None, None)
    db.execute("UPDATE search_progress SET tag_repository = ?, tag_name = CAST(? AS TEXT)", tuple(next_position))
    return len(rows) == TAGS_PER_BATCH


def _follow_tag_changes(db: apsw.Connection) -> bool:
    """Processes the next changes in the tag history, in one batch: adds new tags, and removes deleted tags. Returns
    whether the batch was full."""
    row_count, last_id, new_tags, deleted_tags = db.execute(_CHANGED_TAGS, (TAGS_PER_BATCH,)).get
    if last_id is None:
        return False
    _add_tags(db, json.loads(new_tags.decode("utf-8", "replace")))
    _remove_tags(db, json.loads(deleted_tags.decode("utf-8", "replace")))
    db.execute("UPDATE search_progress SET tag_changes = ?", (last_id,))
    return bool(row_count == TAGS_PER_BATCH)


def _add_tags(db: apsw.Connection, tags: Sequence[tuple[int, str]]) -> None:
    """Adds tags, each a repository's row id and a name. The index may have them already."""
    if tags:
        db.execute(
            "INSERT INTO search_tag (word, repository, tag) SELECT value ->> 0, value ->> 1, value ->> 2 "
            "FROM json_each(?) WHERE true ON CONFLICT DO NOTHING",
            (_tag_rows_as_json(tags),),
        )


def _remove_tags(db: apsw.Connection, tags: Sequence[tuple[int, str]]) -> None:
    """Removes tags, each a repository's row id and a name. The index may lack them."""
    if tags:
        db.execute(
            "DELETE FROM search_tag WHERE (word, repository, tag) IN "
            "(SELECT value ->> 0, value ->> 1, value ->> 2 FROM json_each(?))",
            (_tag_rows_as_json(tags),),
        )


def _tag_rows_as_json(tags: Sequence[tuple[int, str]]) -> str:
    """Returns the rows that the table `search_tag` has for these tags, as a JSON array of arrays. Leaves out tags whose
    names are not ASCII, because these names are damaged."""
    rows = [(word, repository, tag) for repository, tag in tags if tag.isascii() for word in words_of_tag(tag)]
    return json.dumps(rows)


def words_of_tag(tag: str) -> list[str]:
    """Returns at most `MAX_WORDS_OF_TAG` words by which a search finds a tag. The words are in lower case: the whole
    tag, and the rest of the tag after each '-' and '_'."""
    text = tag.lower()
    starts = [0, *(match.end() for match in _WORD_START.finditer(text))]
    return list(dict.fromkeys(text[start:] for start in starts[:MAX_WORDS_OF_TAG]))


def read_unindexed_manifests(db: apsw.Connection) -> ManifestBatch:
    """Reads the next manifests that are not in the index, and manifests whose missing config is stored now."""
    _search_full_text(db)
    indexed_manifest, checked_blob = position = db.execute("SELECT manifests, blobs FROM search_progress").get
    newest_blob = db.execute("SELECT coalesce(max(id), 0) FROM blob").get
    reached_blob = max(checked_blob, min(newest_blob, checked_blob + BLOBS_PER_BATCH))
    unindexed, last_id, is_full = _read_batch(db, _NEW_MANIFESTS, (indexed_manifest, MANIFESTS_PER_BATCH))
    if reached_blob > checked_blob:
        # This reads at most MANIFESTS_PER_BATCH of the manifests that lacked these configs. If there are more,
        # `read_incomplete_manifests` reads them.
        unindexed += _read_batch(db, _MANIFESTS_WITH_NEW_CONFIG, (checked_blob, reached_blob, MANIFESTS_PER_BATCH))[0]
    reached_manifest = indexed_manifest if last_id is None else last_id
    return ManifestBatch(
        unindexed, tuple(position), (reached_manifest, reached_blob), is_full or reached_blob < newest_blob
    )


def read_incomplete_manifests(db: apsw.Connection, after: tuple[str, int] | None) -> IncompleteManifestPage:
    """Reads a page of incomplete manifests. Leaves out manifests whose labels still cannot be read. `after`:
    `IncompleteManifestPage.end` of the previous page; None for the first page."""
    _search_full_text(db)
    incomplete: list[Any] = db.execute(_INCOMPLETE, (*(after or ("", 0)), INCOMPLETE_PER_PAGE)).fetchall()
    readable, _, _ = _read_batch(db, _READABLE_NOW, (json.dumps([manifest for _, manifest in incomplete]),))
    return IncompleteManifestPage(readable, tuple(incomplete[-1]) if incomplete else None)


def reload_segment_lists(db: apsw.Connection) -> None:
    """Prepares this connection for `PRAGMA quick_check`. A full-text index consists of segments. The connection keeps a
    list of the segments. After another connection has merged segments, this list names segments that do not exist any
    more, and the check would report them as damage. A small search makes the connection read the current list."""
    with suppress(apsw.Error):  # `PRAGMA quick_check` reports the damage
        _search_full_text(db)


def _search_full_text(db: apsw.Connection) -> None:
    """Makes a small search in each full-text index. Raises apsw.SQLError or apsw.CorruptError if an index is too
    damaged for searches. Without the search, additions to a damaged index may raise no error."""
    for table in ("search_word", "search_name"):
        db.execute(f"SELECT rowid FROM {table} WHERE {table} MATCH 'abc' LIMIT 1").fetchall()


def _read_batch(
    db: apsw.Connection, sql: str, values: tuple[Any, ...]
) -> tuple[list[ManifestToIndex], int | None, bool]:
    """Returns a batch of the manifests that `sql` selects, the last row id (None if there is no row), and whether the
    batch is full. Leaves out manifests whose repository name or digest is damaged."""
    manifests: list[ManifestToIndex] = []
    last_id, count, annotation_bytes = None, 0, 0
    with closing(db.cursor()) as cursor:
        for row in cursor.execute(sql, values):
            last_id = row[0]
            count += 1
            annotation_bytes += len(row[3] or b"")
            if (manifest := _parse_manifest_row(row)) is not None:
                manifests.append(manifest)
            if count == MANIFESTS_PER_BATCH or annotation_bytes > MAX_BATCH_BYTES:
                return manifests, last_id, True
    return manifests, last_id, False


def _parse_manifest_row(row: Sequence[Any]) -> ManifestToIndex | None:
    """Returns the manifest of a row that `_MANIFEST` read; None if its repository name or digest is damaged."""
    manifest_id, name, digest, annotations, config, is_damaged = row
    try:
        repo, own_digest = RepositoryName(name.decode()), Digest(digest.decode())
    except (UnicodeDecodeError, RegistryError):
        return None
    try:
        config_digest = None if config is None else Digest(config.decode())
    except (UnicodeDecodeError, RegistryError):
        config_digest = None
    return ManifestToIndex(manifest_id, repo, own_digest, annotations, config_digest, bool(is_damaged))


def add_manifests(db: apsw.Connection, batch: ManifestBatch, labels: Sequence[ManifestLabels]) -> None:
    """Adds the manifests of a batch to the index, and moves the positions of manifests and blobs. After the batch was
    read, another manifest may have got the row id of a deleted manifest. The position of manifests then stays below
    this row id, so that the other manifest is indexed later."""
    reached_manifest, reached_blob = batch.end
    for entry in labels:
        if not set_labels(db, entry):
            reached_manifest = min(reached_manifest, entry.manifest.id - 1)
    newest_manifest, newest_blob = db.execute(
        "SELECT (SELECT coalesce(max(id), 0) FROM manifest), (SELECT coalesce(max(id), 0) FROM blob)"
    ).get
    for column, seen_position, new_position in (
        ("manifests", batch.start[0], min(reached_manifest, newest_manifest)),
        ("blobs", batch.start[1], min(reached_blob, newest_blob)),
    ):
        # If the stored position is not `seen_position`, a deletion has lowered it after the batch was read. The
        # statement must not raise the position then.
        db.execute(
            f"UPDATE search_progress SET {column} = iif({column} = ?1, ?2, min({column}, ?2))",
            (seen_position, new_position),
        )


def set_labels(db: apsw.Connection, labels: ManifestLabels) -> bool:
    """Stores the labels and annotations of a manifest in the index. Stores nothing if the manifest was deleted. Returns
    False if another manifest has the row id of the deleted manifest, and must be indexed later. Returns True in all
    other cases."""
    manifest = labels.manifest
    row: Any = db.execute(
        "SELECT m.repository, m.digest, r.name FROM manifest m JOIN repository r ON r.id = m.repository WHERE m.id = ?",
        (manifest.id,),
    ).get
    if row is None:
        return True
    repository, digest, name = row
    if (digest, name) != (manifest.digest, manifest.repository):
        return False
    db.execute(
        "INSERT INTO search_manifest (hex, manifest) VALUES (?, ?) ON CONFLICT DO NOTHING",
        (manifest.digest.encoded[:16], manifest.id),
    )
    _set_text(db, manifest.id, repository, labels.text)
    db.execute("DELETE FROM search_missing_config WHERE manifest = ?", (manifest.id,))
    missing_config = "" if manifest.is_damaged else labels.missing_config
    if missing_config is not None:
        db.execute("INSERT INTO search_missing_config (digest, manifest) VALUES (?, ?)", (missing_config, manifest.id))
    return True


def _set_text(db: apsw.Connection, manifest_id: int, repository_id: int, text: str) -> None:
    """Makes `text` the labels and annotations of the manifest in the index, in place of the former ones."""
    if db.execute("SELECT 1 FROM search_label WHERE manifest = ?", (manifest_id,)).get:
        db.execute("DELETE FROM search_word WHERE rowid = ?", (manifest_id,))
        db.execute("DELETE FROM search_label WHERE manifest = ?", (manifest_id,))
    if text:
        db.execute("INSERT INTO search_label (manifest, text) VALUES (?, ?)", (manifest_id, text))
        db.execute(
            "INSERT INTO search_word (rowid, repository, text) VALUES (?, ?, ?)",
            (manifest_id, str(repository_id), text),
        )


def rebuild(db: apsw.Connection) -> None:
    """Drops the index, even if it is damaged, and creates an empty index. Raises apsw.CorruptError if SQLite cannot
    free damaged pages of the old index."""
    objects: list[Any] = db.execute(_INDEX_OBJECTS).fetchall()
    for kind, name in objects:
        try:
            db.execute(f"DROP {kind} IF EXISTS {name}")
        except apsw.SQLError:
            # DROP fails for a full-text index that cannot be opened. So the code deletes its row in the schema. Later
            # turns of the loop drop the tables that have its data.
            db.pragma("writable_schema", True)
            db.execute("DELETE FROM sqlite_schema WHERE name = ?", (name,))
            db.pragma("writable_schema", "RESET")
    db.execute(next(sql for number, sql in migrations() if number == MIGRATION))


def is_index_table(name: str) -> bool:
    """Returns whether a table of the database belongs to the index."""
    return name.startswith("search_")
