"""Locks by key on one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


@dataclass(slots=True)
class _Lock:
    users: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class KeyedLocks(Generic[K]):
    """One lock per key, granted in the order of the requests. A lock that nobody holds or waits for takes no memory."""

    def __init__(self) -> None:
        self._locks: dict[K, _Lock] = {}

    @asynccontextmanager
    async def hold(self, key: K) -> AsyncIterator[None]:
        """Waits for the lock of `key` and holds it inside the block. A cancellation leaves the lock to the next."""
        entry = self._locks.setdefault(key, _Lock())
        entry.users += 1
        try:
            async with entry.lock:
                yield
        finally:
            entry.users -= 1
            if not entry.users:
                del self._locks[key]
