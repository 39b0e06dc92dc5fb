"""Limits of requests to upstreams: time, size, and requests at a time for one key."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any

from registry import __version__
from storage.errors import UpstreamTimeout

KIB, MIB = 1 << 10, 1 << 20
SMALL_ANSWER = 64 * KIB
"""Largest body, in bytes, of a response that is neither a manifest nor a list."""
ANSWER_TIMEOUT_SECONDS = 10.0
"""Time for a request other than a blob's, over all endpoints and including the token it needs. docker waits 15 s for a
mirror before it asks the next one."""
COMMON_HEADERS = {"User-Agent": f"entrepot/{__version__}", "Accept-Encoding": "identity"}
"""Headers of every request. Content that is compressed in transit would not match its digest."""


@asynccontextmanager
async def time_limit(seconds: float, who: str) -> AsyncIterator[None]:
    """Raises UpstreamTimeout, which names `who`, when the block takes longer than `seconds`."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise UpstreamTimeout(f"{who} does not answer in time") from None


class KeyedSemaphore:
    """A semaphore of `most` slots for each key. A key without users takes no memory."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._semaphores: dict[str, tuple[asyncio.Semaphore, int]] = {}
        """The semaphore of each key, and the number of tasks that hold it or wait for it."""

    @asynccontextmanager
    async def acquire(self, key: str) -> AsyncIterator[None]:
        """Holds a slot of `key` during the block. Waits in order of arrival."""
        semaphore, users = self._semaphores.get(key) or (asyncio.Semaphore(self._most), 0)
        self._semaphores[key] = semaphore, users + 1
        try:
            async with semaphore:
                yield
        finally:
            semaphore, users = self._semaphores[key]
            if users > 1:
                self._semaphores[key] = semaphore, users - 1
            else:
                del self._semaphores[key]


async def wait_uncancelled(future: Awaitable[Any]) -> None:
    """Waits until `future` is done. Ignores cancellation meanwhile, and the outcome."""
    waiting = asyncio.ensure_future(future)
    while not waiting.done():
        try:
            await asyncio.wait([waiting])
        except asyncio.CancelledError:
            continue
    if not waiting.cancelled():
        waiting.exception()
