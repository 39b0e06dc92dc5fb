"""A stored registry's upload session while one request owns it (`BlobWriter`).

What arrives is gathered to two mebibytes, then written and digested in a thread while the next ones are gathered: the
event loop never waits for the disk, and one upload holds two such pieces at the most.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from storage.blobs.files.file_blob_store import FileBlobStore
from storage.blobs.files.upload_file import UploadFile
from storage.content import BLOB_TYPE, Descriptor
from storage.data_dir.blocking_calls import wait_for_call
from storage.errors import (
    BlobUploadInvalid,
    BlobUploadUnknown,
    DigestInvalid,
    RegistryError,
    StorageFailed,
    StorageFull,
)
from storage.metadata.catalog import Metadata, UploadRow
from storage.names import Digest, RepositoryName, UploadID
from storage.running_digest import RunningDigest, restore_digest, start_digest
from storage.store.publication import publish

BATCH_BYTES = 2 * 1024 * 1024
"""Bytes that are written and hashed in one step. Going to the thread and back costs about a tenth of what a mebibyte
does; an upload holds twice as much in memory: what is on its way to the file, and what comes meanwhile."""
BUFFERED_BYTES_LIMIT = 32 * 1024 * 1024
"""Bytes that all uploads of a process hold, from which on each writes what it has at every `SMALL_BATCH_BYTES`."""
SMALL_BATCH_BYTES = 64 * 1024
SAVE_EVERY = 64 * 1024 * 1024
"""Bytes after which a session's progress is saved while a request is still sending: what a successor has to read again
at the most."""
log = logging.getLogger("storage")


class StoredUpload:
    """Made by `StoredRegistry.start_upload` and `resume_upload`."""

    def __init__(
        self,
        blobs: FileBlobStore,
        metadata: Metadata,
        boot: str,
        row: UploadRow,
        running: RunningDigest,
        file: UploadFile | None = None,
        offset: int = 0,
    ) -> None:
        self.id: UploadID = row.id
        self.repository: RepositoryName = row.repository
        self._blobs = blobs
        self._metadata = metadata
        self._boot = boot
        self._running = running
        self._opening: asyncio.Future[UploadFile] | None = None
        if file is not None:
            self._opening = asyncio.get_running_loop().create_future()
            self._opening.set_result(file)
        self._gathered: list[bytes | memoryview] = []
        self._gathered_size = 0
        self._written = offset
        self._saved = row.offset if row.boot == boot else -1
        self._flight: asyncio.Future[Digest | None] | None = None
        self._closing: asyncio.Future[Descriptor] | None = None
        self._ended = False

    @property
    def offset(self) -> int:
        return self._written + self._gathered_size

    async def write(self, data: bytes | memoryview) -> None:
        self._check_open()
        self._gathered.append(data)
        self._gathered_size += len(data)
        self._blobs.held += len(data)
        crowded = self._blobs.held > BUFFERED_BYTES_LIMIT
        if self._gathered_size >= (SMALL_BATCH_BYTES if crowded else BATCH_BYTES):
            await self._land()
            self._launch(await self._own_file())
            if crowded:
                await self._land()
            if self._written - max(self._saved, 0) >= SAVE_EVERY:
                await self._land()
                await self._save()

    async def read_at(self, offset: int, length: int) -> bytes:
        self._check_open()
        file = await self._flush()
        return await self._blobs.run(lambda: file.read_at(offset, length))

    async def commit(self, digest: Digest) -> Descriptor:
        """The session ends here, whatever happens to the request that asked for it."""
        self._check_open()
        self._closing = asyncio.ensure_future(self._commit(digest))
        return await asyncio.shield(self._closing)

    async def _commit(self, digest: Digest) -> Descriptor:
        try:
            await self._land()
            file = await self._own_file()
            self._launch(file, digest)
            actual, size = await self._land(), self._written
            if actual != digest:
                await self._cancel()
                raise DigestInvalid(
                    "the content has another digest; the upload was dropped", {"expected": digest, "actual": actual}
                )
            await self._publish(file, digest, size)
        except (StorageFull, StorageFailed):
            # After a failed fsync the kernel forgets which bytes never reached the disk: they cannot be trusted again.
            await self._give_up()
            raise
        self._ended = True
        self._blobs.let_go(file, size)
        return Descriptor(BLOB_TYPE, digest, size)

    async def _publish(self, file: UploadFile, digest: Digest, size: int) -> None:
        async def add(place: str) -> None:
            await self._metadata.add_blob(self.repository, digest, size, place, self.id)

        await publish(self._blobs, self._metadata, file, digest, add)

    def _digest(self, file: UploadFile, algorithm: str, size: int) -> Digest:
        """Computed while the bytes came; read again only where the client did not declare this algorithm first."""
        if algorithm == self._running.algorithm:
            return self._running.digest()
        other = start_digest(algorithm)
        for piece in file.pieces(0, size):
            other.update(piece)
        return other.digest()

    async def cancel(self) -> None:
        if self._closing is not None:
            await asyncio.wait([self._closing])
        await self._cancel()

    async def _cancel(self) -> None:
        if self._ended:
            return
        with suppress(StorageFailed):
            await self._land()
        file = await self._own_file()
        await self._blobs.run(file.discard)
        self._ended = True
        await self._blobs.free(file)
        with suppress(BlobUploadUnknown):
            await self._metadata.end_upload(self.id)
        # A request that was on its way may have taken the session over between the two; from here on none can.
        await self._blobs.discard(self.id)

    async def aclose(self) -> None:
        try:
            if self._closing is not None:
                await asyncio.wait([self._closing])
            if not self._ended and (self._gathered or self._flight or self._opening):
                await self._flush()
                await self._save()
        except StorageFull:
            await self._give_up()
            raise
        finally:
            self._ended = True
            self._let_go_of(self._gathered_size)
            self._gathered, self._gathered_size = [], 0
            self._let_go()

    def _let_go(self) -> None:
        """Closes the file once nothing works on it any more: by the time a thread writes to a number that was closed,
        it may be another file's."""
        for work in (self._opening, self._flight, self._closing):
            if work is not None and not work.done():
                work.add_done_callback(lambda _: self._let_go())
                return
        if self._opening is not None and not self._opening.cancelled() and not self._opening.exception():
            self._blobs.let_go(self._opening.result(), self._written)

    def _check_open(self) -> None:
        if self._ended:
            raise BlobUploadInvalid("the upload session has ended")

    def _launch(self, file: UploadFile, expected: Digest | None = None) -> None:
        """Starts writing what was gathered; `expected`: as the last of the content, which is synced if that is its
        digest. All in one step: for a small blob, waiting for threads is most of the work."""
        chunks, at = self._gathered, self._written
        end = at + self._gathered_size
        self._gathered, self._gathered_size, self._written = [], 0, end

        def step() -> Digest | None:
            if chunks:
                self._blobs.reserve.require_room()
                file.append(chunks, at)
                for chunk in chunks:
                    self._running.update(chunk)
            if expected is None:
                return None
            actual = self._digest(file, expected.algorithm, end)
            if actual == expected:
                file.sync()
            return actual

        self._flight = self._blobs.run(step)
        self._flight.add_done_callback(lambda _: self._let_go_of(end - at))

    def _let_go_of(self, size: int) -> None:
        self._blobs.held -= size

    async def _land(self) -> Digest | None:
        """Waits for what is being written. What went wrong there is raised by each later call again."""
        flight = self._flight
        if flight is None:
            return None
        try:
            actual = await wait_for_call(flight)
        except StorageFull:
            await self._give_up()
            raise
        if self._flight is flight:
            self._flight = None
        return actual

    async def _flush(self) -> UploadFile:
        await self._land()
        file = await self._own_file()
        if self._gathered:
            self._launch(file)
            await self._land()
        return file

    async def _own_file(self) -> UploadFile:
        if self._opening is None:
            self._opening = self._blobs.create(self.id)
        return await wait_for_call(self._opening)

    async def _save(self) -> None:
        if self._written != self._saved:
            await self._metadata.save_upload(self.id, self._written, self._running.save(), self._boot)
            self._saved = self._written

    async def _give_up(self) -> None:
        """The disk is full: the session's bytes are the first thing to let go, so that other pushes can work."""
        self._let_go_of(self._gathered_size)
        self._flight, self._gathered, self._gathered_size = None, [], 0
        try:
            await self._cancel()
        except BlobUploadInvalid:
            pass
        except RegistryError as error:
            log.warning("upload %s could not be dropped from the full disk: %s", self.id, error)


