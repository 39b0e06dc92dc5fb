"""The system calls that decide what survives a crash, in one place.

Everything in `storage` that creates, writes, syncs, renames or removes goes through a `System`, and so does the commit
of a metadata transaction. Tests hand in one that records the steps, stops before one of them, or lets one fail.
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
"""Errors that mean no room: the disk is full, the quota is used up, the file would be too large."""


class System:
    """The real calls. All of them block; errors are OSError."""

    def __init__(self) -> None:
        self._start_writeback = _sync_file_range()

    def open(self, path: Path, flags: int, mode: int = 0o640) -> int:
        return os.open(path, flags | os.O_CLOEXEC, mode)

    def write(self, fd: int, chunks: Sequence[bytes | memoryview], offset: int) -> int:
        """Writes at `offset`; returns the count of bytes taken, which may be fewer than given."""
        return os.pwritev(fd, chunks, offset)

    def truncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def allocate(self, fd: int, size: int) -> None:
        """Gives the file room for its first `size` bytes, and that length if it was shorter."""
        os.posix_fallocate(fd, 0, size)

    def sync(self, fd: int) -> None:
        os.fsync(fd)

    def start_writeback(self, fd: int, offset: int, length: int) -> None:
        """Asks the kernel to begin writing these bytes to the disk, and does not wait: the fsync at the end of a large
        upload then has little left to do. Promises nothing."""
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
        """Runs the commit of a metadata transaction; `durable`: it is one that syncs the database's log."""
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
    """Names this run of the machine: what was only in the page cache under another one may be gone."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
