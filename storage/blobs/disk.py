"""Blobs as files, by digest (`BlobStore`)."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

import aiofiles
from aiofiles.threadpool.binary import AsyncFileIO

from storage.blobs import files
from storage.blobs.layout import SHARDS, Layout
from storage.blobs.session import SessionFile, session_size
from storage.content import BLOB_TYPE, Descriptor, OpenFile, Span
from storage.errors import BlobUploadInvalid, BlobUploadUnknown, DigestInvalid, StorageFailed
from storage.names import Digest, UploadID
from storage.system import System

CHUNK = 1024 * 1024
THREADS = 16
T = TypeVar("T")


class DiskReader:
    """An opened blob file (`BlobReader`)."""

    location: str | None = None

    def __init__(self, file: AsyncFileIO, descriptor: Descriptor, span: tuple[int, int]) -> None:
        self._file = file
        self.descriptor = descriptor
        self.span = span
        self.file: OpenFile | None = OpenFile(file.fileno())

    async def __aiter__(self) -> AsyncIterator[bytes]:
        at, stop = self.span
        with files.told():
            await self._file.seek(at)
            while at < stop:
                chunk = await self._file.read(min(CHUNK, stop - at))
                if not chunk:
                    raise StorageFailed(f"the file of {self.descriptor.digest} ends after {at} bytes")
                at += len(chunk)
                yield chunk

    async def aclose(self) -> None:
        self.file = None
        await self._file.close()


class DiskBlobs:
    """Content-addressed files below a data directory, safe for several processes at once."""

    def __init__(self, layout: Layout, system: System) -> None:
        self.layout = layout
        self.system = system
        self.shards = SHARDS
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="disk")
        self._held: dict[int, asyncio.Lock] = {}

    async def run(self, step: Callable[[], T]) -> T:
        """Runs a blocking step in a thread. Cancelled: waits for the step's end all the same, so that a lock held
        around it is never let go while it still works."""
        future = asyncio.get_running_loop().run_in_executor(self._threads, step)
        with files.told():
            try:
                return await asyncio.shield(future)
            except asyncio.CancelledError:
                await asyncio.wait([future])
                raise

    def close(self) -> None:
        self._threads.shutdown()

    async def open(self, digest: Digest, size: int, place: str, span: Span | None) -> DiskReader:
        within = span.within(size) if span else (0, size)
        path = self.layout.at(place)
        try:
            file = await aiofiles.open(path, "rb", buffering=0, executor=self._threads)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StorageFailed(f"the file of {digest} cannot be opened: {error.strerror}") from error
        return DiskReader(file, Descriptor(BLOB_TYPE, digest, size), within)

    async def create(self, upload: UploadID) -> SessionFile:
        return await self.run(lambda: SessionFile.create(self.system, self.layout.upload(upload)))

    async def take_over(self, upload: UploadID) -> SessionFile:
        return await self.run(lambda: SessionFile.take_over(self.system, self.layout.upload(upload)))

    async def session_size(self, upload: UploadID) -> int:
        return await self.run(lambda: session_size(self.layout.upload(upload)))

    @asynccontextmanager
    async def hold(self, digest: Digest) -> AsyncIterator[None]:
        stripe = self.layout.stripe(digest)
        async with self._held.setdefault(int(stripe.name, 16), asyncio.Lock()):
            with files.told():
                fd = self.system.open(stripe, os.O_RDWR | os.O_CREAT)
            try:
                # Polled: a thread that waits for another process could keep that process's own steps waiting here.
                pause = 0.0005
                while not files.try_lock(fd):
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, 0.02)
                yield
            finally:
                os.close(fd)

    async def publish(self, session: SessionFile, digest: Digest) -> str:
        place = self.layout.place(digest)
        await self.run(lambda: session.publish(self.layout.at(place)))
        return place

    async def remove(self, place: str) -> None:
        path = self.layout.at(place)

        def move() -> None:
            with suppress(FileNotFoundError):
                self.system.rename(path, self.layout.trash / path.name)

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
                session = SessionFile.take_over(self.system, self.layout.upload(upload))
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
