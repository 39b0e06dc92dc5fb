"""The blob store that keeps each blob in a separate file (`FileBlobStore`). Implements the Protocol `BlobStore`.

Garbage collection deletes a blob's file in two steps: `FileBlobStore.remove` moves the file to the trash directory, and
`FileBlobStore.reclaim_space` unlinks the files in the trash (`storage.blobs.files.trash`). The *quarantine directory*
keeps the files of blobs whose bytes are damaged.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from storage.blobs.blob_store import UNREADABLE, BytesMissing, ContentCheck, ListedBlob, OnRead, QuarantinedBytes
from storage.blobs.files.cached_reads import CachedOpener, read_cached
from storage.blobs.files.content_check import FileCheck
from storage.blobs.files.file_blob_reader import FileBlobReader, SmallBlobReader, truncated_file_error
from storage.blobs.files.linked_file import LinkedFile
from storage.blobs.files.quarantine import QuarantineDirectory, version_at_path
from storage.blobs.files.trash import Trash
from storage.blobs.files.unreadable_files import (
    DAMAGE_ERRNOS,
    FORBIDDEN_ERRNOS,
    describe_forbidden,
    skip_unreadable,
    warn_unreadable,
)
from storage.blobs.files.upload_file import UploadFile, upload_size
from storage.blobs.files.upload_hashing import UploadHasher
from storage.blobs.files.upload_session import ClaimedUploadFile, FileUploadSession, UploadBuffers
from storage.content import BLOB_TYPE, Descriptor, Span
from storage.data_dir.blocking_calls import as_storage_errors, result_or_close, storage_error
from storage.data_dir.disk import Disk
from storage.data_dir.layout import SHARD_COUNT
from storage.data_dir.system import DISK_FULL_ERRNOS
from storage.errors import BlobUploadInvalid, BlobUploadUnknown, BytesForbidden, DigestInvalid
from storage.future_times import repair_write_time
from storage.names import Digest, UploadID
from storage.running_digest import start_digest

SMALL_BLOB_BYTES = 64 * 1024
"""`open` reads a blob, or a span of a blob, into memory if it has at most this many bytes."""


class FileBlobStore:
    """Stores blobs in the files of a data directory. All processes share the directory. A blob's `place` is the path of
    its file relative to the data directory."""

    def __init__(self, disk: Disk, boot: str) -> None:
        """`boot`: id of the machine's present boot (`boot_id`). Raises OSError."""
        self.boot = boot
        self.shard_count = SHARD_COUNT
        self.layout = disk.layout
        self._disk = disk
        self._opener = CachedOpener(disk.layout.root)
        self._quarantine = QuarantineDirectory(disk.layout, disk.system)
        self._trash = Trash(disk.layout.trash, disk.system)
        self._buffers = UploadBuffers()
        self._hasher = UploadHasher(disk)

    def close(self) -> None:
        """Closes the store's descriptor of the data directory. Does not close blob readers and upload sessions."""
        self._opener.close()

    async def open(self, digest: Digest, size: int, place: str, span: Span | None) -> FileBlobReader | SmallBlobReader:
        """Returns a reader of the bytes in `span` (None: of the whole blob). If these are at most `SMALL_BLOB_BYTES`,
        reads them into memory and closes the blob's file. Otherwise the reader keeps the file open. Opens and reads on
        the event loop if the kernel has the file cached, otherwise in a thread. If this process has no permission to
        read the file, logs a warning (`warn_unreadable`). Raises RangeInvalid, BytesMissing, StorageFailed."""
        offsets = span.to_offsets(size) if span else (0, size)
        descriptor = Descriptor(BLOB_TYPE, digest, size)
        try:
            fd = self._opener.open(place)
            if fd is None:
                fd = await self._open_in_thread(place)
        except FileNotFoundError:
            raise BytesMissing(place) from None
        except OSError as error:
            if error.errno in FORBIDDEN_ERRNOS:
                path = str(self._disk.layout.path_of(place))
                warn_unreadable(path, OSError(error.errno, error.strerror, path))
            raise storage_error(error, f"the file of {digest} cannot be opened") from error
        if offsets[1] - offsets[0] > SMALL_BLOB_BYTES:
            return FileBlobReader(fd, self._disk.threads, descriptor, offsets)
        return SmallBlobReader(await self._read_small(fd, descriptor, offsets), descriptor, offsets)

    async def _open_in_thread(self, place: str) -> int:
        """Opens the file and returns its descriptor. Raises OSError. If this call is cancelled, the file is closed as
        soon as the thread has opened it."""
        path = self._disk.layout.path_of(place)
        flags = os.O_RDONLY | os.O_CLOEXEC
        future = asyncio.get_running_loop().run_in_executor(self._disk.threads, os.open, path, flags)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            future.add_done_callback(_close_opened)
            raise

    async def _read_small(self, fd: int, descriptor: Descriptor, offsets: tuple[int, int]) -> bytes:
        """Reads the bytes between the start and the end offset, and closes `fd`. Raises StorageFailed if the bytes
        cannot be read, or if the file ends before the end offset."""
        start, length = offsets[0], offsets[1] - offsets[0]
        try:
            with as_storage_errors():
                data = read_cached(fd, start, length)
            if data is None:
                data = await self._disk.run(lambda: os.pread(fd, length, start))
        finally:
            os.close(fd)
        if len(data) < length:
            raise truncated_file_error(descriptor, start + len(data))
        return data

    def start_upload(self, upload: UploadID, algorithm: str) -> FileUploadSession:
        """Returns a new upload session. Its first write creates its file. `algorithm`: the digest algorithm of the
        session, such as `sha256`."""
        digest = start_digest(algorithm)
        return FileUploadSession(self._disk, self._buffers, self._hasher, self.boot, upload, digest)

    async def take_over(self, upload: UploadID, check: Callable[[int], None] | None = None) -> ClaimedUploadFile:
        """Takes the session over: the caller becomes its *owner*, and the previous owner may no longer write to it.
        Before the takeover, calls `check` in a thread with the number of stored bytes. If `check` raises an error, the
        previous owner keeps the session, and this call raises the same error. A cancelled call leaves no file open, but
        may have taken the session over. Raises BlobUploadUnknown, StorageFull, StorageFailed."""
        directory = self._disk.layout.upload(upload)

        def check_and_take() -> ClaimedUploadFile:
            if check is not None:
                check(upload_size(directory))
            file = UploadFile.take_over(self._disk.system, directory)
            return ClaimedUploadFile(self._disk, self._buffers, self._hasher, self.boot, upload, file)

        return await result_or_close(self._disk.run(check_and_take), ClaimedUploadFile.release)

    async def upload_size(self, upload: UploadID) -> int:
        """Returns the number of bytes that the session has stored. Returns 0 if the id is unknown, or if the disk
        cannot read the session's directory or file."""
        directory = self._disk.layout.upload(upload)

        def read_size() -> int:
            with skip_unreadable(directory):
                return upload_size(directory)
            return 0

        return await self._disk.run(read_size)

    async def discard_upload(self, upload: UploadID) -> None:
        """Deletes a session's directory and file, even while a request is writing to the session. Keeps both if the
        disk cannot read one of them."""
        directory = self._disk.layout.upload(upload)

        def discard() -> None:
            if _is_upload_readable(directory):
                self._take_over_and_discard(directory)

        await self._disk.run(discard)

    def _take_over_and_discard(self, directory: Path) -> None:
        """Deletes the session in `directory`, if there is one. Raises OSError."""
        if not directory.exists():
            return
        with suppress(BlobUploadInvalid, BlobUploadUnknown):  # another request took over or ended the session
            try:
                file = UploadFile.take_over(self._disk.system, directory)
            except OSError as error:
                if error.errno not in DISK_FULL_ERRNOS:
                    raise
                # The disk is full. If the session has a directory but no file, `take_over` could not create the file.
                # Deleting the empty directory is then enough.
                with suppress(OSError):  # the directory is not empty
                    self._disk.system.rmdir(directory)
                return
            try:
                file.discard()
            finally:
                file.close()

    async def list_uploads(self) -> list[tuple[UploadID, float]]:
        """Returns the sessions that have a directory, and when each last changed (seconds since 1970). Corrects times
        in the future (`repair_write_time`). Leaves out a session if the disk cannot read its directory or file:
        `discard_upload` would keep the session."""

        def scan() -> list[tuple[UploadID, float]]:
            uploads = []
            for entry in os.scandir(self._disk.layout.uploads):
                # The entry may be something else than a session, or may have been deleted meanwhile.
                with suppress(BlobUploadUnknown, FileNotFoundError, NotADirectoryError), skip_unreadable(entry.path):
                    upload, changed_at = UploadID(entry.name), repair_write_time(entry, entry.stat())
                    if _is_upload_readable(Path(entry.path)):
                        uploads.append((upload, changed_at))
            return uploads

        return await self._disk.run(scan)

    def prepare_link(self, fd: int, digest: Digest, size: int) -> LinkedFile:
        """Prepares to store a blob without copying it: as a hard link to the open file `fd`. Before the caller calls
        `publish` of the result, it has to verify the bytes of the file. Raises LinkRefused if the file is not a regular
        file, is on another file system, or can be changed by another user."""
        return LinkedFile(self._disk, fd, digest, size)

    async def remove(self, place: str) -> None:
        """Deletes a blob by moving its file to the trash directory. Does nothing in three cases:

        - `place` is empty. A blob has an empty place if its bytes are missing or damaged.
        - There is no file at `place`.
        - The inode of the file cannot be read.

        Raises DataDirectoryReplaced, and removes nothing, if the path of the data directory no longer leads to the
        directory that this process opened: the file could belong to another data directory."""
        if not place:
            return
        path = self._disk.layout.path_of(place)

        def move_to_trash() -> None:
            self._disk.opened_directory.check()
            self._trash.add(path)

        await self._disk.run(move_to_trash)

    async def reclaim_space(self) -> None:
        """Frees the disk space of deleted blobs: unlinks all files in the trash directory."""
        await self._disk.run(self._trash.empty)

    async def unreclaimed_size(self) -> int:
        """Returns the total size of the files in the trash directory, in bytes."""
        return await self._disk.run(self._trash.size)

    async def stored_sizes(self, places: Sequence[str]) -> list[int | None]:
        """Returns for each place:

        - None if there is no regular file at the place.
        - `UNREADABLE` if the file is damaged, or this process has no permission to open the file.
        - otherwise the size of the file in bytes."""

        def size_at(place: str) -> int | None:
            path = self._disk.layout.path_of(place)
            try:
                status = os.stat(path)
                if not stat.S_ISREG(status.st_mode):
                    return None
                os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            except FileNotFoundError:
                return None
            except OSError as error:
                if error.errno not in DAMAGE_ERRNOS | FORBIDDEN_ERRNOS:
                    raise
                return UNREADABLE
            return status.st_size

        return await self._disk.run(lambda: [size_at(place) for place in places])

    async def list_shard(self, number: int) -> list[ListedBlob]:
        """Returns the blobs in the shard `number` (0 to `shard_count` - 1). A *shard* is one of the directories that
        contain the blob files. If the inode of a file cannot be read, logs a warning (`skip_unreadable`), and returns
        the blob with the size `UNREADABLE`. If this process has no permission to list the directory, logs a warning and
        raises BytesForbidden. Raises StorageFailed."""
        path = self._disk.layout.shard(number)
        algorithm = path.parent.name

        def scan() -> list[ListedBlob]:
            blobs: list[ListedBlob] = []
            try:
                entries = list(os.scandir(path))
            except OSError as error:
                if error.errno not in FORBIDDEN_ERRNOS:
                    raise
                warn_unreadable(path, error)
                raise BytesForbidden(describe_forbidden(path, error)) from error
            for entry in entries:
                # The entry may be something else than a blob file, or may have been deleted meanwhile.
                with suppress(DigestInvalid, FileNotFoundError):
                    digest = Digest(f"{algorithm}:{entry.name}")
                    written, size = 0.0, UNREADABLE
                    with skip_unreadable(entry.path):
                        status = entry.stat()
                        written, size = status.st_mtime, status.st_size
                    blobs.append(ListedBlob(digest, self._disk.layout.blob_place(digest), written, size))
            return blobs

        return await self._disk.run(scan)

    async def check(
        self, digest: Digest, size: int, place: str, on_read: OnRead, *, from_disk: bool = False
    ) -> ContentCheck:
        """Checks the blob's file against `digest` and `size`. Reads the file in parts, in a thread, and calls `on_read`
        after each part. `from_disk`: whether to read all bytes from the disk, even if the kernel has them cached.
        Raises BytesMissing, BytesForbidden, StorageFailed, and the errors of `on_read`."""
        file_check = FileCheck(self._disk.layout.path_of(place), digest, size, from_disk=from_disk)
        try:
            while count := await self._disk.run(file_check.read_part):
                await on_read(count)
            return ContentCheck(file_check.problem, file_check.version)
        finally:
            file_check.close()

    async def version(self, place: str) -> str | None:
        """Returns a text that changes when the file at `place` is replaced or written to (`version_at_path`). Returns
        None if there is no file."""
        return await self._disk.run(lambda: version_at_path(self._disk.layout.path_of(place)))

    def quarantine_place(self, digest: Digest) -> str:
        """Returns the path, relative to the data directory, to which `quarantine` moves the blob's file."""
        return self._disk.layout.quarantine_place(digest)

    async def quarantine(self, digest: Digest, place: str) -> None:
        """Moves the blob's file into the quarantine directory. If the disk is too full for a new directory entry,
        deletes the file."""
        await self._disk.run(lambda: self._quarantine.take_in(digest, place))

    async def list_quarantine(self) -> list[QuarantinedBytes]:
        """Returns the files of the quarantine directory, oldest first."""
        return await self._disk.run(self._quarantine.entries)

    async def delete_quarantined(self, digest: Digest) -> bool:
        """Unlinks the file with the damaged bytes of a blob. Returns whether there was such a file."""
        return await self._disk.run(lambda: self._quarantine.delete(digest))


def _is_upload_readable(directory: Path) -> bool:
    """Returns whether the inodes of a session's directory and file can be read; if not, logs a warning."""
    with skip_unreadable(directory):
        upload_size(directory)
        return True
    return False


def _close_opened(future: asyncio.Future[int]) -> None:
    """Closes the file whose descriptor is the result of `future`, unless opening it failed."""
    if not future.cancelled() and future.exception() is None:
        os.close(future.result())
