"""Writes the bytes of one upload session to a file and computes their digest (`FileUploadSession`).

The session collects incoming data in memory until a *batch* of 2 MiB is full. A thread writes and hashes the batch
while the session collects the next batch. The event loop never waits for the disk, and one upload holds at most two
batches in memory.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from dataclasses import dataclass

from storage.blobs.blob_store import Checkpoint
from storage.blobs.files.upload_file import UploadFile
from storage.blobs.files.upload_hashing import UploadHasher
from storage.data_dir.blocking_calls import wait_for_call
from storage.data_dir.disk import Disk
from storage.errors import BlobUploadInvalid, DigestInvalid, StorageFailed, StorageFull
from storage.names import Digest, UploadID
from storage.running_digest import RunningDigest, can_save_digests, restore_digest, start_digest

BATCH_BYTES = 2 * 1024 * 1024
"""Size of a batch. Larger batches take more memory. Smaller batches take more time, because each batch is one call in a
thread."""
BUFFERED_BYTES_LIMIT = 32 * 1024 * 1024
"""If the uploads of the process together hold more bytes than this in memory, each upload uses batches of
`SMALL_BATCH_BYTES`."""
SMALL_BATCH_BYTES = 64 * 1024
"""Size of a batch while the uploads of the process hold more than `BUFFERED_BYTES_LIMIT` in memory."""
SMALL_PIECE_BYTES = 4 * 1024
"""A *piece* is the data of one call of `FileUploadSession.append`. Pieces of fewer bytes than this are copied and
joined, because each piece that is not copied keeps its whole receive buffer in memory."""
PIECE_OVERHEAD_BYTES = 200
"""Memory that is counted for each element of a batch, in addition to the element's data."""
MAX_INLINE_CLOSE_BYTES = 64 * 1024
"""Size of the largest file that is closed on the event loop. Closing a larger file may block for long."""


@dataclass(slots=True)
class UploadBuffers:
    """Counts the memory of the batches. All uploads of the process share one object. `size`: the bytes that all their
    batches take together."""

    size: int = 0


