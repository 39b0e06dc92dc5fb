"""Blobs of an upstream: served from the store, or from a running fill while its bytes arrive."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import suppress
from typing import Final

from registry.mirror.entitlement import BlobEntitlement, start_timeout
from registry.mirror.fill.fill import Fill, Fills
from registry.mirror.fill.slots import ImagePull
from registry.mirror.prefetch import Prefetcher
from storage.content import BLOB_TYPE, Descriptor, Manifest, OpenFile, Span
from storage.errors import BlobUnknown, DigestInvalid, PartialLost, StorageFailed, UpstreamUnavailable
from storage.interface import BlobReader, Registry
from storage.names import Digest, RepositoryName

SMALL_BLOB: Final = 64 * 1024
"""Blobs up to this many bytes are served only after their digest was checked; the delay is negligible."""
FILL_ATTEMPTS: Final = 5
"""Fills tried for one request, when earlier ones brought wrong bytes or lost their partial."""
START_TIMEOUT_SECONDS: Final = 25.0
"""Time until a client gets an answer, whatever the upstream does. containerd waits 30 s for headers."""


class MirroredBlobs:
    """The blob reads of `Mirror`. `start_timeout` in seconds."""

    def __init__(
        self,
        local: Registry,
        entitlement: BlobEntitlement,
        fills: Fills,
        prefetch: Prefetcher,
        start_timeout: float = START_TIMEOUT_SECONDS,
    ) -> None:
        self._local = local
        self._entitlement = entitlement
        self._fills = fills
        self._prefetch = prefetch
        self._start_timeout = start_timeout

    async def resolve(self, repo: RepositoryName, digest: Digest) -> Descriptor:
        """Returns the blob's descriptor. Fetches no bytes. Raises BlobUnknown, and what the upstream raises."""
        deadline = self._deadline()
        if await self._entitlement.is_confirmed(repo, digest):
            with suppress(BlobUnknown):
                return await self._local.resolve_blob(repo, digest)
        size, _ = await self._prove(repo, digest, deadline)
        if self._entitlement.private and (holder := await self._entitlement.mount(repo, digest, size)):
            with suppress(BlobUnknown):  # the mount keeps the upstream's word, so it is asked once
                return await self._local.resolve_blob(holder, digest)
        return Descriptor(BLOB_TYPE, digest, size, verified=False)

    async def open(self, repo: RepositoryName, digest: Digest, span: Span | None) -> BlobReader:
        """Opens a stored blob, or follows its fill. Waits until the upstream starts to send; for small blobs, until all
        bytes were checked. If the fill is still queued at the start timeout, returns a reader that waits on; otherwise
        raises UpstreamTimeout. Raises BlobUnknown, RangeInvalid, and what the upstream raises."""
        deadline = self._deadline()
        if await self._entitlement.is_confirmed(repo, digest):
            with suppress(BlobUnknown):
                reader = await self._local.open_blob(repo, digest, span)
                self._prefetch.on_hit(repo, digest)
                return reader
        size, manifests = await self._prove(repo, digest, deadline)
        within = span.to_offsets(size) if span else (0, size)
        for _ in range(FILL_ATTEMPTS):
            if holder := await self._entitlement.mount(repo, digest, size):
                with suppress(BlobUnknown):
                    return await self._local.open_blob(holder, digest, span)
            fill = self._fills.request(repo, digest, size)
            self._prefetch.on_blob(repo, digest, manifests)
            try:
                if await self._wait_started(fill, deadline):
                    return FillReader(fill, within, self._prefetch.pulls_of(digest))
            except BlobUnknown:
                if fill.repo == repo:
                    raise
            except (DigestInvalid, PartialLost):
                continue  # no reader got any of its bytes
        raise UpstreamUnavailable(f"{digest} could not be fetched; try again in a moment")

    async def should_prefetch(self, repo: RepositoryName, blob: Descriptor) -> bool:
        """Returns whether to fetch a blob that a manifest of `repo` names: it is not stored, and the upstream did not
        say a short time ago that it has none. Raises what `resolve` raises."""
        entitlement, digest = self._entitlement, blob.digest
        if await entitlement.is_confirmed(repo, digest):
            with suppress(BlobUnknown):
                await self._local.resolve_blob(repo, digest)
                return False
        if entitlement.private:
            size, _ = await self._prove(repo, digest, self._deadline())
            if size != blob.size:
                return False
        elif await entitlement.is_known_missing(repo, digest):
            return False
        return not await entitlement.mount(repo, digest, blob.size)

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self._start_timeout

    async def _prove(self, repo: RepositoryName, digest: Digest, deadline: float) -> tuple[int, Sequence[Manifest]]:
        running = self._fills.find_for(repo, digest)
        return await self._entitlement.prove(repo, digest, deadline, running.size if running else None)

    async def _wait_started(self, fill: Fill, deadline: float) -> bool:
        """Returns whether a reader has to follow the fill, which has started or is still queued at the deadline; False
        if the blob is in the store."""
        try:
            async with asyncio.timeout_at(deadline):
                if fill.size > SMALL_BLOB:
                    return await fill.wait_started()
                await fill.wait_finished()
                return False
        except TimeoutError:
            if fill.size > SMALL_BLOB and fill.is_queued:
                return True
            raise start_timeout(fill.digest) from None


READ_CHUNK: Final = 256 * 1024
"""Bytes of one read from the fill's file."""


class FillReader:
    """Reads the file that a fill writes, through a file descriptor of its own, so the data stays readable after the
    fill has ended. The last byte of the blob is released only after the digest was checked: no client gets a whole blob
    with wrong bytes."""

    location: str | None = None
    is_incomplete = True
    data: bytes | None = None

    def __init__(self, fill: Fill, span: tuple[int, int], pulls: Iterable[ImagePull]) -> None:
        self.descriptor = Descriptor(BLOB_TYPE, fill.digest, fill.size)
        self.span = span
        self._fill = fill
        self._fd = os.dup(fill.file.fd)
        self._offset = fill.file.offset
        self.file: OpenFile | None = OpenFile(self._fd, self._offset)
        self._checked = False
        self._pulls = list(pulls)
        for pull in self._pulls:
            pull.enter()

    async def readable_until(self, at: int) -> int:
        """Waits until the byte at `at` is available and returns where the available bytes end. Raises what ended the
        fill: UpstreamUnavailable, DigestInvalid, StorageFull and others."""
        if self._checked:
            return self.span[1]
        last = self._fill.size - 1
        if at >= last:
            await self._fill.wait_until(self._fill.size)
            self._checked = True
            return self.span[1]
        return min(await self._fill.wait_until(at), last, self.span[1])

    async def __aiter__(self) -> AsyncIterator[bytes]:
        at, stop = self.span
        while at < stop:
            reached = await self.readable_until(at)
            while at < reached:
                chunk = await self._read(at, min(READ_CHUNK, reached - at))
                at += len(chunk)
                yield chunk

    async def _read(self, at: int, length: int) -> bytes:
        try:
            data = await asyncio.to_thread(os.pread, self._fd, length, self._offset + at)
        except OSError as error:
            raise StorageFailed(f"the file of {self.descriptor.digest} cannot be read: {error.strerror}") from error
        if not data:
            raise StorageFailed(f"the file of {self.descriptor.digest} ends after {at} bytes")
        return data

    async def aclose(self) -> None:
        if self.file is None:
            return
        self.file = None
        for pull in self._pulls:
            pull.leave()
        if os.fstat(self._fd).st_nlink:
            os.close(self._fd)
        else:  # the file was deleted: the last close blocks while the file system frees its blocks
            await asyncio.to_thread(os.close, self._fd)
