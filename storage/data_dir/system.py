"""The system calls that change files, as methods of one class (`System`).

All code in `storage` that creates, writes, syncs, renames or deletes files calls the methods of a `System`. Each commit
of a metadata transaction goes through `System.commit`. To check which changes survive a crash, a test can pass a
subclass that records the calls, kills the process before a certain call, or makes a call fail.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

SYNC_FILE_RANGE_WRITE = 2
"""Flag of sync_file_range(2): start to write the dirty pages to the disk, and do not wait."""
_FICLONE = 0x40049409
"""The request of ioctl_ficlone(2)."""
DISK_FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Values of `errno` that are treated as a full disk: no free space, a used-up quota, and a file larger than its file
system allows."""


class System:
    """The real system calls. All methods block. They raise OSError, except `start_writeback`, which ignores errors."""

    def __init__(self) -> None:
        self._start_writeback = _load_sync_file_range()

    def open(self, path: Path, flags: int, mode: int = 0o640) -> int:
        """Opens the file and returns its descriptor. Child programs do not inherit the descriptor. `mode`: permissions
        of the file if this call creates it."""
        return os.open(path, flags | os.O_CLOEXEC, mode)

    def write(self, fd: int, chunks: Sequence[bytes | memoryview], offset: int) -> int:
        """Writes the chunks one after another, the first one at `offset`. Returns the number of bytes written, which
        can be less than the length of all chunks."""
        return os.pwritev(fd, chunks, offset)

    def truncate(self, fd: int, size: int) -> None:
        """Sets the length of the file to `size` bytes."""
        os.ftruncate(fd, size)

    def allocate(self, fd: int, size: int) -> None:
        """Allocates disk space for the first `size` bytes of the file, and extends a shorter file to `size` bytes."""
        os.posix_fallocate(fd, 0, size)

    def sync(self, fd: int) -> None:
        """Makes the bytes of a file, or the entries of a directory, durable."""
        os.fsync(fd)

    def start_writeback(self, fd: int, offset: int, length: int) -> None:
        """Asks the kernel to start writing the `length` bytes at `offset` to the disk, and does not wait until they are
        written. Makes nothing durable: it only shortens a later fsync."""
        if self._start_writeback is not None:
            self._start_writeback(fd, offset, length, SYNC_FILE_RANGE_WRITE)

    def rename(self, source: Path, target: Path) -> None:
        """Moves a file. Replaces an existing file at `target`."""
        os.rename(source, target)

    def link(self, fd: int, target: Path) -> None:
        """Gives the open file another name, a hard link. Raises OSError also if the file system has no hard links, or
        if `target` is on another file system."""
        # `/proc/self/fd/…` is a symbolic link. Without the argument `src_dir_fd`, `os.link` would not follow the link.
        # The value of `src_dir_fd` has no effect: the kernel ignores it, because the path is absolute.
        os.link(f"/proc/self/fd/{fd}", target, src_dir_fd=fd, follow_symlinks=True)

    def clone(self, source_fd: int, fd: int) -> None:
        """Makes the empty file `fd` a copy of `source_fd` (ioctl_ficlone(2)). The two files share their blocks on the
        disk until one of the files is changed. Raises OSError also if the file system cannot share blocks."""
        fcntl.ioctl(fd, _FICLONE, source_fd)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def mkdir(self, path: Path) -> None:
        os.mkdir(path, 0o750)

    def rmdir(self, path: Path) -> None:
        os.rmdir(path)

    def commit(self, execute_commit: Callable[[], None], *, durable: bool) -> None:
        """Calls `execute_commit`, which commits a metadata transaction. `durable`: whether `execute_commit` syncs the
        database's log. Only subclasses in tests use `durable`, to simulate a power cut."""
        execute_commit()


def _load_sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """Returns the C function sync_file_range(2), or None if the C library does not have it."""
    try:
        call = ctypes.CDLL(None, use_errno=True).sync_file_range
    except (OSError, AttributeError):
        return None
    call.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    call.restype = ctypes.c_int
    return cast("Callable[[int, int, int, int], int]", call)


def boot_id() -> str:
    """Returns the id of the machine's present boot, a UUID that changes with each boot. Returns an empty string if the
    id cannot be read. If the id has changed since bytes were written without a sync, these bytes may be lost."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