class FileUploadSession:
    """An upload session with its file. Implements the Protocol `UploadSession`. `FileBlobStore.start_upload` and
    `ClaimedUploadFile.resume` create the sessions."""

    def __init__(
        self,
        disk: Disk,
        buffers: UploadBuffers,
        hasher: UploadHasher,
        boot: str,
        upload: UploadID,
        running_digest: RunningDigest | None,
        file: UploadFile | None = None,
        offset: int = 0,
    ) -> None:
        """`boot`: id of the machine's present boot. Each checkpoint contains this id, because a reboot may lose bytes
        that were not synced. `running_digest`: the digest of the bytes in the file; None: `verify` hashes the bytes.
        `file`: the session's file, which has `offset` bytes; None: the session has no file yet."""
        self._disk = disk
        self._buffers = buffers
        self._hasher = hasher
        self._boot = boot
        self._upload = upload
        self._running_digest = running_digest
        self._file_future: asyncio.Future[UploadFile] | None = None
        """The session's open file. The future is done when a thread has created the file. None: the session has no
        file, and `_open_file` was not called."""
        if file is not None:
            self._file_future = asyncio.get_running_loop().create_future()
            self._file_future.set_result(file)
        self._batch: list[bytes | bytearray | memoryview] = []
        """The batch that is being collected. Each bytearray contains joined small pieces."""
        self._batch_size = 0
        """Number of bytes of data in the batch."""
        self._batch_memory = 0
        """Memory that the batch takes, in bytes."""
        self._written = offset
        """Number of bytes that are in the file or are being written to it."""
        self._writing: asyncio.Future[Digest | None] | None = None
        """The last write that was started. None: the write has succeeded, or there was none."""

    @property
    def offset(self) -> int:
        """Number of bytes of the session so far, in the file and in memory."""
        return self._written + self._batch_size

    async def append(self, data: bytes | memoryview) -> None:
        """Adds `data` to the batch. The caller must never change the memory of `data` afterwards.

        If the batch is then full, waits until the previous batch is written and the file is created, and starts writing
        this batch. If the uploads of the process hold more than `BUFFERED_BYTES_LIMIT` in memory, also waits until this
        batch is written."""
        self._add_to_batch(data)
        is_over_limit = self._buffers.size > BUFFERED_BYTES_LIMIT
        if self._batch_size >= (SMALL_BATCH_BYTES if is_over_limit else BATCH_BYTES):
            await self._finish_write()
            self._start_write(await self._open_file())
            if is_over_limit:
                await self._finish_write()

    def _add_to_batch(self, data: bytes | memoryview) -> None:
        """Adds `data` to the batch. Copies and joins pieces that are smaller than `SMALL_PIECE_BYTES`."""
        last = self._batch[-1] if self._batch else None
        memory = len(data)
        if memory >= SMALL_PIECE_BYTES:
            self._batch.append(data)
            memory += PIECE_OVERHEAD_BYTES
        elif isinstance(last, bytearray):
            last += data
        else:
            self._batch.append(bytearray(data))
            memory += PIECE_OVERHEAD_BYTES
        self._batch_size += len(data)
        self._batch_memory += memory
        self._buffers.size += memory

    async def read_at(self, offset: int, length: int) -> bytes:
        """Writes all appended bytes to the file, and returns the `length` bytes at `offset`. Returns fewer bytes if
        the file ends earlier."""
        file = await self._write_out()
        return await self._disk.run(lambda: file.read_at(offset, length))

    async def flush(self) -> Checkpoint:
        """Writes all appended bytes to the file, without syncing it. Returns a checkpoint from which any process can
        continue the session."""
        if self._batch or self._writing or self._file_future:
            await self._write_out()
        state = self._running_digest.save() if self._running_digest else None
        return Checkpoint(self._written, state, self._boot)

    async def verify(self, digest: Digest) -> UploadedContent:
        """Writes all appended bytes to the file. If the file then has the digest `digest`, syncs it and returns an
        object that can publish it as a blob. Otherwise raises DigestInvalid, and keeps the file."""
        await self._finish_write()
        file = await self._open_file()
        running_digest = self._running_digest
        if running_digest is None or running_digest.algorithm != digest.algorithm:
            running_digest = None if self._written else start_digest(digest.algorithm)
        if running_digest is None:
            actual: Digest | None = await self._hash_stored(digest)
        else:
            self._running_digest = running_digest
            self._start_write(file, expected=digest)
            actual = await self._finish_write()
        if actual != digest:
            raise DigestInvalid(
                "the content has another digest; upload it again", {"expected": digest, "actual": actual}
            )
        return UploadedContent(self._disk, file, digest, self._written)

    async def discard(self) -> None:
        """Waits for a running write, and deletes the session's file. Keeps a file that was published as a blob. Raises
        BlobUploadInvalid, and keeps the file, if a newer request has taken the session over."""
        with suppress(StorageFull, StorageFailed):
            await self._finish_write()
        self._writing = None
        self._discard_batch()
        file = await self._open_file()
        await self._disk.run(file.discard)

    def release(self) -> None:
        """Discards the batch, and lets the file be closed once no thread uses it. Does not wait. Written bytes stay in
        the file."""
        self._discard_batch()
        self._close_when_idle()

    async def close(self) -> None:
        """Discards the batch, closes the file in a thread, and waits until the file is closed. Do not call this while a
        write is running."""
        self._discard_batch()
        if self._file_future is not None and self._file_future.done() and not self._file_future.exception():
            fd = self._file_future.result().detach()
            if fd >= 0:
                await self._disk.run(lambda: os.close(fd))

    def _discard_batch(self) -> None:
        """Discards the appended bytes that no thread writes yet."""
        self._buffers.size -= self._batch_memory
        self._batch, self._batch_size, self._batch_memory = [], 0, 0

    def _close_when_idle(self) -> None:
        """Closes the file once no thread uses it. An earlier close would be dangerous: the number of the descriptor
        could pass to another file, and the thread would write into that file."""
        for call in (self._file_future, self._writing):
            if call is not None and not call.done():
                call.add_done_callback(lambda _: self._close_when_idle())
                return
        if self._file_future is not None and not self._file_future.cancelled() and not self._file_future.exception():
            close_without_waiting(self._disk, self._file_future.result(), self._written)

    def _start_write(self, file: UploadFile, expected: Digest | None = None) -> None:
        """Starts writing and hashing the batch in a thread. After the last batch, the thread also computes the digest
        of all bytes, and syncs the file if the digest is the expected one. One call in a thread does all this, because
        each call adds much to the time of a small push.

        `expected`: the expected digest of all bytes, if this batch is the last one. Its algorithm must be that of the
        running digest. None: this batch is not the last one."""
        chunks = [memoryview(piece) if isinstance(piece, bytearray) else piece for piece in self._batch]
        memory, start = self._batch_memory, self._written
        self._written += self._batch_size
        self._batch, self._batch_size, self._batch_memory = [], 0, 0
        running_digest = self._running_digest

        def write() -> Digest | None:
            if chunks:
                self._disk.reserve.require_free_space()
                file.append(chunks, start)
                if running_digest is not None:
                    for chunk in chunks:
                        running_digest.update(chunk)
            if expected is None or running_digest is None:
                return None
            actual = running_digest.digest()
            if actual == expected:
                file.sync()
            return actual

        self._writing = self._disk.run(write)
        self._writing.add_done_callback(lambda _: self._free_buffers(memory))

    async def _hash_stored(self, expected: Digest) -> Digest:
        """Writes all appended bytes to the file. Returns the digest of the file with the algorithm of `expected`. Syncs
        the file if the digest is equal to `expected`."""
        file = await self._write_out()
        running_digest = start_digest(expected.algorithm)
        await self._hasher.hash_into(running_digest, file, 0, self._written)
        actual = running_digest.digest()
        if actual == expected:
            await self._disk.run(file.sync)
        return actual

    def _free_buffers(self, size: int) -> None:
        """Records that `size` bytes of the batches are no longer in memory."""
        self._buffers.size -= size

    async def _finish_write(self) -> Digest | None:
        """Waits for the running write, if there is one. Returns the digest that the write of the last batch has
        computed, otherwise None. After a write has failed, every call raises its error."""
        writing = self._writing
        if writing is None:
            return None
        actual = await wait_for_call(writing)
        if self._writing is writing:
            self._writing = None
        return actual

    async def _write_out(self) -> UploadFile:
        """Waits until all appended bytes are written to the file, and returns the file."""
        await self._finish_write()
        file = await self._open_file()
        if self._batch:
            self._start_write(file)
            await self._finish_write()
        return file

    async def _open_file(self) -> UploadFile:
        """Returns the open file. Creates it if the session has none yet."""
        if self._file_future is None:
            directory = self._disk.layout.upload(self._upload)
            self._file_future = self._disk.run(lambda: UploadFile.create(self._disk.system, directory))
        return await wait_for_call(self._file_future)


