"""Stores the history of mirrored tags in the metadata database (`SqliteUpstreamTags`).

- A *sighting* is a time and a digest: at this time, the mirror saw that a tag points at this digest. The tag was new,
  or had moved from another digest.
- A *frozen* tag keeps its digest in this registry even if the tag moves at the upstream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import apsw

from storage.content import Actor, Page
from storage.data_dir.reserve import ReserveUse
from storage.metadata.sqlite.access import audit_table
from storage.metadata.sqlite.commit_thread import CommitThread
from storage.metadata.sqlite.immutable_database import ImmutableDatabase, ImmutableScans
from storage.metadata.sqlite.lookup_cache import LookupCache, bytes_of_record
from storage.metadata.sqlite.scan_thread import ScanThread
from storage.names import Digest, RepositoryName, Tag
from storage.upstream_tags import FrozenTag, Sighting, TagNotFrozen, UpstreamTagMove

TAGS_PER_CHANGE = 200
"""Largest number of tags whose sightings are deleted in one transaction."""
MAX_UNUSED_TAGS = 10_000
"""Largest number of tags whose sightings one call deletes. The next call deletes more."""
_IS_CACHED = "EXISTS (SELECT 1 FROM repository r JOIN tag t ON t.repository = r.id WHERE r.name = {} AND t.name = {})"
"""SQL condition: the tag is in the cache. The first `{}` is the expression for the repository, the second for the
tag."""
_SELECT_UNUSED = f"""
SELECT repository, tag FROM upstream_tag u
 WHERE since < ?1 AND NOT {_IS_CACHED.format("u.repository", "u.tag")}
   AND NOT EXISTS (
       SELECT 1 FROM upstream_tag n WHERE n.repository = u.repository AND n.tag = u.tag AND n.since > u.since)
 LIMIT {MAX_UNUSED_TAGS}"""
"""Selects the *unused* tags. A tag is unused if it is not in the cache and its newest sighting is before the time
?1."""
_SELECT_NEWEST_AND_IS_CACHED = f"""
SELECT (SELECT max(since) FROM upstream_tag WHERE repository = ?1 AND tag = ?2), {_IS_CACHED.format("?1", "?2")}"""
"""Selects the time of the newest sighting of the tag ?2 in the repository ?1, and whether the tag is in the cache."""
_SELECT_FROZEN = "SELECT repository, tag, digest, at, actor FROM frozen_tag"

_SELECT_FROZEN_TAG_NEEDING = f"""
WITH RECURSIVE needed (tag, digest) AS (
    SELECT tag, digest FROM frozen_tag WHERE repository = ?1
    UNION
    SELECT n.tag, c.digest FROM needed n
      CROSS JOIN manifest m ON m.repository = (SELECT id FROM repository WHERE name = ?1) AND m.digest = n.digest
      CROSS JOIN manifest_child c ON c.manifest = m.id)
{_SELECT_FROZEN} WHERE repository = ?1 AND tag IN (
    SELECT tag FROM needed WHERE digest = ?2
    UNION
    SELECT n.tag FROM manifest_blob b JOIN manifest m ON m.id = b.manifest JOIN needed n ON n.digest = m.digest
     WHERE b.repository = (SELECT id FROM repository WHERE name = ?1) AND b.digest = ?2)
 ORDER BY tag LIMIT 1"""
"""Selects the first frozen tag of the repository ?1 that needs the manifest or blob with the digest ?2. A tag needs its
manifest. An index needs the manifests that it lists. Each manifest needs its blobs."""


class SqliteUpstreamTags:
    """Implements `storage.upstream_tags.UpstreamTags`, which describes the methods. Freezing and unfreezing write a
    line of the audit log.

    The *reserve* is disk space that stays allocated for changes on a full disk. The argument `reserve_use` says how
    much of the reserve a change may use (`storage.data_dir.reserve.ReserveUse`):

    - `ALL`, for deletions: they are always tried.
    - `HALF`, for freezing, which stores a small row: it is refused while less than half of the reserve is left.
    - No argument, for sightings: they are not stored while the reserve is smaller than its full size."""

    def __init__(
        self,
        db: apsw.Connection,
        cache: LookupCache,
        writer: CommitThread | ImmutableDatabase,
        clock: Callable[[], float],
        scans: ScanThread | ImmutableScans,
    ) -> None:
        """- `db`: the connection for short reads, which run on the event loop.
        - `cache`: keeps the results of `find_frozen_tag` in memory, because the mirror calls `find_frozen_tag` at
          each request for a tag.
        - `writer`: runs changes.
        - `clock`: returns the time in seconds since 1970.
        - `scans`: runs long reads in a thread."""
        self._db = db
        self._cache = cache
        self._writer = writer
        self._scans = scans
        self._clock = clock

    async def sightings(self, repo: RepositoryName, tag: Tag) -> Sequence[Sighting]:
        rows: list[Any] = self._db.execute(
            "SELECT since, digest FROM upstream_tag WHERE repository = ? AND tag = ? ORDER BY since", (repo, tag)
        ).fetchall()
        return [Sighting(since, str.__new__(Digest, digest)) for since, digest in rows]

    async def save_sightings(self, repo: RepositoryName, tag: Tag, sightings: Sequence[Sighting]) -> None:
        def replace(db: apsw.Connection) -> None:
            db.execute("DELETE FROM upstream_tag WHERE repository = ? AND tag = ?", (repo, tag))
            db.executemany(
                "INSERT INTO upstream_tag (repository, tag, since, digest) VALUES (?, ?, ?, ?)",
                [(repo, tag, sighting.since, sighting.digest) for sighting in sightings],
            )

        await self._writer.run(replace, durable=False)

    async def moves(self, since: float, after: UpstreamTagMove | None, limit: int) -> Sequence[UpstreamTagMove]:
        position = (since, "", "") if after is None else after
        rows: list[Any] = self._db.execute(
            "SELECT since, repository, tag FROM upstream_tag WHERE (since, repository, tag) > (?, ?, ?) "
            "ORDER BY since, repository, tag LIMIT ?",
            (*position, limit),
        ).fetchall()
        return [UpstreamTagMove(at, RepositoryName(repo), Tag(tag)) for at, repo, tag in rows]

    async def forget_unused(self, before: float) -> int:
        unused: list[Any] = await self._scans.run(lambda db: db.execute(_SELECT_UNUSED, (before,)).fetchall())
        forgotten = 0
        for start in range(0, len(unused), TAGS_PER_CHANGE):
            batch = unused[start : start + TAGS_PER_CHANGE]
            forgotten += await self._writer.run(
                partial(_forget_unused, tags=batch, before=before), durable=False, reserve_use=ReserveUse.ALL
            )
        return forgotten

    async def find_frozen_tag(self, repo: RepositoryName, tag: Tag) -> FrozenTag | None:
        # With `bytes_of_record`, the cache estimates how much memory the result takes.
        return self._cache.look_up(bytes_of_record, _find_frozen_tag, repo, tag)

    async def frozen_tags(self, after: str | None, limit: int) -> Page[FrozenTag]:
        repo, _, tag = (after or "").rpartition(":")
        rows: list[Any] = self._db.execute(
            f"{_SELECT_FROZEN} WHERE (repository, tag) > (?, ?) ORDER BY repository, tag LIMIT ?",
            (repo, tag, limit + 1),
        ).fetchall()
        return Page([_frozen_tag(row) for row in rows[:limit]], more=len(rows) > limit)

    async def frozen_tags_in(self, repo: RepositoryName) -> Sequence[FrozenTag]:
        rows: list[Any] = self._db.execute(f"{_SELECT_FROZEN} WHERE repository = ? ORDER BY tag", (repo,)).fetchall()
        return [_frozen_tag(row) for row in rows]

    async def frozen_tag_that_needs(self, repo: RepositoryName, digest: Digest) -> FrozenTag | None:
        row: Any = await self._scans.run(lambda db: db.execute(_SELECT_FROZEN_TAG_NEEDING, (repo, digest)).fetchone())
        return None if row is None else _frozen_tag(row)

    async def freeze(self, repo: RepositoryName, tag: Tag, digest: Digest, *, by: Actor) -> FrozenTag:
        now = self._clock()

        def insert(db: apsw.Connection) -> FrozenTag:
            current = _find_frozen_tag(db, repo, tag)
            if current is not None and current.digest == digest:
                return current
            db.execute(
                "INSERT OR REPLACE INTO frozen_tag (repository, tag, digest, at, actor) VALUES (?, ?, ?, ?, ?)",
                (repo, tag, digest, now, by.name),
            )
            audit_table.record(db, by, now, "tag.freeze", repo, {"digest": digest}, part=f":{tag}")
            return FrozenTag(repo, tag, digest, now, by.name)

        return await self._writer.run(insert, reserve_use=ReserveUse.HALF)

    async def unfreeze(self, repo: RepositoryName, tag: Tag, *, by: Actor) -> FrozenTag:
        now = self._clock()

        def delete(db: apsw.Connection) -> FrozenTag:
            current = _find_frozen_tag(db, repo, tag)
            if current is None:
                raise TagNotFrozen(f"{repo}:{tag} is not frozen; `entrepot mirror frozen` lists the frozen tags")
            db.execute("DELETE FROM frozen_tag WHERE repository = ? AND tag = ?", (repo, tag))
            audit_table.record(db, by, now, "tag.unfreeze", repo, {"digest": current.digest}, part=f":{tag}")
            return current

        return await self._writer.run(delete, reserve_use=ReserveUse.ALL)


def _forget_unused(db: apsw.Connection, tags: Sequence[tuple[str, str]], before: float) -> int:
    """Deletes the sightings of each tag in `tags` that is still unused (see `_SELECT_UNUSED`). `tags`: pairs of
    repository and tag. `before`: seconds since 1970. Returns the number of tags whose sightings were deleted."""
    forgotten = 0
    for repo, tag in tags:
        row: Any = db.execute(_SELECT_NEWEST_AND_IS_CACHED, (repo, tag)).fetchone()
        newest, is_cached = row
        if newest is not None and newest < before and not is_cached:
            db.execute("DELETE FROM upstream_tag WHERE repository = ? AND tag = ?", (repo, tag))
            forgotten += 1
    return forgotten


def _find_frozen_tag(db: apsw.Connection, repo: RepositoryName, tag: Tag) -> FrozenTag | None:
    """Returns the frozen tag; None if the tag is not frozen."""
    row: Any = db.execute(f"{_SELECT_FROZEN} WHERE repository = ? AND tag = ?", (repo, tag)).fetchone()
    return None if row is None else _frozen_tag(row)


def _frozen_tag(row: tuple[Any, ...]) -> FrozenTag:
    """Converts a row with the columns of `_SELECT_FROZEN`."""
    repo, tag, digest, at, actor = row
    return FrozenTag(RepositoryName(repo), Tag(tag), Digest(digest), at, actor)
