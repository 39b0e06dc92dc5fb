"""The bytes of one upload session in a file (`UploadSession`).

Incoming data is collected in memory up to two mebibytes, then written and hashed in a thread while the next batch is
collected: the event loop never waits for the disk, and one upload holds two batches at most.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from dataclasses import dataclass

from storage.blobs.blob_store import Checkpoint
from storage.blobs.files.upload_file import UploadFile
from storage.data_dir.blocking_calls import wait_for_call
from storage.data_dir.disk import Disk
from storage.errors import BlobUploadInvalid, DigestInvalid, StorageFailed, StorageFull
from storage.names import Digest, UploadID
from storage.running_digest import RunningDigest, restore_digest, start_digest

BATCH_BYTES = 2 * 1024 * 1024
"""Bytes that are written and hashed in one call. Handing a call to a thread and back costs about a tenth of writing and
hashing one mebibyte. An upload holds up to twice as much in memory: one batch being written, one being collected."""
BUFFERED_BYTES_LIMIT = 32 * 1024 * 1024
"""Bytes that all uploads of a process may hold in memory; above it, each writes batches of `SMALL_BATCH_BYTES`."""
SMALL_BATCH_BYTES = 64 * 1024
CLOSE_INLINE_BYTES = 64 * 1024
"""Size up to which a session's file is closed on the event loop."""


@dataclass(slots=True)
class UploadBuffers:
    """Memory of all uploads of a process, in bytes."""

    size: int = 0


class FileUploadSession:
    """Made by `FileBlobStore.start_upload` and by `ClaimedUploadFile.resume`. Owns its file."""

    def __init__(
        self,
        disk: Disk,
        buffers: UploadBuffers,
        boot: str,
        upload: UploadID,
        running: RunningDigest,
        file: UploadFile | None = None,
        offset: int = 0,
    ) -> None:
        """`running` covers the first `offset` bytes. Without `file`, the first write creates it."""
        self._disk = disk
        self._buffers = buffers
        self._boot = boot
        self._upload = upload
        self._running = running
        self._opening: asyncio.Future[UploadFile] | None = None
        if file is not None:
            self._opening = asyncio.get_running_loop().create_future()
            self._opening.set_result(file)
        self._batch: list[bytes | memoryview] = []
        self._batch_size = 0
        self._written = offset
        self._writing: asyncio.Future[Digest | None] | None = None

    @property
    def offset(self) -> int:
        return self._written + self._batch_size

    async def append(self, data: bytes | memoryview) -> None:
        self._batch.append(data)
        self._batch_size += len(data)
        self._buffers.size += len(data)
        crowded = self._buffers.size > BUFFERED_BYTES_LIMIT
        if self._batch_size >= (SMALL_BATCH_BYTES if crowded else BATCH_BYTES):
            await self._finish_write()
            self._start_write(await self._open_file())
            if crowded:
                await self._finish_write()

    async def read_at(self, offset: int, length: int) -> bytes:
        file = await self._write_out()
        return await self._disk.run(lambda: file.read_at(offset, length))

    async def flush(self) -> Checkpoint:
        if self._batch or self._writing or self._opening:
            await self._write_out()
        return Checkpoint(self._written, self._running.save(), self._boot)

    async def verify(self, digest: Digest) -> UploadedContent:
        await self._finish_write()
        file = await self._open_file()
        self._start_write(file, digest)
        actual = await self._finish_write()
        if actual != digest:
            raise DigestInvalid(
                "the content has another digest; the upload was dropped", {"expected": digest, "actual": actual}
            )
        return UploadedContent(self._disk, file, digest, self._written)

    async def discard(self) -> None:
        with suppress(StorageFull, StorageFailed):
            await self._finish_write()
        self._writing = None
        self._drop_batch()
        file = await self._open_file()
        await self._disk.run(file.discard)

    def release(self) -> None:
        self._drop_batch()
        self._close_when_idle()

    async def close(self) -> None:
        self._drop_batch()
        if self._opening is not None and self._opening.done() and not self._opening.exception():
            number = self._opening.result().detach()
            if number >= 0:
                await self._disk.run(lambda: os.close(number))

    def _drop_batch(self) -> None:
        self._buffers.size -= self._batch_size
        self._batch, self._batch_size = [], 0

    def _close_when_idle(self) -> None:
        """Closes the file once no thread uses it: a thread that writes to a closed descriptor may hit another file
        which has got the same number."""
        for work in (self._opening, self._writing):
            if work is not None and not work.done():
                work.add_done_callback(lambda _: self._close_when_idle())
                return
        if self._opening is not None and not self._opening.cancelled() and not self._opening.exception():
            close_later(self._disk, self._opening.result(), self._written)

    def _start_write(self, file: UploadFile, expected: Digest | None = None) -> None:
        """Starts writing the batch in a thread. `expected`: this is the end of the content; compute its digest, and
        sync the file if that is the expected one. One call does it all: a small blob's push is mostly waiting for
        threads."""
        chunks, at = self._batch, self._written
        end = at + self._batch_size
        self._batch, self._batch_size, self._written = [], 0, end

        def write() -> Digest | None:
            if chunks:
                self._disk.reserve.require_room()
                file.append(chunks, at)
                for chunk in chunks:
                    self._running.update(chunk)
            if expected is None:
                return None
            actual = self._digest(file, expected.algorithm, end)
            if actual == expected:
                file.sync()
            return actual

        self._writing = self._disk.run(write)
        self._writing.add_done_callback(lambda _: self._free_buffers(end - at))

    def _free_buffers(self, size: int) -> None:
        self._buffers.size -= size

    def _digest(self, file: UploadFile, algorithm: str, size: int) -> Digest:
        """Returns the digest of the content. It was computed while the bytes came; only where the client then names
        another algorithm, the file is read again. Blocking."""
        if algorithm == self._running.algorithm:
            return self._running.digest()
        other = start_digest(algorithm)
        for piece in file.pieces(0, size):
            other.update(piece)
        return other.digest()

    async def _finish_write(self) -> Digest | None:
        """Waits for the write under way. Once a write has failed, each call raises its error again."""
        writing = self._writing
        if writing is None:
            return None
        actual = await wait_for_call(writing)
        if self._writing is writing:
            self._writing = None
        return actual

    async def _write_out(self) -> UploadFile:
        await self._finish_write()
        file = await self._open_file()
        if self._batch:
            self._start_write(file)
            await self._finish_write()
        return file

    async def _open_file(self) -> UploadFile:
        if self._opening is None:
            directory = self._disk.layout.upload(self._upload)
            self._opening = self._disk.run(lambda: UploadFile.create(self._disk.system, directory))
        return await wait_for_call(self._opening)


