"""Finds manifests that nothing uses, so that retention or a removal of tags can delete them.

A manifest is *used* if it has a tag, if an index of its repository lists it, or if it is a referrer and its subject is
in the repository. These tags and indexes and this subject are its *users*. A manifest without users is *unused*;
`storage.retention` calls it an *orphan*. Its *dependents* are the manifests that it lists (its children), and its
referrers. Each function reads with the given connection, and leaves no statement open. `manifest` is a row id.
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
"""Two times about the manifest ?1 and all manifests that it lists directly or through other indexes: the last pull of
any of them, and the last import of any that was not pulled since its import."""
_TAG: Final = 0
"""Stands for a tag among the users of a manifest. No manifest has this row id."""
_TAGS: Final = "SELECT name FROM tag WHERE manifest = ?1"
_INDEXES: Final = """
SELECT c.manifest FROM manifest m JOIN manifest_child c ON c.repository = m.repository AND c.digest = m.digest
 WHERE m.id = ?1"""
_SUBJECT: Final = """
SELECT s.id FROM manifest m JOIN manifest s ON s.repository = m.repository AND s.digest = m.subject WHERE m.id = ?1"""
_DEPENDENTS: Final = """
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
"""The digests in the repository ?1 that have lost a tag since the time ?2, because the tag was moved or deleted."""
_LOST_TAGS_AFTER: Final = f"{_LOST_TAGS} NOT INDEXED WHERE h.repository = ?1 AND h.at > ?2 AND h.id > ?3"
"""The same, but reads only the entries of the tag history after the entry ?3."""
_FREED_BYTES: Final = """
SELECT coalesce(sum(b.size), 0) FROM blob b
 WHERE b.digest IN (SELECT g.digest FROM json_each(?1) j JOIN manifest_blob g ON g.manifest = j.value)
   AND NOT EXISTS (SELECT 1 FROM blob_link l JOIN manifest_blob k ON k.repository = l.repository AND k.digest = b.digest
                    WHERE l.blob = b.id AND k.manifest NOT IN (SELECT value FROM json_each(?1)))"""
"""The total size of the blobs to which only the manifests ?1 (a JSON list of row ids) refer. A reference by another
manifest is ignored if the repository of that manifest does not have the blob."""


class LastPull(NamedTuple):
    """When a manifest, or a manifest that it lists directly or through other indexes, was last used by clients, in
    seconds since 1970. `pulled`: when it was last pulled; None: no pull is recorded. `imported`: when it was imported
    from another registry, whose pulls are not recorded; None: it was not, or was pulled since then."""

    pulled: float | None
    imported: float | None

    def is_after(self, limit: float) -> bool:
        """Returns whether the manifest was pulled or imported after this time."""
        return any(time is not None and time > limit for time in self)


def last_pull(db: apsw.Connection, manifest: int) -> LastPull:
    """Returns when the manifest, or a manifest that it lists, was last pulled and imported."""
    pulled, imported = db.execute(_LAST_PULL, (manifest,)).get
    return LastPull(pulled, imported)


def digests_that_lost_a_tag(db: apsw.Connection, repository: int, since: float) -> set[str]:
    """Returns the digests that have lost a tag since the time `since`, even if they have other tags or have got the tag
    back."""
    return {digest for (digest,) in _rows(db, _LOST_TAGS_SINCE, repository, since) if digest is not None}


def add_digests_that_lost_a_tag(db: apsw.Connection, repository: int, since: float, lost_tags: LostTags) -> None:
    """Adds to `lost_tags` the digests that have lost a tag since the time `since`. Reads only those entries of the tag
    history that were not read before."""
    newest_entry = int(db.execute("SELECT coalesce(max(id), 0) FROM tag_history").get)
    if not lost_tags.last_entry:
        lost_tags.manifest_digests |= digests_that_lost_a_tag(db, repository, since)
    elif newest_entry > lost_tags.last_entry:
        rows = _rows(db, _LOST_TAGS_AFTER, repository, since, lost_tags.last_entry)
        lost_tags.manifest_digests.update(digest for (digest,) in rows if digest is not None)
    lost_tags.last_entry = newest_entry


def is_used(db: apsw.Connection, manifest: int) -> bool:
    """Returns whether the manifest is used."""
    return any(db.execute(f"{sql} LIMIT 1", (manifest,)).get is not None for sql in (_TAGS, _INDEXES, _SUBJECT))


def dependents(db: apsw.Connection, manifest: int) -> list[tuple[int, Digest]]:
    """Returns the row ids and digests of the manifest's dependents."""
    return [(row_id, Digest(digest)) for row_id, digest in _rows(db, _DEPENDENTS, manifest)]


def add_unused(
    db: apsw.Connection,
    roots: Iterable[int],
    removed_tags: Collection[str],
    unused: set[int],
    max_unused: float = math.inf,
) -> None:
    """Finds the manifests that become unused when `removed_tags` are removed, and adds them to the set `unused`. Each
    manifest in the set counts as removed, from the beginning or from when it is added. First checks `roots`, and then
    the dependents of each added manifest. Stops when the set has `max_unused` manifests."""
    # A manifest that still has users waits for one of them, and is looked at again when that user becomes unused. Its
    # users are kept in `users`, so that they are read only once, however many indexes list the manifest.
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
    """Returns the row ids of the indexes that list the manifest, and of its subject. Returns a list with `_TAG` if the
    manifest has a tag that is not in `removed_tags`."""
    max_rows = len(removed_tags) + 1  # of this number of tags, at least one is not in `removed_tags`
    if any(name not in removed_tags for (name,) in _rows(db, f"{_TAGS} LIMIT ?2", manifest, max_rows)):
        return [_TAG]
    return [user for sql in (_INDEXES, _SUBJECT) for (user,) in _rows(db, sql, manifest)]


def freed_bytes(db: apsw.Connection, manifests: Collection[int]) -> int:
    """Returns the size of the blobs that only these manifests refer to."""
    return int(db.execute(_FREED_BYTES, (json.dumps(list(manifests)),)).get)


def _rows(db: apsw.Connection, sql: str, *values: object) -> list[Any]:
    return db.execute(sql, values).fetchall()
