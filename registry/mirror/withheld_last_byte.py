"""Reads a blob that the mirror is still downloading, but withholds the blob's last byte until the digest is verified
(`UnverifiedBlobReader`).

Clients get the bytes of a blob while the mirror downloads the blob, before the mirror can verify the digest. If the
digest turns out to be wrong, the response ends one byte early, so no client gets a complete blob with wrong bytes.
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
"""Largest number of bytes in one chunk that an iteration over the reader yields."""


class UnverifiedBlobReader:
    """Reads the *partial blob*: the file into which a *fill* (the download of one blob) writes. Implements the Protocol
    `BlobReader`. The reader has its own file descriptor, so it can read the bytes after the fill has ended.

    Another fill may store the same blob first. The partial blob then stays incomplete. A reader that has got no byte of
    it reads the file of the stored blob instead."""

    location: str | None = None
    """Always None here: only a complete blob has a presigned URL."""
    is_incomplete = True
    """Always True here: a read may have to wait for the download."""
    data: bytes | None = None
    """Always None here: the bytes are in a file."""

    def __init__(
        self,
        fill: Fill,
        span: tuple[int, int],
        pulls: Iterable[ImagePull],
        open_stored: Callable[[], Awaitable[BlobReader | None]],
    ) -> None:
        """Opens the partial blob. Raises TooManyOpenFiles, StorageFailed.

        - `span`: the offset of the first byte to read, and the offset after the last byte to read.
        - `pulls`: the pulls of images that contain the blob. Each pull counts as active while this reader is open.
        - `open_stored`: opens the stored blob, or returns None if the blob is not stored."""
        self.descriptor = Descriptor(BLOB_TYPE, fill.digest, fill.size)
        self.span = span
        self._fill = fill
        self._open_stored = open_stored
        self._reader_file = fill.open_file()
        fill.demand.add_client()
        self.file: OpenFile | None = self._reader_file.file
        """The same object as `_reader_file.file`; None after `aclose`. If this reader switches to the stored blob, the
        object stays the same, and its file descriptor then refers to the file of the stored blob."""
        self._is_verified = False
        """Whether the digest of the blob is verified and the blob is stored."""
        self._pulls = list(pulls)
        for pull in self._pulls:
            pull.add_reader()

    async def readable_until(self, offset: int) -> int:
        """Waits until the byte at `offset` may be sent to a client. Returns the offset after the last byte that may be
        sent, at most the end of `span`. The blob's last byte may be sent only after the digest is verified.

        - If the fill fails, raises the error of the fill: UpstreamUnavailable, DigestInvalid, StorageFull and others.
        - If the partial blob was deleted after this reader had got bytes, raises PartialBlobLost."""
        if self._is_verified:
            return self.span[1]
        last_byte = self._fill.size - 1
        try:
            if offset < last_byte:
                return min(await self._fill.wait_for_byte(offset, self._reader_file), last_byte, self.span[1])
            await self._fill.wait_for_byte(self._fill.size, self._reader_file)
        except StoredByAnotherFill:
            await self._read_stored_blob()
        self._is_verified = True
        return self.span[1]

    async def _read_stored_blob(self) -> None:
        """Makes this reader read the file of the stored blob. Raises PartialBlobLost if this reader has got bytes of
        the partial blob, or if the stored blob has another size, has no file, or was deleted. Also raises the errors
        of `open_stored`."""
        stored = await self._open_stored()
        if stored is None:
            raise PartialBlobLost
        async with aclosing(stored):
            # `fill.size` may come from a manifest, and a manifest can state a wrong size.
            if stored.descriptor.size != self._fill.size:
                raise PartialBlobLost
            if stored.file is None or not await self._reader_file.switch_to_stored(stored.file):
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
        self._fill.demand.remove_client()
        for pull in self._pulls:
            pull.remove_reader()
        await self._reader_file.aclose()
