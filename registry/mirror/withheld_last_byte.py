"""The reader of a blob that is still being downloaded. It withholds the blob's last byte until the digest is verified
(`UnverifiedBlobReader`).

Clients get the bytes of a blob while the mirror downloads the blob, so the mirror cannot verify the digest first. But a
client accepts a blob only if it has received the last byte. The mirror sends that byte only after it has verified the
digest. If the digest is wrong, the response ends one byte early. So no client gets a complete blob with wrong bytes.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing
from typing import Final

from registry.mirror.fill.demand import ImagePull
from registry.mirror.fill.fill import Fill, StoredByAnotherFill
from storage.content import BLOB_TYPE, Descriptor, OpenFile
from storage.errors import PartialBlobLost, StorageFailed
from storage.interface import BlobReader

CHUNK_BYTES: Final = 256 * 1024
"""Largest number of bytes that one read from the file returns, and that one step of an iteration yields."""


class UnverifiedBlobReader:
    """Reads the file into which a fill (the download of one blob) writes. Implements the Protocol `BlobReader`. Has a
    file descriptor of its own, so that the bytes can still be read after the fill has ended. If another fill stores the
    blob before this reader has got a byte, the reader makes its file descriptor refer to the file of the stored blob
    (`dup2`)."""

    location: str | None = None
    """The presigned URL from which a client can download the bytes itself. Always None here, because only a complete
    blob has such a URL."""
    is_incomplete = True
    """True if the registry is still downloading the blob. Reading may then have to wait. Always True here, even after
    the download has ended."""
    data: bytes | None = None
    """All bytes of `span`, if they are in memory. Always None here."""

    def __init__(
        self,
        fill: Fill,
        span: tuple[int, int],
        pulls: Iterable[ImagePull],
        open_stored: Callable[[], Awaitable[BlobReader | None]],
    ) -> None:
        """`span`: offsets of the first byte to read and of the byte after the last one. `pulls`: the pulls of images
        that contain the blob. While this reader is open, each of them counts as active. `open_stored`: opens the whole
        blob if it is stored, or returns None.

        If the fill's file cannot be opened, the constructor raises TooManyOpenFiles or StorageFailed."""
        self.descriptor = Descriptor(BLOB_TYPE, fill.digest, fill.size)
        self.span = span
        self._fill = fill
        self._open_stored = open_stored
        self._reader_file = fill.open_file()
        fill.demand.enter()
        self.file: OpenFile | None = self._reader_file.file
        self._is_verified = False
        """Whether the digest of the blob is verified and the blob is stored."""
        self._pulls = list(pulls)
        for pull in self._pulls:
            pull.enter()

    async def readable_until(self, offset: int) -> int:
        """Waits until the byte at `offset` may be sent to a client. Returns the offset of the first byte after it that
        is missing or withheld, but at most the end of `span`. The blob's last byte may be sent only after the digest is
        verified. If the fill fails, raises its error: UpstreamUnavailable, DigestInvalid, StorageFull and others. If
        the bytes of the fill were deleted after this reader had got some of them, raises PartialBlobLost."""
        if self._is_verified:
            return self.span[1]
        last_byte = self._fill.size - 1
        try:
            if offset < last_byte:
                return min(await self._fill.wait_until(offset, self._reader_file), last_byte, self.span[1])
            await self._fill.wait_until(self._fill.size, self._reader_file)
        except StoredByAnotherFill:
            await self._read_stored_blob()
        self._is_verified = True
        return self.span[1]

    async def _read_stored_blob(self) -> None:
        """Replaces the file by that of the stored blob. Raises PartialBlobLost if this reader has got bytes of its
        file, or if the stored blob has another size, has no file or was deleted. Also raises the errors of opening the
        blob."""
        stored = await self._open_stored()
        if stored is None:
            raise PartialBlobLost
        async with aclosing(stored):
            if stored.descriptor.size != self._fill.size:  # a manifest states a wrong size, and `span` is based on it
                raise PartialBlobLost
            if stored.file is None or not await self._reader_file.replace(stored.file):
                raise PartialBlobLost

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
        file = self._reader_file.file
        try:
            data = await asyncio.to_thread(os.pread, file.fd, length, file.offset + offset)
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
        self._fill.demand.leave()
        for pull in self._pulls:
            pull.leave()
        await self._reader_file.aclose()
