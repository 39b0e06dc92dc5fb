"""Room kept back on the file system of the data directory, so that a full disk can be emptied.

A DELETE writes to the database's log before anything is freed, and a start needs room for the index of that log. So a
file of `SIZE` bytes is allocated in advance. Whoever has to write and finds no room gives its blocks up, writes, and
takes back what is free then. As long as the file is smaller than it should be, nothing new is stored: pushes and fills
get StorageFull, and what was given up is left for deletes.

The state is the length of the file, which all processes see. A process that dies between giving up and taking back
leaves a short file, and the next one that looks takes the rest back.
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
"""The reserve is no more than this part of the file system (one sixteenth)."""
FIRST: Final = 256 * 1024
"""Bytes that are given up first: enough for most changes, and for opening the database."""
STEP: Final = 4096
"""The least that is worth taking back."""
LOW: Final = 1024 * 1024
"""Free bytes below which the disk counts as full."""
FEW_INODES: Final = 16
_UNSUPPORTED: Final = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
_FULL_DISK: Final = "the disk is full: nothing new is stored until there is room again; reads and deletes work"
log = logging.getLogger("storage")
T = TypeVar("T")


class ReserveUse(IntEnum):
    """How a change may use the reserve."""

    GROWTH = 0
    """Stores something: refused unless the reserve is whole."""
    SMALL = 1
    """A small row that others depend on, such as a failed login or a grant: may use one half of it."""
    RELIEF = 2
    """Frees room, takes rights away or changes a secret: may use all of it."""


class Reserve:
    """The reserve of one data directory, as one process sees it. Blocking; may be used from any thread."""

    def __init__(self, path: Path, system: System) -> None:
        """Neither makes nor changes the file; `establish` does."""
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
        """Makes the file if it is missing, and takes what is free up to its size. Raises nothing: a full disk has no
        reserve until there is room."""
        with suppress(OSError):
            self._open(os.O_CREAT)
        if self._fd < 0:
            return
        with self._held():
            with suppress(OSError):  # a copy of the data directory may have a hole in its place
                if length := self._length():
                    self._system.allocate(self._fd, length)
            self._take_back()

    @property
    def is_whole(self) -> bool:
        """Also where the file system can keep no room back: there is nothing to wait for."""
        return not self._possible or (self._fd >= 0 and os.fstat(self._fd).st_size >= self.size)

    def allows(self, need: ReserveUse) -> bool:
        """Whether a change of that kind may be tried now."""
        if self.is_whole or self.restore():
            return True
        return need is ReserveUse.RELIEF or (need is ReserveUse.SMALL and self._length() >= self.size // 2)

    def require_room(self) -> None:
        """For whoever stores something. Raises StorageFull."""
        if not self.allows(ReserveUse.GROWTH):
            raise StorageFull()

    def restore(self) -> bool:
        """Takes back what is free; whether the reserve is whole then. Never waits for another thread or process."""
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
        """Makes the attempt with ever more of the reserve given up, as long as it raises `full`; one at a time over all
        processes. Takes back what is free afterwards. A stranger who writes at the same moment can take no more than
        what was given up, so that is little at first."""
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
        """Why nothing can be stored at present, in a sentence; None where nothing is known. Does not wait."""
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
        """As much as there is, up to the whole."""
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
                # Some file systems keep a part of it then, and a quota may be smaller than the room.
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
