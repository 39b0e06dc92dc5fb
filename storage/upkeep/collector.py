"""Garbage collection (`Collector`): removes content that nothing refers to, while the registry serves requests.

The bytes of a blob are in the blob store; the metadata store has a *row* for each blob. A *link* is the right of one
repository to serve the blob. The metadata store queues a link in two cases: when it creates the link and no manifest of
the repository refers to the blob yet, and when it deletes the last manifest of the repository that refers to the blob.
The collector works through this queue, so its cost depends on the amount of garbage and not on the size of the store.

The blob store deletes bytes in two steps. `remove` makes them unreachable, and `reclaim_space` frees their disk space.
With files, `FileBlobStore.remove` moves the file to the trash, and `FileBlobStore.reclaim_space` unlinks the files in
the trash (module `storage.blobs.files.file_blob_store`).

A push stores the bytes first, and then the row. If the process crashes between these steps, it leaves a *stray*: a blob
in the blob store that has no row. The blob store is divided into *shards*. To find strays, the collector lists the
blobs of some shards in each round.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from storage.blobs.blob_store import BlobStore
from storage.errors import StorageFull
from storage.leases import DigestLocks, Leases
from storage.metadata.catalog import Metadata
from storage.names import Digest
from storage.partials import Partials
from storage.upkeep.removal_gate import removal_slot

BATCH_SIZE = 500
"""Number of rows that one call reads from the metadata store."""
IDLE_SECONDS_ON_FULL_DISK = 60.0
"""Seconds after which a partial blob without progress is deleted while the disk is full."""
MIN_STRAY_AGE_SECONDS = 60.0
"""Bytes without a row are kept for at least this time in seconds, because a push stores the row shortly after the
bytes."""
SHARDS_PER_ROUND = 16
"""Number of shards of the blob store that are listed in one round."""
log = logging.getLogger("storage.collect")


@dataclass(slots=True)
class CollectionReport:
    """How many links, blobs, upload sessions, partial blobs and strays one round removed. `bool(report)` is False if
    the round removed nothing."""

    links: int = 0
    blobs: int = 0
    uploads: int = 0
    partials: int = 0
    strays: int = 0

    def __bool__(self) -> bool:
        return any((self.links, self.blobs, self.uploads, self.partials, self.strays))


class Collector:
    """The garbage collector. Several processes may collect at the same time.

    `grace`: seconds for which a repository keeps a blob to which none of its manifests refers. `expire`: seconds for
    which an upload session or a partial blob is kept without progress. (A partial blob is a blob whose download from an
    upstream registry is not complete.) `is_full`: a function that returns whether the disk is full. While it is full,
    the collector frees the space of each blob right after removing it, and `IDLE_SECONDS_ON_FULL_DISK` replaces
    `expire` for partial blobs. `grace` stays the same on a full disk."""

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
        *,
        leases: Leases,
    ) -> None:
        self._metadata = metadata
        self._blobs = blobs
        self._partials = partials
        self._locks = locks
        self._leases = leases
        self._clock = clock
        self.grace = grace
        self._expire = expire
        self._is_full = is_full
        self._next_shard = int(clock()) % blobs.shard_count
        """Number of the next shard to list. The first one depends on the time of the start, so that a process that is
        often restarted does not list the same shards again and again."""

    async def collect(self) -> CollectionReport:
        """Runs one round, and returns how much it removed. If a step raises StorageFull, the later steps still run, and
        the round then raises that error. If a step raises StorageFailed, the round raises it at once. What was removed
        before an error or a cancellation stays removed."""
        report = CollectionReport()
        failure: StorageFull | None = None
        for step in (
            self._reclaim_space,
            self._expire_partials,
            self._remove_stale_uploads,
            self._remove_links,
            self._remove_blobs,
            self._remove_strays,
            self._reclaim_space,
        ):
            try:
                await step(report)
            except StorageFull as error:  # later steps may free the space that this one needs
                failure = failure or error
        if report:
            log.info(
                "removed %d blobs, %d links to blobs, %d stale uploads, %d stale partial blobs, %d stray blobs",
                report.blobs, report.links, report.uploads, report.partials, report.strays,
            )  # fmt: skip
        if failure is not None:
            raise failure
        return report

    async def _reclaim_space(self, _report: CollectionReport) -> None:
        """Frees the disk space of removed bytes. `_report` is not used, because other steps count the removals."""
        await self._blobs.reclaim_space()

    async def _expire_partials(self, report: CollectionReport) -> None:
        """Removes the partial blobs without recent progress that no process is downloading."""
        idle_seconds = min(self._expire, IDLE_SECONDS_ON_FULL_DISK) if self._is_full() else self._expire
        report.partials += await self._partials.expire(self._clock() - idle_seconds)

    async def _remove_stale_uploads(self, report: CollectionReport) -> None:
        """Removes upload sessions without recent progress, and the bytes of old upload sessions without a row."""
        before = self._clock() - self._expire
        while stale := await self._metadata.stale_uploads(before, BATCH_SIZE):
            for upload in stale:
                if await self._metadata.drop_upload(upload, before):
                    await self._blobs.discard_upload(upload)
                    report.uploads += 1
        written_before = self._clock() - max(self.grace, MIN_STRAY_AGE_SECONDS)
        old = [upload for upload, changed in await self._blobs.list_uploads() if changed < written_before]
        known = await self._metadata.known_uploads(old)
        for upload in old:
            if upload not in known:
                await self._blobs.discard_upload(upload)

    async def _remove_links(self, report: CollectionReport) -> None:
        """Removes the links whose blobs no manifest of the repository has referred to for the grace period."""
        before = self._clock() - self.grace
        while entries := await self._metadata.queued_links(before, BATCH_SIZE):
            for entry in entries:
                report.links += await self._metadata.drop_link(entry, before)

    async def _remove_blobs(self, report: CollectionReport) -> None:
        """Removes blobs without a link: first the row, then the bytes, which the blob store finds under the key in the
        row (`place`). A push of the same blob waits for the lock of the digest and then stores the bytes again, so
        these blobs need no grace period. While a backup is running, leaves the blobs for a later round."""
        is_more = True
        while is_more:
            async with removal_slot(self._leases) as may_remove:
                is_more = may_remove and await self._remove_blob_batch(report)

    async def _remove_blob_batch(self, report: CollectionReport) -> bool:
        """Removes at most `BATCH_SIZE` blobs without a link. Returns False if there was none."""
        digests = await self._metadata.unlinked_blobs(BATCH_SIZE)
        for digest in digests:
            async with self._locks.hold(digest):
                place = await self._metadata.drop_blob(digest)
                if place is not None:
                    await self._blobs.remove(place)
                    report.blobs += 1
            if self._is_full():
                await self._blobs.reclaim_space()
        if digests:
            await self._blobs.reclaim_space()
        return bool(digests)

    async def _remove_strays(self, report: CollectionReport) -> None:
        """Removes the strays in the next shards of the blob store, except for those that were written recently."""
        for _ in range(SHARDS_PER_ROUND):
            shard, self._next_shard = self._next_shard, (self._next_shard + 1) % self._blobs.shard_count
            written_before = self._clock() - max(self.grace, MIN_STRAY_AGE_SECONDS)
            listed = await self._blobs.list_shard(shard)
            old = {digest: place for digest, place, written in listed if written < written_before}
            known = await self._metadata.known_blobs(list(old))
            for digest in old.keys() - known:
                report.strays += await self._remove_stray(digest, old[digest])

    async def _remove_stray(self, digest: Digest, place: str) -> bool:
        """Removes the bytes that the blob store has under the key `place`, unless there is a row with the digest now.
        Returns whether it removed the bytes."""
        async with self._locks.hold(digest):
            if digest in await self._metadata.known_blobs([digest]):
                return False
            await self._blobs.remove(place)
            return True
