"""Blobs as files, by digest (`BlobStore`)."""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TypeVar

import aiofiles.threadpool

from storage.blobs.blob_store import Publishable
from storage.blobs.files.cached_reads import CachedOpener, read_cached
from storage.blobs.files.upload_file import UploadFile, upload_size
from storage.content import BLOB_TYPE, Descriptor, OpenFile, Span
from storage.data_dir import durable_files
from storage.data_dir.blocking_calls import UncancellableFuture, run_in_thread
from storage.data_dir.layout import SHARDS, Layout
from storage.data_dir.reserve import Reserve
from storage.data_dir.system import FULL, System
from storage.errors import BlobUploadInvalid, BlobUploadUnknown, DigestInvalid, StorageFailed
from storage.names import Digest, UploadID

CHUNK = 256 * 1024
SMALL = 64 * 1024
"""Bytes up to which a blob is read when it is opened."""
THREADS = 16
T = TypeVar("T")


class FileBlobReader:
    """An opened blob file (`BlobReader`). Owns `fd`."""

    location: str | None = None
    is_incomplete = False
    data: bytes | None = None

    def __init__(self, fd: int, threads: Executor, descriptor: Descriptor, span: tuple[int, int]) -> None:
        self._fd = fd
        self._threads = threads
        self.descriptor = descriptor
        self.span = span
        self.file: OpenFile | None = OpenFile(fd)

    async def ready(self, at: int) -> int:
        """All of it is here."""
        return self.span[1]

    async def __aiter__(self) -> AsyncIterator[bytes]:
        at, stop = self.span
        file = aiofiles.threadpool.wrap(io.FileIO(self._fd, closefd=False), executor=self._threads)
        with durable_files.as_storage_errors():
            await file.seek(at)
            while at < stop:
                chunk = await file.read(min(CHUNK, stop - at))
                if not chunk:
                    raise _ended(self.descriptor, at)
                at += len(chunk)
                yield chunk

    async def aclose(self) -> None:
        if self.file is None:
            return
        self.file = None
        if os.fstat(self._fd).st_nlink:
            os.close(self._fd)
        else:  # deleted meanwhile: the last to close it waits while the file system frees its blocks
            await asyncio.get_running_loop().run_in_executor(self._threads, os.close, self._fd)


class SmallBlobReader:
    """A small blob, or a small part of one, read when it was opened (`BlobReader`)."""

    location: str | None = None
    is_incomplete = False
    file: OpenFile | None = None

    def __init__(self, data: bytes, descriptor: Descriptor, span: tuple[int, int]) -> None:
        self.data: bytes | None = data
        self.descriptor = descriptor
        self.span = span

    async def ready(self, at: int) -> int:
        """All of it is here."""
        return self.span[1]

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if self.data:
            yield self.data

    async def aclose(self) -> None:
        """Nothing is held."""


def _ended(descriptor: Descriptor, at: int) -> StorageFailed:
    return StorageFailed(f"the file of {descriptor.digest} ends after {at} bytes")


