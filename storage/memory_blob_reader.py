"""A reader of a blob in memory (`MemoryBlobReader`), for `storage.memory_registry.MemoryRegistry`."""

from __future__ import annotations

from collections.abc import AsyncIterator

from storage.content import Descriptor, OpenFile

PIECE_BYTES = 1 << 20
"""Size in bytes of the pieces that a reader yields, and of the largest span that it returns as `data`."""


class MemoryBlobReader:
    """A `BlobReader` over bytes in memory. It stays readable if the blob is deleted."""

    def __init__(self, descriptor: Descriptor, data: bytes, span: tuple[int, int]) -> None:
        self.descriptor = descriptor
        self.span = span
        self.data: bytes | None = data[slice(*span)] if span[1] - span[0] <= PIECE_BYTES else None
        self.file: OpenFile | None = None
        self.location: str | None = None  # there is no URL from which the client could download the blob itself
        self.is_incomplete = False  # all bytes are in memory, and none is still to come from an upstream
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
