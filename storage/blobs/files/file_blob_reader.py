"""Readers of stored blobs. Both implement the Protocol `BlobReader`: `FileBlobReader` reads from an open file,
`SmallBlobReader` returns bytes that were read when the blob was opened."""

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
"""Largest number of bytes in one read. Each read gives one chunk of an iteration."""


class FileBlobReader:
    """Reads a blob, or a span (a part) of it, from its open file. Iterating yields the bytes in chunks."""

    location: str | None = None  # no URL from which the client could download the bytes itself
    is_incomplete = False  # no part of the blob is still being downloaded from another registry
    data: bytes | None = None  # the bytes are not in memory

    def __init__(self, fd: int, threads: Executor, descriptor: Descriptor, span: tuple[int, int]) -> None:
        """`fd`: the open file, which this object closes. `span`: offsets of the first byte to read and of the byte
        after the last one."""
        self._fd = fd
        self._threads = threads
        self.descriptor = descriptor
        self.span = span
        self.file: OpenFile | None = OpenFile(fd)

    async def readable_until(self, offset: int) -> int:
        """Returns the offset up to which bytes can be read: the end of the span, because all bytes are stored."""
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
        """Closes the file. May be called more than once. If the file has been deleted, a thread closes it: the system
        call close(2) then blocks while the file system frees the file's blocks."""
        if self.file is None:
            return
        self.file = None
        if os.fstat(self._fd).st_nlink:
            os.close(self._fd)
        else:
            # Without the shield, a cancellation while this call waits for a thread would leave the file open.
            await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._threads, os.close, self._fd))


class SmallBlobReader:
    """Holds the bytes (`data`) of a small blob, or of a small span of a blob. Iterating yields them in one chunk."""

    location: str | None = None  # as for `FileBlobReader`
    is_incomplete = False  # as for `FileBlobReader`
    file: OpenFile | None = None

    def __init__(self, data: bytes, descriptor: Descriptor, span: tuple[int, int]) -> None:
        """`data`: the bytes of the span. `span`: offsets of its first byte and of the byte after the last one."""
        self.data: bytes | None = data
        self.descriptor = descriptor
        self.span = span

    async def readable_until(self, offset: int) -> int:
        """Returns the end of the span without waiting, because all of its bytes are stored."""
        return self.span[1]

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if self.data:
            yield self.data

    async def aclose(self) -> None:
        """Does nothing, because no file is open."""


def truncated_file_error(descriptor: Descriptor, length: int) -> StorageFailed:
    """Returns the error to raise if a blob's file ends after `length` bytes, before the blob does."""
    return StorageFailed(f"the file of {descriptor.digest} ends after {length} bytes")