class ClaimedUploadFile:
    """The file of a session that was just taken over (`ClaimedUpload`)."""

    def __init__(self, disk: Disk, buffers: UploadBuffers, boot: str, upload: UploadID, file: UploadFile) -> None:
        self._disk = disk
        self._buffers = buffers
        self._boot = boot
        self._upload = upload
        self._file = file

    async def resume(self, algorithm: str, checkpoint: Checkpoint) -> FileUploadSession:
        """Reads no bytes where the checkpoint covers all of them, as it mostly does."""
        same_boot = checkpoint.boot == self._boot
        found = _resume_from_checkpoint(self._file, algorithm, checkpoint) if same_boot else None
        if found is None:
            found = await self._disk.run(lambda: self._resume_from_bytes(algorithm, checkpoint, same_boot=same_boot))
        running, offset = found
        return FileUploadSession(self._disk, self._buffers, self._boot, self._upload, running, self._file, offset)

    async def discard(self) -> None:
        with suppress(BlobUploadInvalid):
            await self._disk.run(self._file.discard)
        self._file.close()

    def release(self) -> None:
        close_later(self._disk, self._file, self._file.size())

    def _resume_from_bytes(
        self, algorithm: str, checkpoint: Checkpoint, *, same_boot: bool
    ) -> tuple[RunningDigest, int]:
        """Returns the digest so far and the offset. Blocking.

        Under the same run of the machine, all bytes in the file are right: those after the checkpoint are read again.
        Fewer bytes than the checkpoint says mean that a commit took the file and was stopped before it ended the row;
        the session is over (BlobUploadUnknown). After a reboot, bytes may be garbage: those that the checkpoint covers
        are hashed again, the rest are cut off. If the digest differs, or none was saved, the session starts over.
        """
        file, size = self._file, self._file.size()
        saved = restore_digest(algorithm, checkpoint.state)
        if same_boot:
            checkpoint.check_not_truncated(size)
            running, covered = (saved, checkpoint.offset) if saved is not None else (start_digest(algorithm), 0)
            for piece in file.pieces(covered, size):
                running.update(piece)
            return running, size
        running = start_digest(algorithm)
        for piece in file.pieces(0, checkpoint.offset):
            running.update(piece)
        if saved is not None and size >= checkpoint.offset and running.digest() == saved.digest():
            file.cut(checkpoint.offset)
            return running, checkpoint.offset
        file.restart()
        return start_digest(algorithm), 0


class UploadedContent:
    """The synced bytes of a session (`VerifiedContent`)."""

    def __init__(self, disk: Disk, file: UploadFile, digest: Digest, size: int) -> None:
        self.digest = digest
        self.size = size
        self.place = disk.layout.blob_place(digest)
        self._disk = disk
        self._file = file

    async def publish(self) -> None:
        await self._disk.run(lambda: self._file.publish(self._disk.layout.path_of(self.place)))


def close_later(disk: Disk, file: UploadFile, size: int) -> None:
    """Closes the file of a session of `size` bytes without waiting. A large one is closed in a thread: the file system
    may wait there for bytes being written, or free blocks; 50 to 160 ms were measured for 256 MiB."""
    number = file.detach()
    if number < 0:
        return
    if size > CLOSE_INLINE_BYTES:
        with suppress(RuntimeError):  # the threads have ended
            disk.threads.submit(os.close, number)
            return
    os.close(number)


def _resume_from_checkpoint(
    file: UploadFile, algorithm: str, checkpoint: Checkpoint
) -> tuple[RunningDigest, int] | None:
    """Returns the digest so far and the offset, or None where bytes must be read."""
    if file.size() != checkpoint.offset:
        return None
    running = restore_digest(algorithm, checkpoint.state) if checkpoint.offset else start_digest(algorithm)
    return (running, checkpoint.offset) if running else None
