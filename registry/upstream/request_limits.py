"""Limits of requests to upstreams: their time (`time_limit`), their sizes (constants), and how many run at a time
(`hold_slot`; `KeyedSemaphore`, with one limit for each key, such as a repository)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from registry import __version__
from registry.single_flight import waiting_to_send
from storage.errors import UpstreamTimeout

KIB, MIB = 1 << 10, 1 << 20
SMALL_BODY_BYTES = 64 * KIB
"""Largest body of a response that is expected to be small, such as an error."""
REQUEST_TIMEOUT_SECONDS = 10.0
"""Time limit for a request to an upstream. Requests for a list or for the bytes of a blob have other limits. The time
includes getting a token, and trying all endpoints (URLs) of the upstream. docker gives up a mirror after 15 s."""
COMMON_HEADERS = {"User-Agent": f"entrepot/{__version__}", "Accept-Encoding": "identity"}
"""Headers of every request to an upstream. `identity` asks for uncompressed bodies, because the bytes of a compressed
body would not match the digest of the content."""


@asynccontextmanager
async def time_limit(seconds: float, peer_name: str) -> AsyncIterator[None]:
    """Limits the time of the `async with` block. After `seconds`, cancels the block and raises UpstreamTimeout, whose
    text says that `peer_name` does not answer."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise UpstreamTimeout(f"{peer_name} does not answer in time") from None


@asynccontextmanager
async def hold_slot(semaphore: asyncio.Semaphore) -> AsyncIterator[None]:
    """Waits for a free slot of the semaphore, and holds it during the `async with` block. Tasks get slots in the order
    in which they started to wait.

    A task of a `SingleFlight` can have several callers. If it waits here before it has sent a request, and all its
    callers leave, the task is cancelled (`waiting_to_send`)."""
    if semaphore.locked():
        with waiting_to_send():
            await semaphore.acquire()
    else:
        await semaphore.acquire()
    try:
        yield
    finally:
        semaphore.release()


@dataclass(slots=True)
class _KeySlots:
    """The slots of one key."""

    semaphore: asyncio.Semaphore
    users: int = 0
    """The number of tasks that hold a slot or wait for one."""


class KeyedSemaphore:
    """Limits concurrent tasks for each key: at most `slots_per_key` tasks hold a slot of a key at a time. A key that no
    task uses takes no memory."""

    def __init__(self, slots_per_key: int) -> None:
        self._slots_per_key = slots_per_key
        self._by_key: dict[str, _KeySlots] = {}

    @asynccontextmanager
    async def acquire(self, key: str) -> AsyncIterator[None]:
        """Waits for a free slot of `key`, and holds it during the `async with` block: see `hold_slot`."""
        if key not in self._by_key:
            self._by_key[key] = _KeySlots(asyncio.Semaphore(self._slots_per_key))
        slots = self._by_key[key]
        slots.users += 1
        try:
            async with hold_slot(slots.semaphore):
                yield
        finally:
            slots.users -= 1
            if not slots.users:
                del self._by_key[key]
