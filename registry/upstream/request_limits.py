"""Limits of requests to upstreams: time (`time_limit`), size, and concurrent requests for one key
(`KeyedSemaphore`)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from registry import __version__
from storage.errors import UpstreamTimeout

KIB, MIB = 1 << 10, 1 << 20
SMALL_BODY_BYTES = 64 * KIB
"""Largest body of a response from which no manifest, list or blob is expected."""
REQUEST_TIMEOUT_SECONDS = 10.0
"""Time limit for a request that is not for a blob's bytes or a list: for all endpoints together, and including the
token it needs. docker waits 15 s for a mirror before it asks the next one."""
COMMON_HEADERS = {"User-Agent": f"entrepot/{__version__}", "Accept-Encoding": "identity"}
"""Headers of every request. `identity`, because content that is compressed in transit would not match its digest."""


@asynccontextmanager
async def time_limit(seconds: float, peer_name: str) -> AsyncIterator[None]:
    """Cancels the block after `seconds` and raises UpstreamTimeout, whose text says that `peer_name` did not answer."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise UpstreamTimeout(f"{peer_name} does not answer in time") from None


@dataclass(slots=True)
class _KeySlots:
    """The semaphore of one key, and the number of tasks that hold a slot of it or wait for one."""

    semaphore: asyncio.Semaphore
    users: int = 0


class KeyedSemaphore:
    """A semaphore with `slots_per_key` slots for each key. A key that no task uses takes no memory."""

    def __init__(self, slots_per_key: int) -> None:
        self._slots_per_key = slots_per_key
        self._by_key: dict[str, _KeySlots] = {}

    @asynccontextmanager
    async def acquire(self, key: str) -> AsyncIterator[None]:
        """Holds a slot of `key` during the block. Waits for a free slot; tasks get slots in the order of arrival."""
        if key not in self._by_key:
            self._by_key[key] = _KeySlots(asyncio.Semaphore(self._slots_per_key))
        slots = self._by_key[key]
        slots.users += 1
        try:
            async with slots.semaphore:
                yield
        finally:
            slots.users -= 1
            if not slots.users:
                del self._by_key[key]


async def wait_uncancelled(future: Awaitable[Any]) -> None:
    """Waits until `future` is done, even if the waiting task is cancelled. Drops the future's result or exception."""
    waiting = asyncio.ensure_future(future)
    while not waiting.done():
        try:
            await asyncio.wait([waiting])
        except asyncio.CancelledError:
            continue
    if not waiting.cancelled():
        waiting.exception()  # marks it as retrieved, so that asyncio logs nothing
