"""Finds manifests that nothing uses, so that retention or a removal of tags can delete them.

- The *users* of a manifest are its tags, the indexes that list it, and its subject. Users are in the same repository as
  the manifest. The subject counts as a user because manifests such as signatures are needed as long as their
  subject, for example the signed image, exists.
- A manifest without users is *unused*. `storage.retention` calls it an *orphan*.
- The *dependents* of a manifest are the manifests that it lists, and the manifests that name it as their subject.
- The *tree* of a manifest is the manifest itself and all manifests that it lists, directly or through other indexes.

Each function reads with the given connection, and leaves no statement open. `manifest` and `repository` are row ids.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable
from typing import Any, Final, NamedTuple

import apsw

from storage.names import Digest
from storage.retention import LostTags

_LAST_PULL: Final = """
WITH RECURSIVE tree (id) AS (
       SELECT ?1
        UNION
       SELECT m.id FROM tree t JOIN manifest_child c ON c.manifest = t.id
         JOIN manifest m ON m.repository = c.repository AND m.digest = c.digest)
SELECT max(iif(p.pulls > 0, p.last, NULL)), max(iif(p.pulls = 0, p.last, NULL))
  FROM tree t JOIN manifest_pull p ON p.manifest = t.id"""
"""Selects two times for the tree of the manifest ?1: `LastPull.pulled` and `LastPull.imported`."""
_TAG_AS_USER: Final = 0
"""Stands for a tag in a list of users, which are row ids of manifests. No manifest has this row id."""
_SELECT_TAGS: Final = "SELECT name FROM tag WHERE manifest = ?1"
_SELECT_INDEXES: Final = """
SELECT c.manifest FROM manifest m JOIN manifest_child c ON c.repository = m.repository AND c.digest = m.digest
 WHERE m.id = ?1"""
_SELECT_SUBJECT: Final = """
SELECT s.id FROM manifest m JOIN manifest s ON s.repository = m.repository AND s.digest = m.subject WHERE m.id = ?1"""
_SELECT_DEPENDENTS: Final = """
SELECT m.id, m.digest FROM manifest_child c JOIN manifest m ON m.repository = c.repository AND m.digest = c.digest
 WHERE c.manifest = ?1
UNION
SELECT s.id, s.digest FROM manifest m JOIN manifest s ON s.repository = m.repository AND s.subject = m.digest
 WHERE m.id = ?1"""
_LOST_TAGS: Final = """
SELECT DISTINCT (SELECT p.digest FROM tag_history p
                  WHERE p.repository = h.repository AND p.tag = h.tag AND p.id < h.id ORDER BY p.id DESC LIMIT 1)
  FROM tag_history h"""
_LOST_TAGS_SINCE: Final = f"{_LOST_TAGS} WHERE h.repository = ?1 AND h.at > ?2"
"""Selects the digests of the manifests in the repository ?1 that have lost a tag since the time ?2. A manifest loses a
tag when the tag is moved or deleted."""
_LOST_TAGS_IN_NEW_ENTRIES: Final = f"{_LOST_TAGS} NOT INDEXED WHERE h.repository = ?1 AND h.at > ?2 AND h.id > ?3"
"""As `_LOST_TAGS_SINCE`, but reads only entries of the tag history with an id above ?3."""
_FREED_BYTES: Final = """
SELECT coalesce(sum(b.size), 0) FROM blob b
 WHERE b.digest IN (SELECT g.digest FROM json_each(?1) j JOIN manifest_blob g ON g.manifest = j.value)
   AND NOT EXISTS (SELECT 1 FROM blob_link l JOIN manifest_blob k ON k.repository = l.repository AND k.digest = b.digest
                    WHERE l.blob = b.id AND k.manifest NOT IN (SELECT value FROM json_each(?1)))"""
"""Selects the total size of the blobs that meet both conditions:

