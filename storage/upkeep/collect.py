"""Online garbage collection: what nothing refers to any more goes, while the registry serves.

It reads the queue that changes fill, so its cost follows the garbage and not the store. What a crash left behind
without a trace in the metadata (a file renamed into place whose row was never committed) is found by looking at a few
directories in each round.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from storage.blobs.store import BlobStore
from storage.interface import Partials
from storage.metadata.catalog import Metadata
from storage.names import Digest

PORTION = 500
SHARDS = 16
"""Directories of blobs looked at in one round."""
log = logging.getLogger("storage.collect")


@dataclass(slots=True)
class Collected:
    """What one round took away."""

    links: int = 0
    blobs: int = 0
    uploads: int = 0
    partials: int = 0
    strays: int = 0

    def __bool__(self) -> bool:
        return any((self.links, self.blobs, self.uploads, self.partials, self.strays))


class Collector:
    """`grace` and `expire` in seconds: how long a blob may lie without a manifest that refers to it, and an upload
    session or a partial blob without progress. Several processes may collect at once; they do no harm to each other."""

    def __init__(
        self,
        metadata: Metadata,
        blobs: BlobStore,
        partials: Partials,
        clock: Callable[[], float],
        grace: float,
        expire: float,
    ) -> None:
        self._metadata = metadata
        self._blobs = blobs
        self._partials = partials
        self._clock = clock
        self.grace = grace
        self._expire = expire
        self._next_shard = int(clock()) % blobs.shards

    async def collect(self) -> Collected:
        """One round. Raises StorageFull, StorageFailed; what it did until then stays done. Cancelled: likewise."""
        done = Collected()
        await self._end_stale_uploads(done)
        done.partials += await self._partials.expire(self._clock() - self._expire)
        await self._drop_links(done)
        await self._drop_blobs(done)
        await self._drop_strays(done)
        await self._blobs.empty_trash()
        if done:
            log.info(
                "collected %d blobs (%d links), %d stale uploads, %d stale partial blobs, %d stray files",
                done.blobs, done.links, done.uploads, done.partials, done.strays,
            )  # fmt: skip
        return done

    async def _end_stale_uploads(self, done: Collected) -> None:
        before = self._clock() - self._expire
        while stale := await self._metadata.stale_uploads(before, PORTION):
            for upload in stale:
                if await self._metadata.drop_upload(upload, before):
                    await self._blobs.discard(upload)
                    done.uploads += 1
        cut = self._clock() - max(self.grace, 60)
        old = [upload for upload, changed in await self._blobs.sessions() if changed < cut]
        known = await self._metadata.known_uploads(old)
        for upload in old:
            if upload not in known:
                await self._blobs.discard(upload)

    async def _drop_links(self, done: Collected) -> None:
        before = self._clock() - self.grace
        while entries := await self._metadata.dropped_links(before, PORTION):
            for entry in entries:
                done.links += await self._metadata.drop_link(entry, before)

    async def _drop_blobs(self, done: Collected) -> None:
        """Blobs without any link need no grace: what could bring them back holds their lock, or pushes them anew."""
        while digests := await self._metadata.dropped_blobs(PORTION):
            for digest in digests:
                async with self._blobs.hold(digest):
                    place = await self._metadata.drop_blob(digest)
                    if place is not None:
                        await self._blobs.remove(place)
                        done.blobs += 1

    async def _drop_strays(self, done: Collected) -> None:
        for _ in range(SHARDS):
            number, self._next_shard = self._next_shard, (self._next_shard + 1) % self._blobs.shards
            cut = self._clock() - max(self.grace, 60)
            old = {digest: place for digest, place, written in await self._blobs.shard(number) if written < cut}
            known = await self._metadata.known_blobs(list(old))
            for digest in old.keys() - known:
                done.strays += await self._drop_stray(digest, old[digest])

    async def _drop_stray(self, digest: Digest, place: str) -> bool:
        async with self._blobs.hold(digest):
            if digest in await self._metadata.known_blobs([digest]):
                return False
            await self._blobs.remove(place)
            return True
