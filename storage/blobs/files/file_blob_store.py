"""Blobs as files, by digest (`BlobStore`)."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress

from storage.blobs.blob_store import BytesMissing, ListedBlob
from storage.blobs.files.cached_reads import CachedOpener, read_cached
from storage.blobs.files.file_blob_reader import FileBlobReader, SmallBlobReader, truncated_file
from storage.blobs.files.upload_file import UploadFile, upload_size
from storage.blobs.files.upload_session import ClaimedUploadFile, FileUploadSession, UploadBuffers
from storage.content import BLOB_TYPE, Descriptor, Span
from storage.data_dir.blocking_calls import UncancellableFuture, as_storage_errors, storage_error
from storage.data_dir.disk import Disk
from storage.data_dir.layout import SHARDS
from storage.data_dir.system import DISK_FULL_ERRNOS
from storage.errors import BlobUploadInvalid, BlobUploadUnknown, DigestInvalid
from storage.names import Digest, UploadID
from storage.running_digest import start_digest

SMALL_BLOB_BYTES = 64 * 1024
"""Size up to which a blob, or a span of one, is read when it is opened."""


class FileBlobStore:
    """Content-addressed files in a data directory, on a disk that all processes share."""

    def __init__(self, disk: Disk, boot: str) -> None:
        """`boot` names this run of the machine. Raises OSError."""
        self.boot = boot
        self.shards = SHARDS
        self.layout = disk.layout
        self._disk = disk
        self._opener = CachedOpener(disk.layout.root)
        self._buffers = UploadBuffers()

    def close(self) -> None:
        """Closes what the store itself has open; opened blobs and sessions are closed by their owners."""
        self._opener.close()

    async def open(self, digest: Digest, size: int, place: str, span: Span | None) -> FileBlobReader | SmallBlobReader:
        """Opens the file, and reads a small blob, on the event loop if the kernel has them cached; else in a thread."""
        within = span.within(size) if span else (0, size)
        descriptor = Descriptor(BLOB_TYPE, digest, size)
        try:
            fd = self._opener.open(place)
            if fd is None:
                fd = await self._open_in_thread(place)
        except FileNotFoundError:
            raise BytesMissing(place) from None
        except OSError as error:
            raise storage_error(error, f"the file of {digest} cannot be opened") from error
        if within[1] - within[0] > SMALL_BLOB_BYTES:
            return FileBlobReader(fd, self._disk.threads, descriptor, within)
        return SmallBlobReader(await self._read_small(fd, descriptor, within), descriptor, within)

    async def _open_in_thread(self, place: str) -> int:
        path = self._disk.layout.path_of(place)
        flags = os.O_RDONLY | os.O_CLOEXEC
        future = asyncio.get_running_loop().run_in_executor(self._disk.threads, os.open, path, flags)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            future.add_done_callback(_close_opened)
            raise

    async def _read_small(self, fd: int, descriptor: Descriptor, span: tuple[int, int]) -> bytes:
        """Reads the span and closes `fd`."""
        start, length = span[0], span[1] - span[0]
        try:
            with as_storage_errors():
                data = read_cached(fd, start, length)
            if data is None:
                data = await self._disk.run(lambda: os.pread(fd, length, start))
        finally:
            os.close(fd)
        if len(data) < length:
            raise truncated_file(descriptor, start + len(data))
        return data

    def start_upload(self, upload: UploadID, algorithm: str) -> FileUploadSession:
        return FileUploadSession(self._disk, self._buffers, self.boot, upload, start_digest(algorithm))

    def take_over(
        self, upload: UploadID, check: Callable[[int], None] | None = None
    ) -> UncancellableFuture[ClaimedUploadFile]:
        directory = self._disk.layout.upload(upload)

        def take() -> ClaimedUploadFile:
            if check is not None:
                check(upload_size(directory))
            file = UploadFile.take_over(self._disk.system, directory)
            return ClaimedUploadFile(self._disk, self._buffers, self.boot, upload, file)

        return self._disk.run(take)

    async def upload_size(self, upload: UploadID) -> int:
        return await self._disk.run(lambda: upload_size(self._disk.layout.upload(upload)))

    async def discard_upload(self, upload: UploadID) -> None:
        await self._disk.run(lambda: self._discard_upload(upload))

    def _discard_upload(self, upload: UploadID) -> None:
        directory = self._disk.layout.upload(upload)
        if not directory.exists():
            return
        with suppress(BlobUploadInvalid, BlobUploadUnknown):  # another process is ending it
            try:
                file = UploadFile.take_over(self._disk.system, directory)
            except OSError as error:
                if error.errno not in DISK_FULL_ERRNOS:
                    raise
                with suppress(OSError):  # the session has no bytes, and the full disk has no space for an empty file
                    self._disk.system.rmdir(directory)
                return
            try:
                file.discard()
            finally:
                file.close()

    async def list_uploads(self) -> list[tuple[UploadID, float]]:
        def scan() -> list[tuple[UploadID, float]]:
            found = []
            for entry in os.scandir(self._disk.layout.uploads):
                with suppress(BlobUploadUnknown, FileNotFoundError):
                    found.append((UploadID(entry.name), entry.stat().st_mtime))
            return found

        return await self._disk.run(scan)

    async def remove(self, place: str) -> None:
        """Moves the file to the trash, which takes no longer for a large file than for a small one."""
        path = self._disk.layout.path_of(place)

        def move() -> None:
            with suppress(FileNotFoundError):
                try:
                    self._disk.system.rename(path, self._disk.layout.trash / path.name)
                except OSError as error:
                    if error.errno not in DISK_FULL_ERRNOS:
                        raise
                    self._disk.system.unlink(path)  # the trash has no space for one more name

        await self._disk.run(move)

    async def reclaim_space(self) -> None:
        """Empties the trash."""

        def unlink_all() -> None:
            for name in os.listdir(self._disk.layout.trash):
                with suppress(FileNotFoundError):
                    self._disk.system.unlink(self._disk.layout.trash / name)

        await self._disk.run(unlink_all)

    async def list_shard(self, number: int) -> list[ListedBlob]:
        path = self._disk.layout.shard(number)
        algorithm = path.parent.name

        def scan() -> list[ListedBlob]:
            found = []
            for entry in os.scandir(path):
                with suppress(DigestInvalid, FileNotFoundError):
                    digest = Digest(f"{algorithm}:{entry.name}")
                    found.append(ListedBlob(digest, self._disk.layout.blob_place(digest), entry.stat().st_mtime))
            return found

        return await self._disk.run(scan)


def _close_opened(future: asyncio.Future[int]) -> None:
    """Closes a file whose opener was cancelled."""
    if not future.cancelled() and future.exception() is None:
        os.close(future.result())
