"""Finds manifests that nothing uses, so that retention or a removal of tags can delete them.

The *users* of a manifest are its tags, the indexes of its repository that list it, and its subject if the subject is in
the repository. A manifest without users is *unused*; `storage.retention` calls it an *orphan*. The *dependents* of a
manifest are the manifests that it lists, and its referrers (the manifests that name it as their subject). The *tree* of
a manifest is the manifest itself and all manifests that it lists, directly or through other indexes.

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
"""Selects two times about the tree of the manifest ?1: the last pull of a manifest in the tree, and the last import of
a manifest in the tree that was not pulled after its import."""
_TAG_AS_USER: Final = 0
"""Stands for a tag in a list of row ids of users. No manifest has this row id."""
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
"""Selects the digests of the manifests in the repository ?1 that have lost a tag since the time ?2, because the tag was
moved or deleted."""
_LOST_TAGS_AFTER: Final = f"{_LOST_TAGS} NOT INDEXED WHERE h.repository = ?1 AND h.at > ?2 AND h.id > ?3"
"""Selects what `_LOST_TAGS_SINCE` selects, but only from the entries of the tag history after the entry ?3."""
_FREED_BYTES: Final = """
SELECT coalesce(sum(b.size), 0) FROM blob b
 WHERE b.digest IN (SELECT g.digest FROM json_each(?1) j JOIN manifest_blob g ON g.manifest = j.value)
   AND NOT EXISTS (SELECT 1 FROM blob_link l JOIN manifest_blob k ON k.repository = l.repository AND k.digest = b.digest
                    WHERE l.blob = b.id AND k.manifest NOT IN (SELECT value FROM json_each(?1)))"""
"""Selects the total size of the blobs to which only the manifests ?1 (a JSON list of row ids) refer. A reference by
another manifest is ignored if the repository of that manifest does not have the blob."""


class LastPull(NamedTuple):
    """When the manifests in the tree of a manifest were last pulled and imported, in seconds since 1970.

    - `pulled`: the last pull of a manifest in the tree. None: no pull is recorded.
    - `imported`: the last import, from another registry, of a manifest in the tree that was not pulled after its
      import. None: there is no such manifest. The pulls from the other registry are not recorded."""

    pulled: float | None
    imported: float | None

    def is_after(self, limit: float) -> bool:
        """Returns whether `pulled` or `imported` is after the time `limit`."""
        return any(time is not None and time > limit for time in self)


def last_pull(db: apsw.Connection, manifest: int) -> LastPull:
    """Returns when the manifests in the tree of `manifest` were last pulled and imported."""
    pulled, imported = db.execute(_LAST_PULL, (manifest,)).get
    return LastPull(pulled, imported)


def digests_that_lost_a_tag(db: apsw.Connection, repository: int, since: float) -> set[str]:
    """Returns the digests of the manifests that have lost a tag since the time `since`, even if they have other tags or
    got the lost tag back."""
    return {digest for (digest,) in _rows(db, _LOST_TAGS_SINCE, repository, since) if digest is not None}


def add_digests_that_lost_a_tag(db: apsw.Connection, repository: int, since: float, lost_tags: LostTags) -> None:
    """Adds to `lost_tags` the digests of the manifests that have lost a tag since the time `since`. Reads only the
    entries of the tag history that earlier calls with the same `lost_tags` have not read."""
    newest_entry = int(db.execute("SELECT coalesce(max(id), 0) FROM tag_history").get)
    if not lost_tags.last_entry:
        lost_tags.manifest_digests |= digests_that_lost_a_tag(db, repository, since)
    elif newest_entry > lost_tags.last_entry:
        rows = _rows(db, _LOST_TAGS_AFTER, repository, since, lost_tags.last_entry)
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
    """Finds the manifests that become unused when `removed_tags` are removed, and adds them to the set `unused`. All
    manifests in the set count as removed, also those that were in the set before the call. Checks `roots` and the
    dependents of each added manifest. Stops when the set has `max_unused` manifests."""
    # A manifest with remaining users is checked again when the last user in its list becomes unused. The list stays in
    # `users`, so the users of a manifest are read only once, however many indexes list the manifest.
    users: dict[int, list[int]] = {}  # by manifest: its users that are not known to be unused
    waiting: dict[int, list[int]] = {}  # by user: the manifests that wait until the user is unused
    pending = list(roots)
    while pending and len(unused) < max_unused:
        manifest = pending.pop()
        if manifest in unused:
            continue
        if manifest not in users:
            users[manifest] = _users(db, manifest, removed_tags)
        remaining = users[manifest]
        while remaining and remaining[-1] in unused:
            remaining.pop()
        if remaining:
            waiting.setdefault(remaining[-1], []).append(manifest)
            continue
        unused.add(manifest)
        pending += waiting.pop(manifest, ())
        pending += (row_id for row_id, _ in dependents(db, manifest) if row_id not in users)


def _users(db: apsw.Connection, manifest: int, removed_tags: Collection[str]) -> list[int]:
    """Returns the row ids of the indexes that list the manifest, and of its subject. Returns a list with `_TAG_AS_USER`
    if the manifest has a tag that is not in `removed_tags`."""
    max_rows = len(removed_tags) + 1  # among this many tags, at least one is not in `removed_tags`
    if any(name not in removed_tags for (name,) in _rows(db, f"{_SELECT_TAGS} LIMIT ?2", manifest, max_rows)):
        return [_TAG_AS_USER]
    return [user for sql in (_SELECT_INDEXES, _SELECT_SUBJECT) for (user,) in _rows(db, sql, manifest)]


def freed_bytes(db: apsw.Connection, manifests: Collection[int]) -> int:
    """Returns the size of the blobs that only these manifests refer to."""
    return int(db.execute(_FREED_BYTES, (json.dumps(list(manifests)),)).get)


def _rows(db: apsw.Connection, sql: str, *values: object) -> list[Any]:
    return db.execute(sql, values).fetchall()
