"""Readers of stored blobs (`BlobReader`): one over an open file, one over bytes that were read when it was opened."""

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

CHUNK = 256 * 1024


class FileBlobReader:
    """Reads a blob from its file. Owns the descriptor `fd`."""

    location: str | None = None
    is_incomplete = False
    data: bytes | None = None

    def __init__(self, fd: int, threads: Executor, descriptor: Descriptor, span: tuple[int, int]) -> None:
        self._fd = fd
        self._threads = threads
        self.descriptor = descriptor
        self.span = span
        self.file: OpenFile | None = OpenFile(fd)

    async def readable_until(self, at: int) -> int:
        """Returns the end of the span: all of the blob is here."""
        return self.span[1]

    async def __aiter__(self) -> AsyncIterator[bytes]:
        at, stop = self.span
        file = aiofiles.threadpool.wrap(io.FileIO(self._fd, closefd=False), executor=self._threads)
        with as_storage_errors():
            await file.seek(at)
            while at < stop:
                chunk = await file.read(min(CHUNK, stop - at))
                if not chunk:
                    raise truncated_file(self.descriptor, at)
                at += len(chunk)
                yield chunk

    async def aclose(self) -> None:
        """Closes the file. Closing a deleted file waits while the file system frees its blocks, so a thread does it."""
        if self.file is None:
            return
        self.file = None
        if os.fstat(self._fd).st_nlink:
            os.close(self._fd)
        else:
            await asyncio.get_running_loop().run_in_executor(self._threads, os.close, self._fd)


class SmallBlobReader:
    """Holds a small blob, or a small part of one, that was read when it was opened."""

    location: str | None = None
    is_incomplete = False
    file: OpenFile | None = None

    def __init__(self, data: bytes, descriptor: Descriptor, span: tuple[int, int]) -> None:
        self.data: bytes | None = data
        self.descriptor = descriptor
        self.span = span

    async def readable_until(self, at: int) -> int:
        """Returns the end of the span: all of the blob is here."""
        return self.span[1]

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if self.data:
            yield self.data

    async def aclose(self) -> None:
        """Does nothing: there is no file to close."""


def truncated_file(descriptor: Descriptor, at: int) -> StorageFailed:
    """Returns the error for a file that is shorter than its blob."""
    return StorageFailed(f"the file of {descriptor.digest} ends after {at} bytes")