- At least one of the manifests ?1 (a JSON list of row ids) refers to the blob.
- In each repository that has the blob, no manifest outside ?1 refers to the blob. A repository that lacks the blob can
  have manifests that refer to it; these manifests are ignored."""


class LastPull(NamedTuple):
    """When the manifests in the tree of a manifest were last pulled and imported, in seconds since 1970.

    - `pulled`: the last pull of any manifest in the tree. None: no pull is recorded.
    - `imported`: the last import, from another registry, of a manifest in the tree that has not been pulled from this
      registry. For a manifest that the mirror stored, the time when it was stored counts as its import. None: no such
      import is recorded."""

    pulled: float | None
    imported: float | None

    def is_after(self, limit: float) -> bool:
        """Returns whether `pulled` or `imported` is later than `limit`."""
        return any(time is not None and time > limit for time in self)


def last_pull(db: apsw.Connection, manifest: int) -> LastPull:
    """Returns when the manifests in the tree of `manifest` were last pulled and imported."""
    pulled, imported = db.execute(_LAST_PULL, (manifest,)).get
    return LastPull(pulled, imported)


def digests_that_lost_a_tag(db: apsw.Connection, repository: int, since: float) -> set[str]:
    """Returns the digests of the manifests that have lost a tag since the time `since`. Includes manifests that have
    other tags, or have the lost tag again."""
    return {digest for (digest,) in _rows(db, _LOST_TAGS_SINCE, repository, since) if digest is not None}


def add_digests_that_lost_a_tag(db: apsw.Connection, repository: int, since: float, lost_tags: LostTags) -> None:
    """Adds to `lost_tags` the digests of the manifests that have lost a tag since the time `since`. Does not read
    entries of the tag history that an earlier call with the same `lost_tags` has read."""
    newest_entry = int(db.execute("SELECT coalesce(max(id), 0) FROM tag_history").get)
    if not lost_tags.last_entry:
        lost_tags.manifest_digests |= digests_that_lost_a_tag(db, repository, since)
    elif newest_entry > lost_tags.last_entry:
        rows = _rows(db, _LOST_TAGS_IN_NEW_ENTRIES, repository, since, lost_tags.last_entry)
        lost_tags.manifest_digests.update(digest for (digest,) in rows if digest is not None)
    lost_tags.last_entry = newest_entry


def is_used(db: apsw.Connection, manifest: int) -> bool:
    """Returns whether the manifest has users."""
    return any(
        db.execute(f"{sql} LIMIT 1", (manifest,)).get is not None
        for sql in (_SELECT_TAGS, _SELECT_INDEXES, _SELECT_SUBJECT)
    )


def dependents(db: apsw.Connection, manifest: int) -> list[tuple[int, Digest]]:
    """Returns the row ids and digests of the manifest's dependents."""
    return [(row_id, Digest(digest)) for row_id, digest in _rows(db, _SELECT_DEPENDENTS, manifest)]


def add_unused(
    db: apsw.Connection,
    roots: Iterable[int],
    removed_tags: Collection[str],
    unused: set[int],
    max_unused: float = math.inf,
) -> None:
    """Assumes that the tags `removed_tags` and all manifests in the set `unused` are removed. If a
    manifest then has no users, adds the manifest to `unused`, so that it is assumed to be removed too. Checks only
    `roots`, and the dependents of each added manifest. Stops when `unused` has `max_unused` manifests."""
    # The users of each manifest are read only once. A manifest with remaining users is checked again when the last user
    # in its list becomes unused.
    users: dict[int, list[int]] = {}  # by manifest: its users that are not known to be unused
    waiting_for: dict[int, list[int]] = {}  # by user: the manifests to check again when the user becomes unused
    to_check = list(roots)
    while to_check and len(unused) < max_unused:
        manifest = to_check.pop()
        if manifest in unused:
            continue
        if manifest not in users:
            users[manifest] = _users(db, manifest, removed_tags)
        remaining = users[manifest]
        while remaining and remaining[-1] in unused:
            remaining.pop()
        if remaining:
            waiting_for.setdefault(remaining[-1], []).append(manifest)
            continue
        unused.add(manifest)
        to_check += waiting_for.pop(manifest, ())
        to_check += (row_id for row_id, _ in dependents(db, manifest) if row_id not in users)


def _users(db: apsw.Connection, manifest: int, removed_tags: Collection[str]) -> list[int]:
    """Returns the users of the manifest: only `_TAG_AS_USER` if the manifest has a tag that is not in `removed_tags`,
    otherwise the row ids of the indexes that list the manifest, and of its subject."""
    max_rows = len(removed_tags) + 1  # this many tags cannot all be in `removed_tags`
    if any(name not in removed_tags for (name,) in _rows(db, f"{_SELECT_TAGS} LIMIT ?2", manifest, max_rows)):
        return [_TAG_AS_USER]
    return [user for sql in (_SELECT_INDEXES, _SELECT_SUBJECT) for (user,) in _rows(db, sql, manifest)]


def freed_bytes(db: apsw.Connection, manifests: Collection[int]) -> int:
    """Returns the total size in bytes of the blobs to which only these manifests refer."""
    return int(db.execute(_FREED_BYTES, (json.dumps(list(manifests)),)).get)


def _rows(db: apsw.Connection, sql: str, *values: object) -> list[Any]:
    return db.execute(sql, values).fetchall()
