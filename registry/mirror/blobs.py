"""Blobs of an upstream: from the store, or through a fill that any number of readers follow.

A blob that is read while it comes in (`BlobReader`).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import suppress
from typing import Final

from registry.mirror.fill.fill import Fill, FillContext, Fills
from registry.mirror.fill.slots import ImagePull
from registry.mirror.prefetch import Prefetcher
from registry.mirror.upstream_client import UnconfirmedBlobUnknown
from registry.single_flight import SingleFlight
from storage.content import BLOB_TYPE, Descriptor, Manifest, OpenFile, Span
from storage.errors import BlobUnknown, DigestInvalid, PartialLost, StorageFailed, UpstreamTimeout, UpstreamUnavailable
from storage.interface import BlobReader
from storage.names import Digest, RepositoryName
from storage.upstream_records import UpstreamRecords

SMALL_BLOB: Final = 64 * 1024
"""Bytes up to which a blob is given to nobody before it is checked: that costs no time worth naming."""
FILL_ATTEMPTS: Final = 5
START_TIMEOUT_SECONDS: Final = 25.0
"""Seconds in which a client is answered, whatever the upstream does: containerd waits 30 s for headers."""


class MirroredBlobs:
    """A blob may be read through a repository when the upstream says that the repository has it. Where everybody may
    read all of the upstream, a manifest of the repository that names the blob is enough."""

    def __init__(
        self,
        tools: FillContext,
        records: UpstreamRecords,
        fills: Fills,
        prefetch: Prefetcher,
        beginning: float = START_TIMEOUT_SECONDS,
    ) -> None:
        self._tools = tools
        self._records = records
        self._fills = fills
        self._prefetch = prefetch
        self._beginning = beginning
        self._sizes: SingleFlight[int] = SingleFlight()

    async def resolve(self, repo: RepositoryName, digest: Digest) -> Descriptor:
        """Nothing is fetched for it. Raises BlobUnknown, and what the source raises."""
        ends = asyncio.get_running_loop().time() + self._beginning
        tools = self._tools
        if await tools.entitled(repo, digest):
            with suppress(BlobUnknown):
                return await tools.local.resolve_blob(repo, digest)
        size, _ = await self._entitle(repo, digest, ends)
        if tools.private and (holder := await tools.mount(repo, digest, size)):  # so that it need not be asked again
            with suppress(BlobUnknown):
                return await tools.local.resolve_blob(holder, digest)
        return Descriptor(BLOB_TYPE, digest, size, verified=False)

    async def open(self, repo: RepositoryName, digest: Digest, span: Span | None) -> BlobReader:
        """Waits until the upstream has begun to send, never for the whole; for a while where only connections to it are
        wanting. Raises BlobUnknown, RangeInvalid, UpstreamTimeout, and what the source raises."""
        ends = asyncio.get_running_loop().time() + self._beginning
        local = self._tools.local
        if await self._tools.entitled(repo, digest):
            with suppress(BlobUnknown):
                reader = await local.open_blob(repo, digest, span)
                self._prefetch.on_hit(repo, digest)
                return reader
        size, manifests = await self._entitle(repo, digest, ends)
        within = span.within(size) if span else (0, size)
        for _ in range(FILL_ATTEMPTS):
            if holder := await self._tools.mount(repo, digest, size):
                with suppress(BlobUnknown):
                    return await local.open_blob(holder, digest, span)
            fill = self._fills.want(repo, digest, size)
            self._prefetch.on_blob(repo, digest, manifests)
            try:
                async with asyncio.timeout_at(ends):
                    opened = size > SMALL_BLOB and await fill.opened()
                    if not opened:
                        await fill.wait_finished()
                if opened:
                    return FillReader(fill, within, self._prefetch.pulls_of(digest))
            except TimeoutError:
                if size > SMALL_BLOB and fill.is_queued:
                    return FillReader(fill, within, self._prefetch.pulls_of(digest))
                raise _start_timeout(digest) from None
            except BlobUnknown:
                if fill.repo == repo:
                    raise
            except (DigestInvalid, PartialLost):
                continue  # nothing of it was given to anybody here
        raise UpstreamUnavailable(f"{digest} could not be fetched; try again in a moment")

    async def should_prefetch(self, repo: RepositoryName, blob: Descriptor) -> bool:
        """Whether a blob that a manifest of `repo` names is worth asking for: it is not here, nor known not to be
        there. Raises what `resolve` raises."""
        tools, digest = self._tools, blob.digest
        if await tools.entitled(repo, digest):
            with suppress(BlobUnknown):
                await tools.local.resolve_blob(repo, digest)
                return False
        if tools.private:
            size, _ = await self._entitle(repo, digest, asyncio.get_running_loop().time() + self._beginning)
            if size != blob.size:
                return False
        elif await tools.misses.has(repo, digest):
            return False
        return not await tools.mount(repo, digest, blob.size)

    async def aclose(self) -> None:
        await self._sizes.aclose()

    async def _entitle(self, repo: RepositoryName, digest: Digest, ends: float) -> tuple[int, Sequence[Manifest]]:
        """The blob's size and the manifests that name it. Raises BlobUnknown: the repository has no such blob;
        UpstreamTimeout: nobody said so until `ends`."""
        if await self._tools.misses.has(repo, digest):
            raise BlobUnknown("the upstream has no such blob; that is remembered for a moment")
        manifests = await self._records.referring_manifests(repo, digest)
        if self._tools.private:
            # Whoever may write a manifest at the upstream may name any digest in it, with any size.
            if (fill := self._fills.of(repo, digest)) is not None:
                return fill.size, manifests
        else:
            for blob in (blob for manifest in manifests for blob in manifest.blobs):
                if blob.digest == digest:
                    return blob.size, manifests
        try:
            async with asyncio.timeout_at(ends):
                return await self._sizes.join((repo, digest), lambda: self._ask_size(repo, digest)), manifests
        except TimeoutError:
            raise _start_timeout(digest) from None

    async def _ask_size(self, repo: RepositoryName, digest: Digest) -> int:
        tools = self._tools
        async with tools.leases.take(f"blob {repo} {digest}"):
            if await tools.misses.has(repo, digest):
                raise BlobUnknown("the upstream has no such blob")
            try:
                return (await tools.source.resolve_blob(tools.far(repo), digest)).size
            except UnconfirmedBlobUnknown:
                raise
            except BlobUnknown:
                await tools.misses.note(repo, digest)
                raise


def _start_timeout(digest: Digest) -> UpstreamTimeout:
    return UpstreamTimeout(f"{digest} does not begin to come in time; try again in a moment")


READ_CHUNK: Final = 256 * 1024


class FillReader:
    """Reads what a fill writes, from the same file, opened for itself: it stays readable once the fill has ended. The
    blob's last byte is given only once the digest is checked, so that nobody ends up with a whole blob that is wrong.
    """

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

    async def ready(self, at: int) -> int:
        """Raises what broke the fill off: UpstreamUnavailable, DigestInvalid, StorageFull and the like."""
        if self._checked:
            return self.span[1]
        last = self._fill.size - 1
        if at >= last:
            await self._fill.wait(self._fill.size)
            self._checked = True
            return self.span[1]
        return min(await self._fill.wait(at), last, self.span[1])

    async def __aiter__(self) -> AsyncIterator[bytes]:
        at, stop = self.span
        while at < stop:
            reached = await self.ready(at)
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
        else:  # given up meanwhile: the last to close it waits while the file system frees its blocks
            await asyncio.to_thread(os.close, self._fd)
