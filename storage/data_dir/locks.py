"""File locks between processes: locks on single bytes of a file (`fcntl`), and locks on a whole file (`flock`).

Both kinds belong to an open file description, which each `open` call creates, not to a process (fcntl(2), "Open file
description locks"; flock(2)). So two openings of a file exclude each other even within one process. The kernel releases
a lock when the opening is closed or its process dies.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct

_STRUCT_FLOCK = struct.Struct("hhqqi4x")
"""The C type `struct flock`: type, whence, start, length, pid (fcntl(2))."""


def try_lock_byte(fd: int, offset: int = 0) -> bool:
    """Locks the byte at `offset` exclusively and returns True, or returns False if another opening of the file has it
    locked. Never waits. Raises OSError."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _STRUCT_FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, offset, 1, 0))
    except BlockingIOError:
        return False
    return True


def share_lock_byte(fd: int, offset: int) -> None:
    """Locks the byte at `offset` shared: other openings of the file can lock it shared as well. Raises OSError, also
    if another opening has the byte locked exclusively; so use it for bytes that nobody locks exclusively."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _STRUCT_FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, offset, 1, 0))


def unlock_byte(fd: int, offset: int = 0) -> None:
    """Unlocks the byte at `offset`. Raises OSError."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _STRUCT_FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, offset, 1, 0))


def is_byte_locked(fd: int, offset: int = 0) -> bool:
    """Returns whether another opening of the file has the byte at `offset` locked, exclusively or shared. Raises
    OSError."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _STRUCT_FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, offset, 1, 0))
    lock_type: int = _STRUCT_FLOCK.unpack(answer)[0]
    return lock_type != fcntl.F_UNLCK


def try_flock(fd: int, *, shared: bool = False) -> bool:
    """Locks the whole file and returns True, or returns False if another opening has a lock that excludes this one.
    `shared`: other openings can hold a shared lock too. Never waits. Raises OSError."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock_flock(fd: int) -> None:
    """Releases the lock on the whole file. Raises OSError."""
    fcntl.flock(fd, fcntl.LOCK_UN)


class Flock:
    """Context manager that waits for the lock on a whole file and holds it inside the `with` block. Blocks the thread,
    so hold it only for about as long as one write takes. Raises OSError. It is a class because each metadata change
    uses it, and a class is several times faster than a `contextmanager` function."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __enter__(self) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_UN)


class PollBackOff:
    """The pauses between attempts to take a lock that another process holds. Each pause is twice as long as the one
    before, up to a limit."""

    __slots__ = ("_longest_seconds", "_next_seconds")

    def __init__(self, first_seconds: float, longest_seconds: float) -> None:
        self._next_seconds = first_seconds
        self._longest_seconds = longest_seconds

    async def pause(self) -> None:
        """Sleeps for the next pause."""
        await asyncio.sleep(self._next_seconds)
        self._next_seconds = min(2 * self._next_seconds, self._longest_seconds)
