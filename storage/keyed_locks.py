"""Locks by key, for tasks of one event loop (`KeyedLocks`)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


@dataclass(slots=True)
class _Lock:
    """The lock of one key. `users`: number of tasks that hold the lock or wait for it."""

    users: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class KeyedLocks(Generic[K]):
    """A lock for each key. The tasks that wait for the lock of a key get it in the order of their calls. A lock uses
    memory only while a task holds it or waits for it."""

    def __init__(self) -> None:
        self._locks: dict[K, _Lock] = {}

    def is_used(self, key: K) -> bool:
        """Returns whether a task holds the lock of `key` or waits for it."""
        return key in self._locks

    @asynccontextmanager
    async def hold(self, key: K) -> AsyncIterator[None]:
        """Waits for the lock of `key` and holds it inside the `async with` block. If a waiting task is cancelled, the
        other tasks keep their order."""
        entry = self._locks.setdefault(key, _Lock())
        entry.users += 1
        try:
            async with entry.lock:
                yield
        finally:
            entry.users -= 1
            if not entry.users:
                del self._locks[key]
