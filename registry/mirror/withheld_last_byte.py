"""The reader of a blob that is still being downloaded. It withholds the blob's last byte until the digest is verified
(`UnverifiedBlobReader`).

Clients get the bytes of a blob while the mirror downloads the blob, so the mirror cannot verify the digest first. But a
client accepts a blob only if it has received the last byte. The mirror sends that byte only after it has verified the
digest. If the digest is wrong, the response ends one byte early. So no client gets a complete blob with wrong bytes.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterable
from functools import partial
from typing import Final

from registry.mirror.fill.fill import Fill
from registry.mirror.fill.slots import ImagePull
from registry.single_flight import finish_in_thread
from storage.content import BLOB_TYPE, Descriptor, OpenFile
from storage.errors import StorageFailed

CHUNK_BYTES: Final = 256 * 1024
"""Largest number of bytes that one read from the file returns, and that one step of an iteration yields."""


class UnverifiedBlobReader:
    """Reads the file into which a fill (the download of one blob) writes. Implements the Protocol `BlobReader`. Has a
    file descriptor of its own, so that the bytes can still be read after the fill has ended."""

    location: str | None = None
    """None, because a presigned URL can lead only to the bytes of a complete blob."""
    is_incomplete = True
    """True as long as the reader exists, even after the download has ended."""
    data: bytes | None = None

    def __init__(self, fill: Fill, span: tuple[int, int], pulls: Iterable[ImagePull]) -> None:
        """`span`: offsets of the first byte to read and of the byte after the last one. `pulls`: the pulls of images
        that contain the blob. While this reader is open, each of them counts as active."""
        self.descriptor = Descriptor(BLOB_TYPE, fill.digest, fill.size)
        self.span = span
        self._fill = fill
        self._file_descriptor = os.dup(fill.file.fd)
        self._file_offset = fill.file.offset
        """Offset of the blob's first byte in the file."""
        self.file: OpenFile | None = OpenFile(self._file_descriptor, self._file_offset)
        self._is_verified = False
        """Whether the digest of the blob is verified and the blob is stored."""
        self._pulls = list(pulls)
        for pull in self._pulls:
            pull.enter()

    async def readable_until(self, offset: int) -> int:
        """Waits until the byte at `offset` may be sent to a client. Returns the offset of the first byte after it that
        is missing or withheld, but at most the end of `span`. The blob's last byte may be sent only after the digest is
        verified. If the fill fails, raises its error: UpstreamUnavailable, DigestInvalid, StorageFull and others."""
        if self._is_verified:
            return self.span[1]
        last_byte = self._fill.size - 1
        if offset >= last_byte:
            await self._wait_until_verified()
            return self.span[1]
        return min(await self._fill.wait_until(offset), last_byte, self.span[1])

    async def _wait_until_verified(self) -> None:
        """Waits until the digest of the whole blob is verified and the blob is stored."""
        await self._fill.wait_until(self._fill.size)
        self._is_verified = True

    async def __aiter__(self) -> AsyncIterator[bytes]:
        offset, end_offset = self.span
        while offset < end_offset:
            ready_end = await self.readable_until(offset)
            while offset < ready_end:
                chunk = await self._read(offset, min(CHUNK_BYTES, ready_end - offset))
                offset += len(chunk)
                yield chunk

    async def _read(self, offset: int, length: int) -> bytes:
        """Returns at least one and at most `length` bytes of the blob, starting at `offset`. Raises StorageFailed."""
        try:
            data = await asyncio.to_thread(os.pread, self._file_descriptor, length, self._file_offset + offset)
        except OSError as error:
            raise StorageFailed(f"the file of {self.descriptor.digest} cannot be read: {error.strerror}") from error
        if not data:
            raise StorageFailed(f"the file of {self.descriptor.digest} ends after {offset} bytes")
        return data

    async def aclose(self) -> None:
        """Closes the file. May be called more than once."""
        if self.file is None:
            return
        self.file = None
        for pull in self._pulls:
            pull.leave()
        if os.fstat(self._file_descriptor).st_nlink:
            os.close(self._file_descriptor)
        else:  # the file has been deleted, so the call blocks while the file system frees the file's blocks
            await finish_in_thread(partial(os.close, self._file_descriptor))  # also if the request is cancelled