class FileBlobStore:
    """Content-addressed files below a data directory, safe for several processes at once."""

    def __init__(self, layout: Layout, system: System, reserve: Reserve) -> None:
        self.layout = layout
        self.system = system
        self.reserve = reserve
        self.shards = SHARDS
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="disk")
        self._opener = CachedOpener(layout.root)
        self._held: dict[int, asyncio.Lock] = {}
        self.held = 0
        """Bytes of uploads that are in memory, over all of them."""

    def run(self, step: Callable[[], T]) -> UncancellableFuture[T]:
        """Runs a blocking step in a thread. It goes on when nobody waits for it any more."""
        return run_in_thread(self._threads, step)

    def let_go(self, session: UploadFile, size: int) -> None:
        """Closes the file of a session of that size. A large one in a thread, and nobody waits for it: the file system
        may wait for what is being written, or free the blocks. 50 to 160 ms were seen for 256 MiB."""
        number = session.detach()
        if number < 0:
            return
        if size > SMALL:
            with suppress(RuntimeError):  # the threads have ended
                self._threads.submit(os.close, number)
                return
        os.close(number)

    async def free(self, session: UploadFile) -> None:
        """Closes the file of a session that was dropped. Its room is free when this ends, cancelled or not."""
        number = session.detach()
        if number >= 0:
            await self.run(lambda: os.close(number))

    def close(self) -> None:
        self._threads.shutdown()
        self._opener.close()

    async def open(self, digest: Digest, size: int, place: str, span: Span | None) -> FileBlobReader | SmallBlobReader:
        """What the kernel has in memory is opened, and a small blob read, right here; the rest in a thread."""
        within = span.within(size) if span else (0, size)
        descriptor = Descriptor(BLOB_TYPE, digest, size)
        try:
            fd = self._opener.open(place)
            if fd is None:
                fd = await self._open_in_thread(place)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise durable_files.storage_error(error, f"the file of {digest} cannot be opened") from error
        if within[1] - within[0] > SMALL:
            return FileBlobReader(fd, self._threads, descriptor, within)
        return SmallBlobReader(await self._read_small(fd, descriptor, within), descriptor, within)

    async def _open_in_thread(self, place: str) -> int:
        path = self.layout.at(place)
        future = asyncio.get_running_loop().run_in_executor(self._threads, os.open, path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            future.add_done_callback(_close_opened)
            raise

    async def _read_small(self, fd: int, descriptor: Descriptor, span: tuple[int, int]) -> bytes:
        """Closes `fd`."""
        start, length = span[0], span[1] - span[0]
        try:
            with durable_files.as_storage_errors():
                data = read_cached(fd, start, length)
            if data is None:
                data = await self.run(lambda: os.pread(fd, length, start))
        finally:
            os.close(fd)
        if len(data) < length:
            raise _ended(descriptor, start + len(data))
        return data

    def create(self, upload: UploadID) -> UncancellableFuture[UploadFile]:
        return self.run(lambda: UploadFile.create(self.system, self.layout.upload(upload)))

    def take_over(
        self, upload: UploadID, check: Callable[[int], None] | None = None
    ) -> UncancellableFuture[UploadFile]:
        directory = self.layout.upload(upload)

        def take() -> UploadFile:
            if check is not None:
                check(upload_size(directory))
            return UploadFile.take_over(self.system, directory)

        return self.run(take)

    async def session_size(self, upload: UploadID) -> int:
        return await self.run(lambda: upload_size(self.layout.upload(upload)))

    @asynccontextmanager
    async def hold(self, digest: Digest) -> AsyncIterator[None]:
        stripe = self.layout.stripe(digest)
        async with self._held.setdefault(int(stripe.name, 16), asyncio.Lock()):
            fd = await self._open_stripe(stripe)
            try:
                # Polled: a thread that waits for another process could keep that process's own steps waiting here.
                pause = 0.0005
                while not durable_files.try_flock(fd):
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, 0.02)
                yield
            finally:
                os.close(fd)

    async def _open_stripe(self, stripe: Path) -> int:
        """It was made with the data directory, unless that was on a full disk."""

        def opened() -> int:
            return self.system.open(stripe, os.O_RDWR | os.O_CREAT)

        with durable_files.as_storage_errors():
            try:
                return opened()
            except OSError as error:
                if error.errno not in FULL:
                    raise
        return await self.run(lambda: self.reserve.spend(opened, OSError))

    async def publish(self, content: Publishable, digest: Digest) -> str:
        place = self.layout.place(digest)
        await self.run(lambda: content.publish(self.layout.at(place)))
        return place

    async def remove(self, place: str) -> None:
        path = self.layout.at(place)

        def move() -> None:
            with suppress(FileNotFoundError):
                try:
                    self.system.rename(path, self.layout.trash / path.name)
                except OSError as error:
                    if error.errno not in FULL:
                        raise
                    self.system.unlink(path)  # the trash has no room for one more name

        await self.run(move)

    async def empty_trash(self) -> None:
        def unlink_all() -> None:
            for name in os.listdir(self.layout.trash):
                with suppress(FileNotFoundError):
                    self.system.unlink(self.layout.trash / name)

        await self.run(unlink_all)

    async def discard(self, upload: UploadID) -> None:
        def drop() -> None:
            if not self.layout.upload(upload).exists():
                return
            with suppress(BlobUploadInvalid, BlobUploadUnknown):  # another one is at it
                try:
                    session = UploadFile.take_over(self.system, self.layout.upload(upload))
                except OSError as error:
                    if error.errno not in FULL:
                        raise
                    with suppress(OSError):  # it has no bytes, and there is no room for a file to say so
                        self.system.rmdir(self.layout.upload(upload))
                    return
                try:
                    session.discard()
                finally:
                    session.close()

        await self.run(drop)

    async def shard(self, number: int) -> list[tuple[Digest, str, float]]:
        path = self.layout.shard(number)
        algorithm = path.parent.name

        def look() -> list[tuple[Digest, str, float]]:
            found = []
            for entry in os.scandir(path):
                with suppress(DigestInvalid, FileNotFoundError):
                    digest = Digest(f"{algorithm}:{entry.name}")
                    found.append((digest, self.layout.place(digest), entry.stat().st_mtime))
            return found

        return await self.run(look)

    async def sessions(self) -> list[tuple[UploadID, float]]:
        def look() -> list[tuple[UploadID, float]]:
            found = []
            for entry in os.scandir(self.layout.uploads):
                with suppress(BlobUploadUnknown, FileNotFoundError):
                    found.append((UploadID(entry.name), entry.stat().st_mtime))
            return found

        return await self.run(look)


def _close_opened(future: asyncio.Future[int]) -> None:
    """Nobody waits for the file any more."""
    if not future.cancelled() and future.exception() is None:
        os.close(future.result())