class ClaimedUploadFile:
    """An upload session that this process has just taken over, with its file. The caller then resumes, discards or
    releases it. Implements the Protocol `ClaimedUpload`."""

    def __init__(
        self, disk: Disk, buffers: UploadBuffers, hasher: UploadHasher, boot: str, upload: UploadID, file: UploadFile
    ) -> None:
        self._disk = disk
        self._buffers = buffers
        self._hasher = hasher
        self._boot = boot
        self._upload = upload
        self._file = file

    async def resume(self, algorithm: str, checkpoint: Checkpoint) -> FileUploadSession:
        """Returns the session, ready for more bytes. `algorithm`: the digest algorithm of the session.

        Does not read the file if the checkpoint is from the present boot of the machine and covers all bytes of the
        file. Raises BlobUploadUnknown if the file has fewer bytes than a checkpoint of the present boot says. This
        happens if an earlier request has published or deleted the session's file, but has not ended the session. The
        takeover has then created a new, empty file."""
        if checkpoint.boot == self._boot:
            offset = self._file.size()
            checkpoint.check_not_truncated(offset)
            running_digest = await self._continue_digest(algorithm, checkpoint, offset)
        else:
            running_digest, offset = await self._resume_after_reboot(algorithm, checkpoint)
        return FileUploadSession(
            self._disk, self._buffers, self._hasher, self._boot, self._upload, running_digest, self._file, offset
        )

    async def discard(self) -> None:
        """Deletes and closes the session's file. Only closes it if a newer request has taken the session over."""
        try:
            with suppress(BlobUploadInvalid):
                await self._disk.run(self._file.discard)
        finally:
            self._file.close()

    def release(self) -> None:
        """Closes the file without waiting. The bytes stay for the next request that takes the session over."""
        close_without_waiting(self._disk, self._file, self._file.size())

    async def _continue_digest(self, algorithm: str, checkpoint: Checkpoint, size: int) -> RunningDigest | None:
        """Returns the running digest of the file's `size` bytes. Restores the state in the checkpoint, and hashes only
        the bytes after the checkpoint. Returns None in these cases; `FileUploadSession.verify` then hashes all bytes:

        - The state cannot be restored.
        - The file has bytes, and this process cannot save the state of a digest. To continue the digest, each request
          of the session would have to hash all bytes of the file again. `verify` hashes them only once."""
        running_digest = restore_digest(algorithm, checkpoint.state) if checkpoint.offset else start_digest(algorithm)
        if running_digest is None or (size and not can_save_digests()):
            return None
        await self._hasher.hash_into(running_digest, self._file, checkpoint.offset, size)
        return running_digest

    async def _resume_after_reboot(self, algorithm: str, checkpoint: Checkpoint) -> tuple[RunningDigest, int]:
        """Keeps only the bytes of the file that the digest in the checkpoint confirms. Returns their running digest and
        their number. After a reboot, the file may contain garbage, because it was not synced.

        Hashes the bytes that the checkpoint covers, and deletes the bytes after them. If the digest differs from the
        one in the checkpoint, or the checkpoint has no digest, deletes all bytes."""
        running_digest, offset = start_digest(algorithm), checkpoint.offset
        saved = restore_digest(algorithm, checkpoint.state)
        if saved is not None and self._file.size() >= offset:
            await self._hasher.hash_into(running_digest, self._file, 0, offset)
        if saved is None or running_digest.digest() != saved.digest():
            running_digest, offset = start_digest(algorithm), 0
        await self._disk.run(lambda: self._file.truncate(offset))
        return running_digest, offset


class UploadedContent:
    """The synced file of an upload session whose digest was verified. Implements the Protocol `VerifiedContent`.
    `place`: the future path of the blob's file, relative to the data directory."""

    def __init__(self, disk: Disk, file: UploadFile, digest: Digest, size: int) -> None:
        self.digest = digest
        self.size = size
        self.place = disk.layout.blob_place(digest)
        self._disk = disk
        self._file = file

    async def publish(self) -> None:
        """Moves the file durably to `place`. Raises BlobUploadInvalid (a newer request has taken the session over),
        StorageFull, StorageFailed."""
        await self._disk.run(lambda: self._file.publish(self._disk.layout.path_of(self.place)))


def close_without_waiting(disk: Disk, file: UploadFile, size: int) -> None:
    """Closes a session's file of `size` bytes without blocking the event loop for long. A thread closes a file of more
    than `MAX_INLINE_CLOSE_BYTES`, because closing a large file may block (50 to 160 ms for 256 MiB)."""
    fd = file.detach()
    if fd < 0:
        return
    if size > MAX_INLINE_CLOSE_BYTES:
        with suppress(RuntimeError):  # the thread pool has been shut down, so the file is closed below
            disk.threads.submit(os.close, fd)
            return
    os.close(fd)
