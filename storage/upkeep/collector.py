"""Online garbage collection: removes content that nothing refers to, while the registry serves.

The collector reads a queue that changes fill, so its cost depends on the garbage, not on the size of the store. Bytes
that a crash left without a row in the metadata (published, but never committed) are found by listing a few parts of the
blob store in each round.
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

PORTION = 500
IDLE_ON_FULL_DISK = 60.0
"""Seconds after which an idle partial blob is dropped on a full disk."""
SHARDS = 16
"""Parts of the blob store that are listed in one round."""
log = logging.getLogger("storage.collect")


@dataclass(slots=True)
class CollectionReport:
    """Numbers of what one round removed."""

    links: int = 0
    blobs: int = 0
    uploads: int = 0
    partials: int = 0
    strays: int = 0

    def __bool__(self) -> bool:
        return any((self.links, self.blobs, self.uploads, self.partials, self.strays))


class Collector:
    """Several processes may collect at once without harm.

    `grace`: seconds for which a blob stays without a manifest that refers to it. `expire`: seconds for which an upload
    session or a partial blob stays without progress. While `is_full`, removed bytes are deleted at once and idle
    partial blobs expire early; the grace stays the same."""

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
        self._next_shard = int(clock()) % blobs.shards

    async def collect(self) -> CollectionReport:
        """Runs one round. Raises StorageFull, StorageFailed. After an error or a cancellation, what was removed stays
        removed."""
        done = CollectionReport()
        failed: StorageFull | None = None
        for step in (
            self._empty_trash,
            self._drop_partials,
            self._end_stale_uploads,
            self._drop_links,
            self._drop_blobs,
            self._drop_strays,
            self._empty_trash,
        ):
            try:
                await step(done)
            except StorageFull as error:  # later steps may free the space that this one needs
                failed = failed or error
        if done:
            log.info(
                "collected %d blobs (%d links), %d stale uploads, %d stale partial blobs, %d stray files",
                done.blobs, done.links, done.uploads, done.partials, done.strays,
            )  # fmt: skip
        if failed is not None:
            raise failed
        return done

    async def _empty_trash(self, _done: CollectionReport) -> None:
        await self._blobs.reclaim_space()

    async def _drop_partials(self, done: CollectionReport) -> None:
        idle = min(self._expire, IDLE_ON_FULL_DISK) if self._is_full() else self._expire
        done.partials += await self._partials.expire(self._clock() - idle)

    async def _end_stale_uploads(self, done: CollectionReport) -> None:
        before = self._clock() - self._expire
        while stale := await self._metadata.stale_uploads(before, PORTION):
            for upload in stale:
                if await self._metadata.drop_upload(upload, before):
                    await self._blobs.discard_upload(upload)
                    done.uploads += 1
        cut = self._clock() - max(self.grace, 60)
        old = [upload for upload, changed in await self._blobs.list_uploads() if changed < cut]
        known = await self._metadata.known_uploads(old)
        for upload in old:
            if upload not in known:
                await self._blobs.discard_upload(upload)

    async def _drop_links(self, done: CollectionReport) -> None:
        before = self._clock() - self.grace
        while entries := await self._metadata.dropped_links(before, PORTION):
            for entry in entries:
                done.links += await self._metadata.drop_link(entry, before)

    async def _drop_blobs(self, done: CollectionReport) -> None:
        """Removes blobs that no repository has, row first. They need no grace: a push of the same digest waits for the
        lock and then stores its own bytes."""
        while digests := await self._metadata.dropped_blobs(PORTION):
            for digest in digests:
                async with self._locks.hold(digest):
                    place = await self._metadata.drop_blob(digest)
                    if place is not None:
                        await self._blobs.remove(place)
                        done.blobs += 1
                if self._is_full():
                    await self._blobs.reclaim_space()
            await self._blobs.reclaim_space()

    async def _drop_strays(self, done: CollectionReport) -> None:
        for _ in range(SHARDS):
            number, self._next_shard = self._next_shard, (self._next_shard + 1) % self._blobs.shards
            cut = self._clock() - max(self.grace, 60)
            old = {digest: place for digest, place, written in await self._blobs.list_shard(number) if written < cut}
            known = await self._metadata.known_blobs(list(old))
            for digest in old.keys() - known:
                done.strays += await self._drop_stray(digest, old[digest])

    async def _drop_stray(self, digest: Digest, place: str) -> bool:
        async with self._locks.hold(digest):
            if digest in await self._metadata.known_blobs([digest]):
                return False
            await self._blobs.remove(place)
            return True
