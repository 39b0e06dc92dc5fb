"""Two readers of stored blobs, which implement the Protocol `BlobReader`. `FileBlobReader` reads from an open file.
`SmallBlobReader` holds bytes that were read when the blob was opened."""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import AsyncIterator
from concurrent.futures import Executor

import aiofiles.threadpool

from storage.content import Descriptor, OpenFile
from storage.data_dir.blocking_calls import as_storage_errors
from storage.errors import StorageFailed

CHUNK_BYTES = 256 * 1024
"""Largest number of bytes in one read of a file. An iteration over a `FileBlobReader` yields one chunk per read."""


class FileBlobReader:
    """Reads a *span* of a blob (the whole blob or a part) from the blob's open file. Iterating yields the bytes of the
    span in chunks. Iterating raises StorageFailed if the file is too short or cannot be read."""

    location: str | None = None  # no URL from which the client could download the bytes itself
    is_incomplete = False  # the store has all bytes of the blob
    data: bytes | None = None  # the bytes are not in memory

    def __init__(self, fd: int, threads: Executor, descriptor: Descriptor, span: tuple[int, int]) -> None:
        """`fd`: the open file. `aclose` closes it. `span`: the offset of the first byte to read, and the offset after
        the last byte."""
        self._fd = fd
        self._threads = threads
        self.descriptor = descriptor
        self.span = span
        self.file: OpenFile | None = OpenFile(fd)

    async def readable_until(self, offset: int) -> int:
        """Returns the end of the span, because all bytes from `offset` to the end of the span can be read now."""
        return self.span[1]

    async def __aiter__(self) -> AsyncIterator[bytes]:
        offset, stop = self.span
        file = aiofiles.threadpool.wrap(io.FileIO(self._fd, closefd=False), executor=self._threads)
        with as_storage_errors():
            await file.seek(offset)
            while offset < stop:
                chunk = await file.read(min(CHUNK_BYTES, stop - offset))
                if not chunk:
                    raise truncated_file_error(self.descriptor, offset)
                offset += len(chunk)
                yield chunk

    async def aclose(self) -> None:
        """Closes the file. May be called more than once. If the file has been deleted, a thread closes it, because
        close(2) then blocks while the file system frees the blocks of the file."""
        if self.file is None:
            return
        self.file = None
        if os.fstat(self._fd).st_nlink:
            os.close(self._fd)
        else:
            # Without the shield, a cancellation while this call waits for a thread would leave the file open.
            await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._threads, os.close, self._fd))


class SmallBlobReader:
    """Holds the bytes (`data`) of a small span of a blob. Iterating yields all of them in one chunk."""

    location: str | None = None  # as for `FileBlobReader`
    is_incomplete = False  # as for `FileBlobReader`
    file: OpenFile | None = None

    def __init__(self, data: bytes, descriptor: Descriptor, span: tuple[int, int]) -> None:
        """`data`: the bytes of the span. `span`: the offset of its first byte, and the offset after its last byte."""
        self.data: bytes | None = data
        self.descriptor = descriptor
        self.span = span

    async def readable_until(self, offset: int) -> int:
        """Returns the end of the span, because all bytes from `offset` to the end of the span can be read now."""
        return self.span[1]

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if self.data:
            yield self.data

    async def aclose(self) -> None:
        """Does nothing, because no file is open."""


def truncated_file_error(descriptor: Descriptor, length: int) -> StorageFailed:
    """Returns the error to raise if the file of a blob has only `length` bytes, fewer than the blob."""
    return StorageFailed(f"the file of {descriptor.digest} ends after {length} bytes")
