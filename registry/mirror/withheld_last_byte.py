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
    """Reads the partial blob, the file into which a fill (the download of one blob) writes. Implements the Protocol
    `BlobReader`. The reader has a file descriptor of its own, so that it can read the bytes after the fill has ended.

    Two fills of one blob can run at a time. If the other fill stores the blob first, the partial blob of this fill does
    not get all bytes. If this reader has got no byte yet, it then reads the file of the stored blob instead."""

    location: str | None = None
    """Always None here: only a complete blob has a presigned URL."""
    is_incomplete = True
    """True: reading may have to wait for the download."""
    data: bytes | None = None
    """Always None here: the bytes are in a file."""

    def __init__(
        self,
        fill: Fill,
        span: tuple[int, int],
        pulls: Iterable[ImagePull],
        open_stored: Callable[[], Awaitable[BlobReader | None]],
    ) -> None:
        """If the partial blob cannot be opened, raises TooManyOpenFiles or StorageFailed.

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
        self._is_verified = False
        """Whether the digest of the blob is verified and the blob is stored."""
        self._pulls = list(pulls)
        for pull in self._pulls:
            pull.add_reader()

    async def readable_until(self, offset: int) -> int:
        """Waits until the byte at `offset` may be sent to a client. Returns the next offset whose byte may
        not be sent yet, but at most the end of `span`. The blob's last byte may be sent only after the digest is
        verified.

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
        """Replaces the partial blob by the file of the stored blob. Raises PartialBlobLost if this reader has got
        bytes, or if the stored blob has another size, has no file or was deleted. Also raises the errors of
        `open_stored`."""
        stored = await self._open_stored()
        if stored is None:
            raise PartialBlobLost
        async with aclosing(stored):
            if stored.descriptor.size != self._fill.size:  # `span` is based on a wrong size in a manifest
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
