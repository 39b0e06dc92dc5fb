"""The disk reserve: space that is allocated in advance, so that content can be deleted when the disk is full
(`Reserve`).

Deletes need free space themselves: a DELETE writes to the database's log before any space is freed, and opening the
database needs space for the index of that log. The reserve is a file of up to `RESERVE_BYTES` bytes. If a delete finds
the disk full, it first truncates this file, which frees space. Then it writes its changes. At the end it extends the
file again, as far as there is space. As long as the file is shorter than its full size, pushes and mirror downloads get
StorageFull, so that they do not use the free space that deletes need.

All processes see the length of the file, and there is no other shared state. If a process dies after truncating the
file, the next call of `restore` in any process extends it again.
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
"""Full size of the reserve. The largest known need is 7 MiB, for the log of a delete of a manifest with 25,000
entries."""
MAX_FILE_SYSTEM_FRACTION: Final = 1 / 16
"""Largest fraction of the file system that the reserve may take up. So on a file system smaller than 256 MiB the
reserve is smaller than `RESERVE_BYTES`."""
FIRST_RELEASE_BYTES: Final = 256 * 1024
"""Bytes that `spend` frees before its first attempt: enough for most changes, and for opening the database."""
BLOCK_BYTES: Final = 4096
"""The reserve grows in multiples of this size, the block size of most file systems."""
MIN_FREE_BYTES: Final = 1024 * 1024
"""If fewer bytes are free, `disk_full_reason` reports a full disk. On a small file system, the limit is the size of the
reserve if that is smaller."""
MIN_FREE_INODES: Final = 16
"""If fewer inodes are free, `disk_full_reason` reports a full disk."""
_UNSUPPORTED_ERRNOS: Final = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
"""Errors of a file system that cannot allocate space in advance."""
_FULL_DISK: Final = "the disk is full: nothing new is stored until there is room again; reads and deletes work"
log = logging.getLogger("storage")
T = TypeVar("T")


class ReserveUse(IntEnum):
    """How much of the reserve a metadata change may use."""

    NONE = 0
    """For changes that store content. They are refused while the reserve is not at its full size."""
    HALF = 1
    """For changes that store a small row and should not be refused, such as a grant or the record of a failed login."""
    ALL = 2
    """For changes that free space, revoke rights or change a secret."""


@dataclass(frozen=True, slots=True)
class MinFreeSpace:
    """The space on the disk that has to stay free in addition to the reserve: the greater of `size` (in bytes) and
    `percent` percent of the file system. Clients cannot push if less space is free. With the defaults, clients can push
    until the disk is full."""

    size: int = 0
    percent: float = 0.0

    def of(self, file_system_bytes: int) -> int:
        """Returns how many bytes must stay free on a file system of this size."""
        return max(self.size, int(file_system_bytes * self.percent / 100))

    def __str__(self) -> str:
        limits = [size_text(self.size)] if self.size else []
        return " or ".join([*limits, *([f"{self.percent:g} %"] if self.percent else [])])


class Reserve:
    """The reserve of one data directory. Any thread may call the methods. All of them make system calls. Some also
    wait: `establish` and `spend` while another thread or process uses the reserve, `close` only while another thread of
    this process uses it."""

    def __init__(self, path: Path, system: System, min_free: MinFreeSpace | None = None) -> None:
        """`path`: the reserve's file. Opens it if it exists; `establish` creates it. `min_free`: how much of the disk
        must stay free; None: nothing. Raises OSError."""
        self._path = path
        self._directory = str(path.parent)
        self._system = system
        self._min_free = min_free
        self._fd = -1
        self._lock = threading.Lock()
        self._can_allocate = True
        """False after the file system has refused to allocate space in advance."""
        self.size = _size_on(self._directory)
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
                # In a copy of a data directory, the file may be sparse, so that it takes up no space. Allocates it.
                if length := self._length():
                    self._system.allocate(self._fd, length)
            self._extend()

    @property
    def is_whole(self) -> bool:
        """Whether the reserve has its full size. Also True if the file system cannot allocate space in advance, because
        pushes would otherwise be refused forever."""
        return not self._can_allocate or (self._fd >= 0 and os.fstat(self._fd).st_size >= self.size)

    def allows(self, use: ReserveUse) -> bool:
        """Returns whether a change of the kind `use` may be tried now. If the reserve is not at its full size, first
        tries to restore it."""
        if self.is_whole or self.restore():
            return True
        return use is ReserveUse.ALL or (use is ReserveUse.HALF and self._length() >= self.size // 2)

    def require_free_space(self, *, may_use_min_free: bool = False, size: int = 0) -> None:
        """Raises StorageFull if the reserve is not at its full size and cannot be restored now, or if too little of the
        disk would stay free (`MinFreeSpace`). Call it before new content is stored. `size`: number of bytes that will
        be stored. `may_use_min_free`: whether to skip the check of `MinFreeSpace`, for content that passed this check
        before."""
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
        """Returns a sentence for the operator if, after `size` more bytes, less of the disk would be free than
        `MinFreeSpace` says. Returns None otherwise, or if the state of the file system cannot be read."""
        if self._min_free is None:
            return None
        try:
            file_system = os.statvfs(self._directory)
        except OSError:
            return None
        free_bytes = file_system.f_bavail * file_system.f_frsize
        if free_bytes - size >= self._min_free.of(file_system.f_blocks * file_system.f_frsize):
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
        """Frees a part of the reserve, calls `attempt`, and returns its result. `full_error`: the exception that
        `attempt` raises if the disk is full. After that exception, frees a larger part and calls `attempt` again, up to
        three times in all; the third exception is raised. Finally extends the file again. If there is no reserve, or if
        the file system cannot allocate space in advance, only calls `attempt` once.

        Frees little at first, because another program on the machine may use up the freed space."""
        if self._fd < 0 or not self._can_allocate:
            return attempt()
        with self._locked():
            try:
                for part_bytes in (FIRST_RELEASE_BYTES, self.size // 8):
                    self._release_bytes(part_bytes)
                    with suppress(full_error):
                        return attempt()
                self._release_bytes(self.size)
                return attempt()
            finally:
                self._extend()

    def disk_full_reason(self) -> str | None:
        """Returns a sentence for the operator if the disk is too full to store content now. Returns None if content can
        be stored, or if the state of the file system cannot be read. Does not wait for other users of the reserve."""
        if self._fd >= 0 and not self.is_whole:
            return _FULL_DISK
        try:
            file_system = os.statvfs(self._directory)
        except OSError:
            return None
        if file_system.f_bavail * file_system.f_frsize < min(MIN_FREE_BYTES, self.size):
            return _FULL_DISK
        if file_system.f_files and file_system.f_favail < MIN_FREE_INODES:
            return "the disk is full: it has no inodes for new files; nothing new is stored, reads and deletes work"
        return self.low_disk_reason()

    def _open(self, flags: int = 0) -> None:
        """Opens the file if it is not open. If it does not exist, creates it if `flags` has O_CREAT, otherwise does
        nothing. Raises OSError."""
        if self._fd < 0:
            with suppress(FileNotFoundError):
                self._fd = self._system.open(self._path, os.O_RDWR | flags)

    def _length(self) -> int:
        """Returns the length of the file in bytes; 0 if it is not open."""
        return os.fstat(self._fd).st_size if self._fd >= 0 else 0

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Waits until no other thread or process uses the reserve. Inside the `with` block, only this thread uses
        it."""
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
        missing_bytes = self.size - length
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
        """If `error` means that the file system cannot allocate space in advance, logs a warning, and prevents further
        attempts."""
        if error.errno in _UNSUPPORTED_ERRNOS:
            self._can_allocate = False
            log.warning(
                "the file system of %s cannot reserve space (%s): deletes may fail when the disk is full",
                self._directory,
                error.strerror,
            )


def _size_on(directory: str) -> int:
    """Returns the full size in bytes of a reserve on the file system of `directory`."""
    try:
        file_system = os.statvfs(directory)
    except OSError:
        return RESERVE_BYTES
    return min(RESERVE_BYTES, int(file_system.f_blocks * file_system.f_frsize * MAX_FILE_SYSTEM_FRACTION))
