"""File locks between processes: locks on single bytes of a file (`fcntl`), and locks on a whole file (`flock`).

Each `open` call creates an open file description, here called an *opening* of the file. A lock belongs to an opening,
not to a process (fcntl(2), "Open file description locks"; flock(2)). So two openings of a file exclude each other even
within one process. The kernel releases a lock when the opening is closed or its process dies.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct

_STRUCT_FLOCK = struct.Struct("hhqqi4x")
"""The C type `struct flock`: type, whence, start, length, pid (fcntl(2))."""


def try_lock_byte(fd: int, offset: int = 0) -> bool:
    """Locks the byte at `offset` exclusively and returns True. Returns False if another opening of the file holds any
    lock on the byte. Never waits. Raises OSError."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _STRUCT_FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, offset, 1, 0))
    except BlockingIOError:
        return False
    return True


def lock_byte_shared(fd: int, offset: int) -> None:
    """Takes a shared lock on the byte at `offset`. Several openings of the file can hold this lock at the same time,
    and `is_byte_locked` shows it to the others. Never waits. Raises OSError, also if another opening holds an exclusive
    lock on the byte: so never use `try_lock_byte` for the same byte."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _STRUCT_FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, offset, 1, 0))


def unlock_byte(fd: int, offset: int = 0) -> None:
    """Unlocks the byte at `offset`. Raises OSError."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _STRUCT_FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, offset, 1, 0))


def is_byte_locked(fd: int, offset: int = 0) -> bool:
    """Returns whether another opening of the file holds an exclusive or shared lock on the byte at `offset`. Does not
    see a lock that the opening `fd` itself holds. Raises OSError."""
    lock_structure = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _STRUCT_FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, offset, 1, 0))
    lock_type: int = _STRUCT_FLOCK.unpack(lock_structure)[0]
    return lock_type != fcntl.F_UNLCK


def try_flock(fd: int, *, shared: bool = False) -> bool:
    """Locks the whole file and returns True. Returns False if another opening holds a lock that excludes this one.
    `shared`: whether to take a shared lock, which several openings can hold at the same time, instead of an exclusive
    one. Never waits. Raises OSError."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock_flock(fd: int) -> None:
    """Releases the lock on the whole file. Raises OSError."""
    fcntl.flock(fd, fcntl.LOCK_UN)


class Flock:
    """Context manager that waits for the exclusive lock on a whole file and holds it inside the `with` block. The wait
    blocks the thread, so hold the lock only for about the time of one write. Raises OSError. It is a class because each
    metadata change uses it, and a class is several times faster than a `contextmanager` function."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __enter__(self) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_UN)


class PollBackOff:
    """The pauses between attempts to take a lock that another process holds. Each pause is twice as long as the
    previous one, but at most `longest_seconds`. Make a new object for each wait."""

    __slots__ = ("_longest_seconds", "_next_seconds")

    def __init__(self, first_seconds: float, longest_seconds: float) -> None:
        self._next_seconds = first_seconds
        self._longest_seconds = longest_seconds

    async def pause(self) -> None:
        """Sleeps for one pause, and doubles the length of the next one."""
        await asyncio.sleep(self._next_seconds)
        self._next_seconds = min(2 * self._next_seconds, self._longest_seconds)
