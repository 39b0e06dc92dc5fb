"""Garbage collection (`Collector`): removes content that nothing refers to, while the registry serves requests.

The bytes of a blob are in the blob store; its metadata are a *row*. A *link* is the right of one repository to serve
the blob. When a change removes what may be the last reference to a blob in a repository, it puts the link into a queue.
The collector works through this queue, so its cost depends on the amount of garbage and not on the size of the store.

A *stray* is a stored file without a row, which a crash in the middle of a push can leave. To find strays, the collector
lists some *shards* of the blob store in each round. The shards together contain all blobs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from storage.blobs.blob_store import BlobStore
from storage.errors import StorageFull
from storage.leases import DigestLocks
from storage.metadata.catalog import Metadata
from storage.names import Digest
from storage.partials import Partials

BATCH_SIZE = 500
"""Rows that are read from the metadata at once."""
IDLE_ON_FULL_DISK = 60.0
"""Seconds after which an idle partial blob is deleted while the disk is full."""
MIN_STRAY_AGE = 60.0
"""Shortest time in seconds for which a file without a row is kept, because a push stores the file before the row."""
SHARDS_PER_ROUND = 16
"""Shards of the blob store that are listed in one round."""
log = logging.getLogger("storage.collect")


@dataclass(slots=True)
class CollectionReport:
    """How many links, blobs, upload sessions, partial blobs and strays one round removed. As a condition, a report is
    false if the round removed nothing."""

    links: int = 0
    blobs: int = 0
    uploads: int = 0
    partials: int = 0
    strays: int = 0

    def __bool__(self) -> bool:
        return any((self.links, self.blobs, self.uploads, self.partials, self.strays))


class Collector:
    """The garbage collector. Several processes may collect at the same time.

    `grace`: seconds for which a repository keeps a blob that none of its manifests refers to. `expire`: seconds for
    which an upload session, or a partial blob (a download from an upstream), is kept without progress. `is_full`:
    returns whether the disk is full; then the space of removed bytes is freed at once, and idle partial blobs expire
    early. `grace` stays the same on a full disk."""

    def __init__(
        self,
        metadata: Metadata,
        blobs: BlobStore,
        partials: Partials,
        locks: DigestLocks,
        clock: Callable[[], float],
        grace: float,
        expire: float,
        is_full: Callable[[], bool] = lambda: False,
    ) -> None:
        self._metadata = metadata
        self._blobs = blobs
        self._partials = partials
        self._locks = locks
        self._clock = clock
        self.grace = grace
        self._expire = expire
        self._is_full = is_full
        self._next_shard = int(clock()) % blobs.shard_count

    async def collect(self) -> CollectionReport:
        """Runs one round, and returns what it removed. If a step fails because the disk is full, the other steps still
        run, and StorageFull is raised at the end. A StorageFailed ends the round at once. What was removed before an
        error or a cancellation stays removed."""
        report = CollectionReport()
        failure: StorageFull | None = None
        for step in (
            self._empty_trash,
            self._expire_partials,
            self._remove_stale_uploads,
            self._remove_links,
            self._remove_blobs,
            self._remove_strays,
            self._empty_trash,
        ):
            try:
                await step(report)
            except StorageFull as error:  # later steps may free the space that this one needs
                failure = failure or error
        if report:
            log.info(
                "collected %d blobs (%d links), %d stale uploads, %d stale partial blobs, %d stray files",
                report.blobs, report.links, report.uploads, report.partials, report.strays,
            )  # fmt: skip
        if failure is not None:
            raise failure
        return report

    async def _empty_trash(self, _report: CollectionReport) -> None:
        """Frees the space of bytes that were removed."""
        await self._blobs.reclaim_space()

    async def _expire_partials(self, report: CollectionReport) -> None:
        """Removes partial blobs without recent progress."""
        idle_seconds = min(self._expire, IDLE_ON_FULL_DISK) if self._is_full() else self._expire
        report.partials += await self._partials.expire(self._clock() - idle_seconds)

    async def _remove_stale_uploads(self, report: CollectionReport) -> None:
        """Removes upload sessions without recent progress, and old bytes of sessions that have no row."""
        before = self._clock() - self._expire
        while stale := await self._metadata.stale_uploads(before, BATCH_SIZE):
            for upload in stale:
                if await self._metadata.drop_upload(upload, before):
                    await self._blobs.discard_upload(upload)
                    report.uploads += 1
        latest = self._clock() - max(self.grace, MIN_STRAY_AGE)
        old = [upload for upload, changed in await self._blobs.list_uploads() if changed < latest]
        known = await self._metadata.known_uploads(old)
        for upload in old:
            if upload not in known:
                await self._blobs.discard_upload(upload)

    async def _remove_links(self, report: CollectionReport) -> None:
        """Removes the links that have been without a reference for the grace time."""
        before = self._clock() - self.grace
        while entries := await self._metadata.queued_links(before, BATCH_SIZE):
            for entry in entries:
                report.links += await self._metadata.drop_link(entry, before)

    async def _remove_blobs(self, report: CollectionReport) -> None:
        """Removes blobs without a link: first the row, then the bytes under the key that the row names (`place`). They
        need no grace time, because a push of the same digest waits for the lock and then stores the bytes again."""
        while digests := await self._metadata.unlinked_blobs(BATCH_SIZE):
            for digest in digests:
                async with self._locks.hold(digest):
                    place = await self._metadata.drop_blob(digest)
                    if place is not None:
                        await self._blobs.remove(place)
                        report.blobs += 1
                if self._is_full():
                    await self._blobs.reclaim_space()
            await self._blobs.reclaim_space()

    async def _remove_strays(self, report: CollectionReport) -> None:
        """Removes the old strays in the next shards of the blob store."""
        for _ in range(SHARDS_PER_ROUND):
            shard, self._next_shard = self._next_shard, (self._next_shard + 1) % self._blobs.shard_count
            latest = self._clock() - max(self.grace, MIN_STRAY_AGE)
            old = {digest: place for digest, place, written in await self._blobs.list_shard(shard) if written < latest}
            known = await self._metadata.known_blobs(list(old))
            for digest in old.keys() - known:
                report.strays += await self._remove_stray(digest, old[digest])

    async def _remove_stray(self, digest: Digest, place: str) -> bool:
        """Removes the file that the blob store has under the key `place`, unless the digest has got a row meanwhile.
        Returns whether it removed the file."""
        async with self._locks.hold(digest):
            if digest in await self._metadata.known_blobs([digest]):
                return False
            await self._blobs.remove(place)
            return True
