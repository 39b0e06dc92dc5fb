"""The system calls that decide what survives a crash (`System`).

All code in `storage` that creates, writes, syncs, renames or deletes files calls a `System`, and so does the commit of
a metadata transaction. Tests pass one that records the calls, stops before one of them, or lets one fail.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

SYNC_FILE_RANGE_WRITE = 2
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Errors for a full disk, a used-up quota, and a file that would be too large."""


class System:
    """The real calls. All block and raise OSError."""

    def __init__(self) -> None:
        self._start_writeback = _sync_file_range()

    def open(self, path: Path, flags: int, mode: int = 0o640) -> int:
        return os.open(path, flags | os.O_CLOEXEC, mode)

    def write(self, fd: int, chunks: Sequence[bytes | memoryview], offset: int) -> int:
        """Writes at `offset`, and returns the number of bytes written, which may be less than given."""
        return os.pwritev(fd, chunks, offset)

    def truncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def allocate(self, fd: int, size: int) -> None:
        """Allocates disk space for the first `size` bytes of the file, and extends a shorter file to that length."""
        os.posix_fallocate(fd, 0, size)

    def sync(self, fd: int) -> None:
        os.fsync(fd)

    def start_writeback(self, fd: int, offset: int, length: int) -> None:
        """Asks the kernel to start writing these bytes to the disk, without waiting, so that the fsync at the end of a
        large upload has little left to do. Guarantees nothing."""
        if self._start_writeback is not None:
            self._start_writeback(fd, offset, length, SYNC_FILE_RANGE_WRITE)

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def mkdir(self, path: Path) -> None:
        os.mkdir(path, 0o750)

    def rmdir(self, path: Path) -> None:
        os.rmdir(path)

    def commit(self, commit: Callable[[], None], *, durable: bool) -> None:
        """Commits a metadata transaction. `durable`: the commit syncs the database's log."""
        commit()


def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    try:
        call = ctypes.CDLL(None, use_errno=True).sync_file_range
    except (OSError, AttributeError):
        return None
    call.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    call.restype = ctypes.c_int
    return cast("Callable[[int, int, int, int], int]", call)


def boot_id() -> str:
    """Returns a name for this run of the machine; empty if unknown. Bytes that another run left in the page cache may
    be lost."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