async def resume(
    blobs: FileBlobStore,
    metadata: Metadata,
    boot: str,
    repo: RepositoryName,
    upload_id: UploadID,
    check_before: Callable[[int], None] | None,
    check: Callable[[int], None],
) -> StoredUpload:
    """Takes the session over and its digest up again. Both checks are given the offset and may refuse it by raising,
    the first one before anybody loses the session. Raises BlobUploadUnknown."""
    file = await blobs.take_over(upload_id, check_before)
    try:
        # Read once the session is ours: whoever had it may have saved more, or ended it, until then.
        row = await metadata.upload(repo, upload_id)
        taken = _resume_from_row(file, row) if row.boot == boot else None
        if taken is None:
            taken = await blobs.run(lambda: _resume_from_bytes(file, row, same_boot=row.boot == boot))
        running, offset = taken
        upload = StoredUpload(blobs, metadata, boot, row, running, file, offset)
        if row.boot != boot:
            await metadata.save_upload(row.id, offset, running.save(), boot)
        check(offset)
    except BlobUploadUnknown:
        # What was taken over is an empty session nobody knows of.
        with suppress(BlobUploadInvalid):
            await blobs.run(file.discard)
        file.close()
        raise
    except BaseException:
        blobs.let_go(file, file.size())
        raise
    return upload


