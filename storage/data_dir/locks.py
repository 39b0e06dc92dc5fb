"""File locks between processes: OFD locks on single bytes of a file, and `flock` on a whole file.

Both kinds belong to an opening of the file, not to a process: two openings exclude each other wherever they are, and
the kernel drops a lock when its opening is closed or its process dies (fcntl(2), "Open file description locks";
flock(2)).
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct

_FLOCK = struct.Struct("hhqqi4x")
"""struct flock: kind, whence, start, length, pid (fcntl(2))."""


def try_lock_byte(fd: int, at: int = 0) -> bool:
    """Locks the byte exclusively and returns True, or returns False if another opening has it. Never waits. Raises
    OSError."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, at, 1, 0))
    except BlockingIOError:
        return False
    return True


def share_lock_byte(fd: int, at: int) -> None:
    """Locks the byte together with other openings that share it. No opening may ever lock that byte exclusively, so
    this never waits. Raises OSError."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, at, 1, 0))


def unlock_byte(fd: int, at: int = 0) -> None:
    """Unlocks the byte. Raises OSError."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, at, 1, 0))


def is_byte_locked(fd: int, at: int = 0) -> bool:
    """Returns whether another opening of the file has the byte locked, exclusively or shared. Raises OSError."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, at, 1, 0))
    kind: int = _FLOCK.unpack(answer)[0]
    return kind != fcntl.F_UNLCK


def try_flock(fd: int, *, shared: bool = False) -> bool:
    """Locks the open file and returns True, or returns False if another opening has it locked. Never waits. Raises
    OSError."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock_flock(fd: int) -> None:
    """Unlocks the open file. Raises OSError."""
    fcntl.flock(fd, fcntl.LOCK_UN)


class Flock:
    """Waits for the lock of an open file and holds it in a `with` block. For steps about as long as one write. Raises
    OSError. Every metadata change uses it, and a class is several times faster here than `contextmanager`."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __enter__(self) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_UN)


class PollBackOff:
    """Pauses between two attempts to get what another process holds. Each pause is twice as long as the one before, up
    to a limit."""

    __slots__ = ("_longest", "_next")

    def __init__(self, first: float, longest: float) -> None:
        """`first` and `longest`: seconds."""
        self._next = first
        self._longest = longest

    async def pause(self) -> None:
        """Sleeps for the next pause."""
        await asyncio.sleep(self._next)
        self._next = min(2 * self._next, self._longest)
