"""Reads a blob whose bytes are in memory (`MemoryBlobReader`)."""

from __future__ import annotations

from collections.abc import AsyncIterator

from storage.content import Descriptor, OpenFile

PIECE_BYTES = 1 << 20
"""Largest number of bytes that a reader yields at a time."""


class MemoryBlobReader:
    """A `BlobReader` of bytes in memory. The bytes can still be read after the blob was deleted."""

    def __init__(self, descriptor: Descriptor, data: bytes, span: tuple[int, int]) -> None:
        """`data`: all bytes of the blob. `span`: the range of bytes to read (see `BlobReader.span`)."""
        self.descriptor = descriptor
        self.span = span
        self.data: bytes | None = data[slice(*span)] if span[1] - span[0] <= PIECE_BYTES else None
        """Only the bytes of `span`; None if `span` has more than `PIECE_BYTES` bytes."""
        self.file: OpenFile | None = None
        self.location: str | None = None  # no URL: the bytes are only in memory
        self.is_incomplete = False  # no download is running
        self._data = data

    async def readable_until(self, _offset: int, /) -> int:
        """Returns the end of the span, because all bytes are in memory."""
        return self.span[1]

    async def __aiter__(self) -> AsyncIterator[bytes]:
        start, stop = self.span
        for offset in range(start, stop, PIECE_BYTES):
            yield self._data[offset : min(offset + PIECE_BYTES, stop)]

    async def aclose(self) -> None:
        """Does nothing."""
