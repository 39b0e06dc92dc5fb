"""File locks between processes: on single bytes of a file (`fcntl`), and on a whole file (`flock`).

Each `open` call creates an open file description, here called an *opening* of the file. A lock belongs to an opening,
not to a process (fcntl(2), "Open file description locks"; flock(2)). Two openings exclude each other even within one
process. A lock ends when its opening is closed or its process dies.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct

_STRUCT_FLOCK = struct.Struct("hhqqi4x")
"""The C type `struct flock`: type, whence, start, length, pid (fcntl(2))."""


def try_lock_byte(fd: int, offset: int = 0) -> bool:
    """Locks the byte at `offset` exclusively, without waiting. Returns False if another opening holds a lock on the
    byte. Raises OSError."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _STRUCT_FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, offset, 1, 0))
    except BlockingIOError:
        return False
    return True


def lock_byte_shared(fd: int, offset: int) -> None:
    """Takes a shared lock on the byte at `offset`, without waiting. Several openings can hold the lock at the same
    time. Never use `try_lock_byte` for a byte with shared locks. Raises OSError."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _STRUCT_FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, offset, 1, 0))


def unlock_byte(fd: int, offset: int = 0) -> None:
    """Unlocks the byte at `offset`. Raises OSError."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _STRUCT_FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, offset, 1, 0))


def is_byte_locked(fd: int, offset: int = 0) -> bool:
    """Returns whether an opening other than `fd` holds a lock on the byte at `offset`. Raises OSError."""
    lock_structure = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _STRUCT_FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, offset, 1, 0))
    lock_type: int = _STRUCT_FLOCK.unpack(lock_structure)[0]
    return lock_type != fcntl.F_UNLCK


def try_flock(fd: int, *, shared: bool = False) -> bool:
    """Locks the whole file, without waiting. With `shared`, other openings can hold shared locks on the file at the
    same time. Returns False if another opening holds a conflicting lock. Raises OSError."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock_flock(fd: int) -> None:
    """Locks the whole file exclusively with flock(2). Waiting for the lock blocks the thread. Raises OSError."""
    fcntl.flock(fd, fcntl.LOCK_EX)


def unlock_flock(fd: int) -> None:
    """Releases the lock on the whole file. Raises OSError."""
    fcntl.flock(fd, fcntl.LOCK_UN)


class Flock:
    """Context manager that holds the exclusive lock on a whole file. Waiting for the lock blocks the thread, so hold
    the lock only for about the time of one write. Raises OSError. A `contextmanager` function would be several times
    slower."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __enter__(self) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_UN)


class PollBackOff:
    """The pauses between attempts to take a lock. Each pause is twice as long as the previous pause, up to
    `longest_seconds`. Make a new object each time that you wait for a lock."""

    __slots__ = ("_longest_seconds", "_next_seconds")

    def __init__(self, first_seconds: float, longest_seconds: float) -> None:
        self._next_seconds = first_seconds
        self._longest_seconds = longest_seconds

    async def pause(self) -> None:
        """Sleeps for one pause."""
        await asyncio.sleep(self._next_seconds)
        self._next_seconds = min(2 * self._next_seconds, self._longest_seconds)
