"""Reads and hashes the file of a blob in parts, to check that its bytes still have the blob's digest (`FileCheck`)."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path
from typing import Final

from storage.blobs.blob_store import BytesMissing
from storage.blobs.files.quarantine import version_at_path, version_of_status
from storage.blobs.files.unreadable_files import DAMAGE_ERRNOS, FORBIDDEN_ERRNOS, describe_forbidden
from storage.data_dir.mapped_file import MappedFile
from storage.errors import BytesForbidden
from storage.names import Digest
from storage.running_digest import start_digest

PART_BYTES: Final = 1024 * 1024
"""Largest part that `FileCheck.read_part` reads. Reading this part takes a few milliseconds."""


class FileCheck:
    """The check of one file. Call `read_part` until it returns 0. Then `problem` says what is wrong with the file;
    None: nothing is wrong. `version` identifies the file by its device, inode number, modification time and size, which
    `version_of_status` takes from the result of `os.fstat`. All methods block.

    Clients often pull the same blobs, and these blobs must stay in the page cache. So each read of a part drops the
    pages that it has loaded into the page cache. Read-ahead is off, because the check could not tell pages that were
    read ahead from pages that were in the page cache before."""

    def __init__(self, path: Path, digest: Digest, size: int, *, from_disk: bool) -> None:
        """`from_disk`: whether all bytes must come from the disk, not from the page cache."""
        self.problem: str | None = None
        self.version = ""
        self._path = path
        self._digest = digest
        self._size = size
        self._from_disk = from_disk
        self._running_digest = start_digest(digest.algorithm)
        self._offset = 0
        self._fd = -1
        self._has_ended = False
        self._buffer = bytearray()

    def close(self) -> None:
        """Closes the file. May be called more than once."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read_part(self) -> int:
        """Reads and hashes the next part. Returns the number of bytes; 0: the check has ended. Raises:

        - BytesMissing if there is no file.
        - StorageFailed if the file's directory is missing.
        - BytesForbidden if this process may not open the file.
        - OSError if reading fails for another reason than damage."""
        if self._has_ended:
            return 0
        if self._fd < 0:
            self._open()
        if self._has_ended:
            return 0
        view = memoryview(self._buffer)[: min(PART_BYTES, self._size - self._offset)]
        try:
            count = self._read(view)
        except OSError as error:
            if error.errno not in DAMAGE_ERRNOS:
                raise
            self._end(f"its bytes after the first {self._offset} cannot be read: {error.strerror}")
            return 0
        self._running_digest.update(view[:count])
        self._offset += count
        if count < len(view):  # the file was truncated after it was opened
            self._end(f"its file ends after {self._offset} of {self._size} bytes")
        elif self._offset == self._size:
            actual = self._running_digest.digest()
            self._end(None if actual == self._digest else f"its bytes have the digest {actual}")
        return count

    def _open(self) -> None:
        """Opens the file and sets `version`. Ends the check if the file is damaged or empty. Raises BytesMissing,
        StorageFailed, BytesForbidden, OSError."""
        try:
            self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            version_at_path(self._path)  # raises StorageFailed if the directory is missing too
            raise BytesMissing(str(self._path)) from None
        except OSError as error:
            if error.errno in FORBIDDEN_ERRNOS:
                raise BytesForbidden(describe_forbidden(self._path, error)) from error
            if error.errno not in DAMAGE_ERRNOS:
                raise
            self._end(f"its file cannot be opened: {error.strerror}")
            self.version = version_at_path(self._path) or ""
            return
        status = os.fstat(self._fd)
        self.version = version_of_status(status)
        if status.st_size != self._size:
            self._end(f"its file has {status.st_size} bytes instead of {self._size}")
            return
        self._buffer = bytearray(min(PART_BYTES, self._size))
        if self._from_disk:
            self._advise(os.POSIX_FADV_DONTNEED)
        self._advise(os.POSIX_FADV_RANDOM)  # no read-ahead
        if not self._size:
            actual = self._running_digest.digest()
            self._end(None if actual == self._digest else f"its file is empty and has the digest {actual}")

    def _end(self, problem: str | None) -> None:
        """Ends the check. `problem`: what is wrong with the file; None: nothing is wrong."""
        self.problem = problem
        self._has_ended = True

    def _read(self, view: memoryview) -> int:
        """Fills `view` with the next bytes, and returns their number. Drops the pages that the call has loaded into the
        page cache."""
        resident_prefix = self._resident_prefix(len(view))
        count = 0
        while count < len(view):
            read_count = os.preadv(self._fd, [view[count:]], self._offset + count)
            if not read_count:
                break
            count += read_count
        if count > resident_prefix:
            # The range can contain a few pages that were in the page cache before. They are dropped as well.
            start, length = self._offset + resident_prefix, count - resident_prefix
            os.posix_fadvise(self._fd, start, length, os.POSIX_FADV_DONTNEED)
        return count

    def _resident_prefix(self, length: int) -> int:
        """Returns how many bytes from `_offset` are in the page cache without a gap, at most `length` bytes."""
        if (mapped := MappedFile.try_map(self._fd, self._offset, self._offset + length)) is None:
            return 0
        with closing(mapped):
            return mapped.resident_prefix(self._offset, self._offset + length)

    def _advise(self, advice: int) -> None:
        os.posix_fadvise(self._fd, 0, 0, advice)
