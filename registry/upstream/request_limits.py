"""Limits of requests to upstreams (the registries that this registry mirrors):

- `time_limit` limits the time of a request.
- `hold_slot` limits how many requests run at a time.
- `KeyedSemaphore` limits how many requests run at a time for each key, such as a repository.
"""

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
"""Largest size, in bytes, of a response body that is expected to be small, such as that of an error."""
REQUEST_TIMEOUT_SECONDS = 10.0
"""Time limit for a request to an upstream, except requests for a list or for the bytes of a blob. The time includes
getting a token, and trying all endpoints (URLs) of the upstream. docker gives up a mirror after 15 s, so the limit is
lower."""
COMMON_HEADERS = {"User-Agent": f"entrepot/{__version__}", "Accept-Encoding": "identity"}
"""Headers of every request to an upstream. `identity` asks for an uncompressed body: a compressed body would not have
the digest of the content."""


@asynccontextmanager
async def time_limit(seconds: float, peer_name: str) -> AsyncIterator[None]:
    """Limits the time of the `async with` block. After `seconds`, cancels the block and raises UpstreamTimeout, which
    says that `peer_name` does not answer in time."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise UpstreamTimeout(f"{peer_name} does not answer in time") from None


@asynccontextmanager
async def hold_slot(semaphore: asyncio.Semaphore) -> AsyncIterator[None]:
    """Waits for a free slot of the semaphore, and holds the slot during the `async with` block. Tasks get slots in the
    order in which they started to wait.

    A task of `SingleFlight` may be cancelled while it waits for a slot, if no caller needs the task's result any more
    (`waiting_to_send`)."""
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
    task_count: int = 0
    """The number of tasks that hold a slot or wait for one."""


class KeyedSemaphore:
    """Limits concurrent tasks for each key: at most `slots_per_key` tasks hold a slot of the key at a time. A key
    without tasks takes no memory."""

    def __init__(self, slots_per_key: int) -> None:
        self._slots_per_key = slots_per_key
        self._by_key: dict[str, _KeySlots] = {}

    @asynccontextmanager
    async def acquire(self, key: str) -> AsyncIterator[None]:
        """Waits for a free slot of `key`, and holds the slot during the `async with` block (see `hold_slot`)."""
        if key not in self._by_key:
            self._by_key[key] = _KeySlots(asyncio.Semaphore(self._slots_per_key))
        slots = self._by_key[key]
        slots.task_count += 1
        try:
            async with hold_slot(slots.semaphore):
                yield
        finally:
            slots.task_count -= 1
            if not slots.task_count:
                del self._by_key[key]
