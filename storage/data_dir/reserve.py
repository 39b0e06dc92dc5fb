"""The disk reserve: disk space that stays allocated, so that content can be deleted when the disk is full (`Reserve`).

A delete needs free space, because it writes to the database's log before it frees any space. Opening the database also
needs free space, for the index of the log. The reserve is a file of up to `RESERVE_BYTES` bytes. On a full disk, a
delete truncates this file, writes its changes, and then extends the file again as far as there is space. While the file
is shorter than its full size, pushes and mirror downloads get StorageFull: they must not use the space that deletes
need.

The length of this file is the only state of the reserve that the processes share. If a process dies after it has
truncated the file, the next call of `restore` in any process extends the file again.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Final, TypeVar

from storage.data_dir.locks import Flock, try_flock, unlock_flock
from storage.data_dir.system import System
from storage.errors import StorageFull
from storage.human_text import size_text

RESERVE_BYTES: Final = 16 * 1024 * 1024
"""Full size of the reserve, except on a small file system. The largest known need is 7 MiB, for the database's log when
a manifest with 25,000 entries is deleted."""
MAX_FILE_SYSTEM_FRACTION: Final = 1 / 16
"""Largest fraction of the file system that the reserve may take up. On a file system smaller than 256 MiB, the
reserve is therefore smaller than `RESERVE_BYTES`."""
FIRST_RELEASE_BYTES: Final = 256 * 1024
"""Bytes that `spend` frees before its first attempt: enough for most changes, and for opening the database."""
BLOCK_BYTES: Final = 4096
"""The block size of most file systems. If there is not enough space for the full size, the reserve grows by a multiple
of this size."""
FULL_DISK_FREE_BYTES: Final = 1024 * 1024
"""If fewer bytes are free, `disk_full_reason` reports a full disk. On a small file system, the full size of the reserve
can be smaller than this number. The limit is then the full size of the reserve."""
FULL_DISK_FREE_INODES: Final = 16
"""If fewer inodes are free, `disk_full_reason` reports a full disk."""
_UNSUPPORTED_ERRNOS: Final = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
"""Error numbers of a file system that cannot allocate space for a file before data is written."""
_FULL_DISK: Final = "the disk is full: nothing new is stored until there is room again; reads and deletes work"
log = logging.getLogger("storage")
T = TypeVar("T")


class ReserveUse(IntEnum):
    """How much of the reserve a metadata change may use."""

    NONE = 0
    """For changes that store content. They are refused while the reserve is smaller than its full size."""
    HALF = 1
    """For changes that store a small row, such as a grant or the record of a failed login. They are refused while the
    reserve is smaller than half of its full size."""
    ALL = 2
    """For changes that free space, revoke rights or change a secret. They are always tried."""


@dataclass(frozen=True, slots=True)
class MinFreeSpace:
    """The space on the disk that has to stay free in addition to the reserve: the greater of `size` (in bytes) and
    `percent` percent of the file system. Clients cannot push if less space is free. If both values are 0, clients can
    push until the disk is full."""

    size: int = 0
    percent: float = 0.0

    def required_bytes(self, file_system_bytes: int) -> int:
        """Returns how many bytes must stay free on a file system of this size."""
        return max(self.size, int(file_system_bytes * self.percent / 100))

    def __str__(self) -> str:
        limits = [size_text(self.size)] if self.size else []
        return " or ".join([*limits, *([f"{self.percent:g} %"] if self.percent else [])])


class Reserve:
    """The reserve of one data directory. Any thread may call the methods. All of them make system calls. `establish`
    and `spend` also wait for other threads and processes that use the reserve. `close` waits only for other threads of
    this process."""

    def __init__(self, path: Path, system: System, min_free: MinFreeSpace | None = None) -> None:
        """Opens the reserve's file `path` if it exists; `establish` creates it. `min_free`: how much of the disk must
        stay free in addition to the reserve; None: nothing. Raises OSError."""
        self._path = path
        self._directory = str(path.parent)
        self._system = system
        self._min_free = min_free
        self._fd = -1
        self._lock = threading.Lock()
        self._can_allocate = True
        """False after an error has shown that the file system cannot allocate space before data is written."""
        self.full_size = _full_size_on(self._directory)
        """The full size of the reserve in bytes."""
        self._open()

    def close(self) -> None:
        """Closes the file. The reserve stays on the disk."""
        with self._lock:
            fd, self._fd = self._fd, -1
            if fd >= 0:
                os.close(fd)

    def establish(self) -> None:
        """Creates the file if it is missing, and allocates its full size, or as much as there is space for. Does not
        raise if the disk is full: `restore` completes the reserve when space has become free."""
        with suppress(OSError):
            self._open(os.O_CREAT)
        if self._fd < 0:
            return
        with self._locked():
            with suppress(OSError):
                # In a copy of a data directory, the file may be sparse: it has a length, but takes up no disk space.
                if length := self._length():
                    self._system.allocate(self._fd, length)
            self._extend()

    @property
    def is_whole(self) -> bool:
        """Whether the reserve has its full size. Also True if the file system cannot allocate space before data is
        written: otherwise, pushes would never be possible."""
        return not self._can_allocate or (self._fd >= 0 and os.fstat(self._fd).st_size >= self.full_size)

    def allows(self, reserve_use: ReserveUse) -> bool:
        """Returns whether a change may be tried now. `reserve_use`: how much of the reserve the change may use. If the
        reserve is smaller than its full size, first tries to restore it."""
        if self.is_whole or self.restore():
            return True
        return reserve_use is ReserveUse.ALL or (
            reserve_use is ReserveUse.HALF and self._length() >= self.full_size // 2
        )

    def require_free_space(self, *, may_use_min_free: bool = False, size: int = 0) -> None:
        """Call this before you store `size` bytes of new content. Raises StorageFull in two cases:

        - The reserve is smaller than its full size, and cannot be restored now.
        - Less of the disk would stay free than `MinFreeSpace` requires. `may_use_min_free` skips this check. Set it for
          content that has already passed the check.
        """
        if not self.allows(ReserveUse.NONE):
            raise StorageFull()
        if not may_use_min_free and (reason := self.low_disk_reason(size)) is not None:
            raise StorageFull(reason)

    def free_bytes(self) -> int | None:
        """Returns the free bytes of the file system; None if its state cannot be read."""
        try:
            file_system = os.statvfs(self._directory)
        except OSError:
            return None
        return file_system.f_bavail * file_system.f_frsize

    def low_disk_reason(self, size: int = 0) -> str | None:
        """Returns a sentence for the operator if `size` more bytes would leave less free space on the disk than
        `MinFreeSpace` requires. Returns None if enough would stay free, or if the state of the file system cannot be
        read."""
        if self._min_free is None:
            return None
        try:
            file_system = os.statvfs(self._directory)
        except OSError:
            return None
        free_bytes = file_system.f_bavail * file_system.f_frsize
        if free_bytes - size >= self._min_free.required_bytes(file_system.f_blocks * file_system.f_frsize):
            return None
        return (
            f"the disk is almost full: less than {self._min_free} would stay free (the settings in [disk]). Nothing "
            "new is stored until there is more room; pulls and deletes work"
        )

    def restore(self) -> bool:
        """Creates the file if it is missing, extends it as far as there is space, and returns whether the reserve then
        has its full size. Never waits: returns False if another thread or process is using the reserve."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            with suppress(OSError):
                self._open(os.O_CREAT)
                if self._fd >= 0 and try_flock(self._fd):
                    try:
                        self._extend()
                    finally:
                        unlock_flock(self._fd)
                    return self.is_whole
            return False
        finally:
            self._lock.release()

    def spend(self, attempt: Callable[[], T], full_error: type[Exception]) -> T:
        """Frees a part of the reserve, calls `attempt`, and returns its result. If `attempt` raises `full_error`, which
        means that the disk is full, frees more of the reserve and calls `attempt` again. The third call can use the
        whole reserve, and its exception is raised. At the end, extends the file again. Frees little at first, because
        another program on the machine may use up the freed space.

        If there is no reserve, or if the file system cannot allocate space before data is written, frees nothing and
        calls `attempt` once."""
        if self._fd < 0 or not self._can_allocate:
            return attempt()
        with self._locked():
            try:
                for part_bytes in (FIRST_RELEASE_BYTES, self.full_size // 8):
                    self._release_bytes(part_bytes)
                    with suppress(full_error):
                        return attempt()
                self._release_bytes(self.full_size)
                return attempt()
            finally:
                self._extend()

    def disk_full_reason(self) -> str | None:
        """Returns a sentence for the operator if the disk is too full to store content now. Returns None if content can
        be stored, or if the state of the file system cannot be read. Does not wait for other threads or processes."""
        if self._fd >= 0 and not self.is_whole:
            return _FULL_DISK
        try:
            file_system = os.statvfs(self._directory)
        except OSError:
            return None
        if file_system.f_bavail * file_system.f_frsize < min(FULL_DISK_FREE_BYTES, self.full_size):
            return _FULL_DISK
        if file_system.f_files and file_system.f_favail < FULL_DISK_FREE_INODES:
            return "the disk is full: it has no inodes for new files; nothing new is stored, reads and deletes work"
        return self.low_disk_reason()

    def _open(self, flags: int = 0) -> None:
        """Opens the file if it is not open. With O_CREAT in `flags`, creates a missing file; without O_CREAT, does
        nothing if the file is missing. Raises OSError."""
        if self._fd < 0:
            with suppress(FileNotFoundError):
                self._fd = self._system.open(self._path, os.O_RDWR | flags)

    def _length(self) -> int:
        """Returns the length of the file in bytes; 0 if it is not open."""
        return os.fstat(self._fd).st_size if self._fd >= 0 else 0

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Waits until no other thread or process uses the reserve. Inside the `with` block, only this thread uses the
        reserve."""
        with self._lock, Flock(self._fd):
            yield

    def _release_bytes(self, count: int) -> None:
        """Makes the file `count` bytes shorter, or empty if it has fewer bytes. Ignores errors."""
        with suppress(OSError):
            self._system.truncate(self._fd, max(0, self._length() - count))
            # Syncs, because ext4 reuses freed blocks only after it has written to its journal that they are free.
            self._system.sync(self._fd)

    def _extend(self) -> None:
        """Extends the file to its full size, or as far as there is space. Ignores errors."""
        length = self._length()
        missing_bytes = self.full_size - length
        with suppress(OSError):
            file_system = os.fstatvfs(self._fd)
            if (free_bytes := file_system.f_bavail * file_system.f_frsize) < missing_bytes:
                missing_bytes = free_bytes - free_bytes % BLOCK_BYTES
        while missing_bytes > 0 and self._can_allocate:
            try:
                self._system.allocate(self._fd, length + missing_bytes)
                return
            except OSError as error:
                # Some file systems keep the space that they allocated before the error, so the file is truncated. The
                # next attempt allocates half of the bytes, because a disk quota may allow less than the free space of
                # the file system.
                with suppress(OSError):
                    self._system.truncate(self._fd, length)
                self._note_if_unsupported(error)
                missing_bytes = missing_bytes // 2 - missing_bytes // 2 % BLOCK_BYTES

    def _note_if_unsupported(self, error: OSError) -> None:
        """If `error` means that the file system cannot allocate space before data is written, logs a warning, and
        prevents further attempts."""
        if error.errno in _UNSUPPORTED_ERRNOS:
            self._can_allocate = False
            log.warning(
                "the file system of %s cannot reserve space (%s): deletes may fail when the disk is full",
                self._directory,
                error.strerror,
            )


def _full_size_on(directory: str) -> int:
    """Returns the full size in bytes of a reserve on the file system of `directory`."""
    try:
        file_system = os.statvfs(directory)
    except OSError:
        return RESERVE_BYTES
    return min(RESERVE_BYTES, int(file_system.f_blocks * file_system.f_frsize * MAX_FILE_SYSTEM_FRACTION))
