"""Locks between processes, byte by byte of a file, and in one process, key by key.

The first belong to an opening of the file, not to a process: two openings exclude each other wherever they are, and a
lock falls with its opening, whatever ends the process (fcntl(2), "Open file description locks").
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

_FLOCK = struct.Struct("hhqqi4x")
"""struct flock: kind, whence, start, length, pid (fcntl(2))."""


def try_lock_byte(fd: int, at: int = 0) -> bool:
    """Takes the byte's lock if nobody else has it; never waits. Raises OSError."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, at, 1, 0))
    except BlockingIOError:
        return False
    return True


def share_lock_byte(fd: int, at: int) -> None:
    """Takes the byte's lock together with others who share it. Nobody may ever take that byte's lock alone: then this
    never waits. Raises OSError."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, at, 1, 0))


def unlock_byte(fd: int, at: int = 0) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, at, 1, 0))


def is_byte_locked(fd: int, at: int = 0) -> bool:
    """Whether another opening of the file has the byte's lock, alone or shared. Raises OSError."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, at, 1, 0))
    kind: int = _FLOCK.unpack(answer)[0]
    return kind != fcntl.F_UNLCK


@dataclass(slots=True)
class _Lock:
    users: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class KeyedLocks(Generic[K]):
    """A lock for each key, in the order it was asked for, on one event loop. Those nobody uses are not kept."""

    def __init__(self) -> None:
        self._locks: dict[K, _Lock] = {}

    @asynccontextmanager
    async def hold(self, key: K) -> AsyncIterator[None]:
        entry = self._locks.setdefault(key, _Lock())
        entry.users += 1
        try:
            async with entry.lock:
                yield
        finally:
            entry.users -= 1
            if not entry.users:
                del self._locks[key]
