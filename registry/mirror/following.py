"""A blob that is read while it comes in (`BlobReader`)."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterable
from typing import Final

from registry.mirror.demand import Pull
from registry.mirror.fill import Fill
from storage.content import BLOB_TYPE, Descriptor, OpenFile
from storage.errors import StorageFailed

CHUNK: Final = 256 * 1024


class FollowingReader:
    """Reads what a fill writes, from the same file, opened for itself: it stays readable once the fill has ended. The
    blob's last byte is given only once the digest is checked, so that nobody ends up with a whole blob that is wrong.
    """

    location: str | None = None
    arriving = True
    data: bytes | None = None

    def __init__(self, fill: Fill, span: tuple[int, int], pulls: Iterable[Pull]) -> None:
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
                chunk = await self._read(at, min(CHUNK, reached - at))
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