def _resume_from_row(file: UploadFile, row: UploadRow) -> tuple[RunningDigest, int] | None:
    """The session's digest and offset where its row says it all, as it mostly does; None where bytes must be read."""
    if file.size() != row.offset:
        return None
    running = restore_digest(row.algorithm, row.state) if row.offset else start_digest(row.algorithm)
    return (running, row.offset) if running else None


def _resume_from_bytes(file: UploadFile, row: UploadRow, *, same_boot: bool) -> tuple[RunningDigest, int]:
    """The session's digest and offset.

    Written under this run of the machine, all bytes in the file are there: those the saved state does not cover are
    read again. Where there are fewer, a commit took the file and was stopped before the row went, and the session with
    it: BlobUploadUnknown. Under an earlier run, only what the state covers can be told from garbage, by computing it
    anew; if that differs (or no state was kept), the session starts over.
    """
    size = file.size()
    if same_boot:
        check_not_truncated(row, size)
        running, covered = restore_digest(row.algorithm, row.state), row.offset
        if running is None:
            running, covered = start_digest(row.algorithm), 0
        for piece in file.pieces(covered, size):
            running.update(piece)
        return running, size
    running = start_digest(row.algorithm)
    for piece in file.pieces(0, row.offset):
        running.update(piece)
    saved = restore_digest(row.algorithm, row.state)
    if saved is not None and size >= row.offset and running.digest() == saved.digest():
        file.cut(row.offset)
        return running, row.offset
    file.restart()
    return start_digest(row.algorithm), 0


def check_not_truncated(row: UploadRow, size: int) -> None:
    """Raises BlobUploadUnknown where the session has fewer bytes than its row says."""
    if size < row.offset:
        raise BlobUploadUnknown()
