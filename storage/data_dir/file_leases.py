"""Leases across processes (`Leases`): locks on the bytes of one file, which stays empty.

Each key has a byte, and so has each slot of a name, by a hash onto 2^62 bytes, so that collisions are out of the
question. The file is opened once per process: its byte locks decide between processes, and a set in memory decides
within one. No call can wait for one of several bytes, so a waiter polls, which costs a microsecond or two.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from storage.data_dir.blocking_calls import as_storage_errors
from storage.data_dir.locks import PollBackOff, is_byte_locked, try_lock_byte, unlock_byte
from storage.data_dir.system import System
from storage.keyed_locks import KeyedLocks

FIRST_PAUSE = 0.0005
LONGEST_PAUSE = 0.01
SLOTS = 1 << 16


class FileLeases:
    """For one process and its event loop. Creates the file at `path` if it is missing."""

    def __init__(self, path: Path, system: System) -> None:
        with as_storage_errors():
            self._fd = system.open(path, os.O_RDWR | os.O_CREAT)
        self._queues = KeyedLocks[tuple[int, int]]()
        self._held: set[int] = set()

    def close(self) -> None:
        """Releases all leases."""
        os.close(self._fd)
        self._fd = -1

    @asynccontextmanager
    async def take(self, key: str) -> AsyncIterator[None]:
        """Within this process in the order of the requests. Cancelled: the lease goes to the next."""
        at = _byte("turn", key)
        async with self._queues.hold((at, 0)):
            await _until(lambda: self._try(at))
            try:
                yield
            finally:
                self._leave(at)

    @asynccontextmanager
    async def slot(self, name: str, count: int, keep_free: int = 0) -> AsyncIterator[None]:
        """Within this process in the order of the requests with the same `keep_free`."""
        first = _byte("slots", name, SLOTS)
        found: list[int] = []

        def look() -> bool:
            at = self._try_slot(first, count, keep_free)
            found.extend([] if at is None else [at])
            return at is not None

        async with self._queues.hold((first, keep_free)):
            await _until(look)
        try:
            yield
        finally:
            self._leave(found[0])

    @asynccontextmanager
    async def try_slot(self, name: str, count: int, keep_free: int = 0) -> AsyncIterator[bool]:
        at = self._try_slot(_byte("slots", name, SLOTS), count, keep_free)
        try:
            yield at is not None
        finally:
            if at is not None:
                self._leave(at)

    def _try_slot(self, first: int, count: int, keep_free: int) -> int | None:
        """Takes a slot if one is free, and returns its byte."""
        for at in range(first, first + count):
            if self._try(at):
                free = sum(not self._is_held(other) for other in range(first, first + count)) if keep_free else 0
                if free >= keep_free:
                    return at
                self._leave(at)
                return None
        return None

    def _try(self, at: int) -> bool:
        if at in self._held:
            return False
        with as_storage_errors():
            if not try_lock_byte(self._fd, at):
                return False
        self._held.add(at)
        return True

    def _is_held(self, at: int) -> bool:
        with as_storage_errors():
            return at in self._held or is_byte_locked(self._fd, at)

    def _leave(self, at: int) -> None:
        self._held.discard(at)
        if self._fd >= 0:
            unlock_byte(self._fd, at)


async def _until(look: Callable[[], bool]) -> None:
    """Polls until `look` returns True."""
    back_off = PollBackOff(FIRST_PAUSE, LONGEST_PAUSE)
    while not look():
        await back_off.pause()


def _byte(kind: str, text: str, room: int = 1) -> int:
    """Returns the first of `room` bytes for `text`: the same in every process."""
    digest = hashlib.blake2b(f"{kind} {text}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 2) // room * room
