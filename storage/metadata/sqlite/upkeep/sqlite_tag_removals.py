"""Finds the tags and manifests that a removal of tags would remove (`SqliteTagRemovalPlanner`).

A manifest is *unused* if it has no tag, no index of its repository lists it, and it is no referrer of a manifest in the
repository. A removal of tags also removes the manifests that become unused."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Final

import apsw

from storage.metadata.sqlite import lookups
from storage.metadata.sqlite.immutable_database import ImmutableScans
from storage.metadata.sqlite.scan_thread import ScanThread
from storage.metadata.sqlite.upkeep import unused_manifests
from storage.names import Digest, RepositoryName, Tag
from storage.tag_removal import MAX_REMOVED_MANIFESTS, MAX_REMOVED_TAGS, PlannedTag, TagRemovalPlan

_TAGS: Final = """
SELECT t.name, m.digest, m.id FROM json_each(?2) j JOIN tag t ON t.repository = ?1 AND t.name = j.value
  JOIN manifest m ON m.id = t.manifest ORDER BY t.name"""
_DIGESTS: Final = "SELECT m.digest FROM json_each(?1) j JOIN manifest m ON m.id = j.value ORDER BY m.digest"
_REFERRER_TAGS: Final = f"""
SELECT t.name, r.digest, r.id FROM json_each(?2) j JOIN manifest m ON m.id = j.value
  JOIN tag t ON t.repository = ?1 AND t.name >= replace(m.digest, ':', '-')
   AND t.name < replace(m.digest, ':', '-') || '/' AND substr(t.name, length(m.digest) + 1, 1) IN ('', '.')
  JOIN manifest r ON r.id = t.manifest ORDER BY t.name LIMIT {MAX_REMOVED_TAGS}"""
"""The referrer tags of the manifests ?2 (a JSON array of row ids). The name of a referrer tag is the digest of one of
these manifests, with a hyphen instead of the colon. A suffix that begins with a dot may follow, as in `sha256-….sig`.
The statement reads only a range of names: it begins at the name without a suffix, and ends before the same name with a
slash at its end. The slash is the ASCII character after the dot, so the range contains all names with a suffix."""
_MAX_ROUNDS: Final = 3
"""Largest number of rounds. Each round checks the manifests that lose a tag. It finds the manifests that become unused,
and then the referrer tags of the unused manifests, which are removed too. The next round checks the manifests that the
referrer tags point at, such as signatures: a signature can have a signature itself. Referrer tags that only a further
round would find are kept."""


class SqliteTagRemovalPlanner:
    """Implements `storage.tag_removal.TagRemovalPlanner`."""

    def __init__(self, scans: ScanThread | ImmutableScans) -> None:
        """`scans`: runs the lookups, which may read many rows."""
        self._scans = scans

    async def plan(self, repo: RepositoryName, tags: Sequence[Tag]) -> TagRemovalPlan:
        assert len(tags) <= MAX_REMOVED_TAGS
        return await self._scans.run(lambda db: _plan(db, lookups.repository_id(db, repo), tags))


def _plan(db: apsw.Connection, repository: int, requested_tags: Sequence[Tag]) -> TagRemovalPlan:
    rows = _rows(db, _TAGS, repository, requested_tags)
    planned_tags = [PlannedTag(Tag(name), Digest(digest), is_requested=True) for name, digest, _ in rows]
    removed_names = {tag.name for tag in planned_tags}
    manifests_to_check = [row_id for _, _, row_id in rows]  # manifests that lose a tag
    unused: set[int] = set()
    for _ in range(_MAX_ROUNDS):
        unused_before = set(unused)
        unused_manifests.add_unused(db, manifests_to_check, removed_names, unused, MAX_REMOVED_MANIFESTS)
        referrer_tags = [
            row for row in _rows(db, _REFERRER_TAGS, repository, unused - unused_before) if row[0] not in removed_names
        ]
        if not referrer_tags:
            break
        planned_tags += [PlannedTag(Tag(name), Digest(digest), is_requested=False) for name, digest, _ in referrer_tags]
        removed_names |= {tag.name for tag in planned_tags}
        manifests_to_check = [row_id for _, _, row_id in referrer_tags]
    return TagRemovalPlan(
        planned_tags,
        [Digest(str(digest)) for (digest,) in db.execute(_DIGESTS, (_json(unused),)).fetchall()],
        unused_manifests.freed_bytes(db, unused),
        is_complete=len(unused) < MAX_REMOVED_MANIFESTS,
    )


def _rows(db: apsw.Connection, sql: str, repository: int, values: Collection[object]) -> list[Any]:
    return db.execute(sql, (repository, _json(values))).fetchall()


def _json(values: Iterable[object]) -> str:
    return json.dumps(list(values))
