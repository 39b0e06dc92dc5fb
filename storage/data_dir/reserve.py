"""Disk space that is reserved so that a full disk can be emptied (`Reserve`).

A DELETE writes to the database's log before anything is freed, and a start needs space for the index of that log. So a
file of `SIZE` bytes is allocated in advance. A writer that finds no space truncates the file, writes, and extends the
file again as far as there is space. While the file is shorter than it should be, nothing new is stored: pushes and
mirror downloads get StorageFull, and the released space is left for deletes.

The length of the file is the state, which all processes see. If a process dies after it has truncated the file, the
next one that checks extends it again.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from pathlib import Path
from typing import Final, TypeVar

from storage.data_dir.locks import Flock, try_flock, unlock_flock
from storage.data_dir.system import System
from storage.errors import StorageFull

SIZE: Final = 16 * 1024 * 1024
"""Bytes. Deleting a manifest of 25,000 entries writes 7 MiB to the log."""
SHARE: Final = 16
"""The reserve takes at most one part in so many of the file system."""
FIRST: Final = 256 * 1024
"""Bytes that are released first: enough for most changes, and for opening the database."""
STEP: Final = 4096
"""Fewest bytes that are worth taking back."""
LOW: Final = 1024 * 1024
"""Free bytes below which the disk counts as full."""
FEW_INODES: Final = 16
_UNSUPPORTED: Final = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
_FULL_DISK: Final = "the disk is full: nothing new is stored until there is room again; reads and deletes work"
log = logging.getLogger("storage")
T = TypeVar("T")


class ReserveUse(IntEnum):
    """Which part of the reserve a change may use."""

    GROWTH = 0
    """Stores something: refused while the reserve is not whole."""
    SMALL = 1
    """A small row that others depend on, such as a failed login or a grant: may use half of it."""
    RELIEF = 2
    """Frees space, takes rights away or changes a secret: may use all of it."""


class Reserve:
    """The reserve of one data directory. All calls block; any thread may call them."""

    def __init__(self, path: Path, system: System) -> None:
        """Opens the file if it exists; `establish` creates it."""
        self._path = path
        self._system = system
        self._fd = -1
        self._lock = threading.Lock()
        self._possible = True
        self.size = _size_on(path.parent)
        self._open()

    def close(self) -> None:
        with self._lock:
            fd, self._fd = self._fd, -1
            if fd >= 0:
                os.close(fd)

    def establish(self) -> None:
        """Creates the file if it is missing, and allocates as much as there is space for. Raises nothing: a full disk
        has no reserve until there is space."""
        with suppress(OSError):
            self._open(os.O_CREAT)
        if self._fd < 0:
            return
        with self._held():
            with suppress(OSError):  # in a copy of the data directory the file may be sparse
                if length := self._length():
                    self._system.allocate(self._fd, length)
            self._take_back()

    @property
    def is_whole(self) -> bool:
        """Whether all of the reserve is allocated. True also if the file system cannot allocate in advance."""
        return not self._possible or (self._fd >= 0 and os.fstat(self._fd).st_size >= self.size)

    def allows(self, need: ReserveUse) -> bool:
        """Returns whether a change of that kind may be tried now."""
        if self.is_whole or self.restore():
            return True
        return need is ReserveUse.RELIEF or (need is ReserveUse.SMALL and self._length() >= self.size // 2)

    def require_room(self) -> None:
        """Raises StorageFull if nothing new may be stored now."""
        if not self.allows(ReserveUse.GROWTH):
            raise StorageFull()

    def restore(self) -> bool:
        """Extends the file as far as there is space, and returns whether the reserve is whole then. Never waits for
        another thread or process."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            with suppress(OSError):
                self._open(os.O_CREAT)
                if self._fd >= 0 and try_flock(self._fd):
                    try:
                        self._take_back()
                    finally:
                        unlock_flock(self._fd)
                    return self.is_whole
            return False
        finally:
            self._lock.release()

    def spend(self, attempt: Callable[[], T], full: type[Exception]) -> T:
        """Calls `attempt` with more and more of the reserve released, as long as it raises `full`, and extends the file
        again afterwards. Only one process does so at a time. Another program may take what was released, so that is
        little at first."""
        if self._fd < 0 or not self._possible:
            return attempt()
        with self._held():
            try:
                for part in (FIRST, self.size // 8):
                    self._give_up(part)
                    with suppress(full):
                        return attempt()
                self._give_up(self.size)
                return attempt()
            finally:
                self._take_back()

    def storage_problem(self) -> str | None:
        """Says in a sentence why nothing can be stored at present; None if nothing is known. Does not wait."""
        if self._fd >= 0 and not self.is_whole:
            return _FULL_DISK
        try:
            found = os.statvfs(self._path.parent)
        except OSError:
            return None
        if found.f_bavail * found.f_frsize < min(LOW, self.size):
            return _FULL_DISK
        if found.f_files and found.f_favail < FEW_INODES:
            return "the disk is full: it has no inodes for new files; nothing new is stored, reads and deletes work"
        return None

    def _open(self, flags: int = 0) -> None:
        if self._fd < 0:
            with suppress(FileNotFoundError):
                self._fd = self._system.open(self._path, os.O_RDWR | flags)

    def _length(self) -> int:
        return os.fstat(self._fd).st_size if self._fd >= 0 else 0

    @contextmanager
    def _held(self) -> Iterator[None]:
        with self._lock, Flock(self._fd):
            yield

    def _give_up(self, part: int) -> None:
        with suppress(OSError):
            self._system.truncate(self._fd, max(0, self._length() - part))
            self._system.sync(self._fd)  # ext4 gives freed blocks to others once they are committed as free

    def _take_back(self) -> None:
        """Extends the file as far as there is space."""
        have = self._length()
        part = self.size - have
        with suppress(OSError):
            found = os.fstatvfs(self._fd)
            if (room := found.f_bavail * found.f_frsize) < part:
                part = room - room % STEP
        while part > 0 and self._possible:
            try:
                self._system.allocate(self._fd, have + part)
                return
            except OSError as error:
                # Some file systems keep a part that was allocated, and a quota may be smaller than the free space.
                with suppress(OSError):
                    self._system.truncate(self._fd, have)
                self._note_unsupported(error)
                part = part // 2 - part // 2 % STEP

    def _note_unsupported(self, error: OSError) -> None:
        if error.errno in _UNSUPPORTED:
            self._possible = False
            log.warning(
                "the file system of %s cannot keep room back (%s): on a full disk deletes may fail",
                self._path.parent,
                error.strerror,
            )


def _size_on(directory: Path) -> int:
    try:
        found = os.statvfs(directory)
    except OSError:
        return SIZE
    return min(SIZE, found.f_blocks * found.f_frsize // SHARE)
