"""Connection slots: the limit of connections to one upstream, over all processes, and who gets one first.

`Demand` tells who wants a blob whose fill runs: its readers, the offsets they wait at, and the pulls it was started
for.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final

from registry.mirror.upstream_client import UpstreamClient
from storage.leases import Leases

SPARE_CONNECTIONS: Final = 2
"""Connections that a fill without waiting clients leaves to others."""
YIELD_SECONDS: Final = 0.015
"""Time in which a waiting fill checks for a free slot again."""
SPARE_POLL_SECONDS: Final = 0.04
"""Time between two checks for a free slot by a fill without waiting clients."""


class ConnectionSlots:
    """The slots of one upstream. Only fills that a client waits for queue for a slot; others poll."""

    def __init__(self, leases: Leases, upstream: UpstreamClient) -> None:
        self._leases = leases
        self._upstream = upstream
        self._name = f"upstream-{upstream.name}"

    @property
    def most(self) -> int:
        return self._upstream.connections

    @property
    def _spared(self) -> int:
        return min(SPARE_CONNECTIONS, self.most - 1)

    async def wait_for_spare(self) -> None:
        """Waits, in order of arrival, until a slot is free beyond the spare ones."""
        async with self._leases.slot(self._name, self.most, self._spared):
            return

    @asynccontextmanager
    async def primary(self, demand: Demand, *, new: bool) -> AsyncIterator[bool]:
        """Holds a slot for a fill's only connection. A `new` fill queues; one that continues with its next piece lets
        waiting fills go first. While no client waits for the blob, some slots stay free for blobs with waiting clients.
        Yields False when the blob is not wanted any more."""
        while not demand.requested.is_set() and demand.is_alive():
            async with self._leases.try_slot(self._name, self.most, self._spared) as free:
                if free:
                    yield True
                    return
            try:
                async with asyncio.timeout(SPARE_POLL_SECONDS):
                    await demand.requested.wait()
            except TimeoutError:
                continue
        if not demand.requested.is_set():
            yield False
            return
        if not new:
            async with self._leases.try_slot(self._name, self.most, 1) as free:
                if free:
                    yield True
                    return
            await asyncio.sleep(YIELD_SECONDS)
        async with self._leases.slot(self._name, self.most):
            yield True

    @asynccontextmanager
    async def additional(self, demand: Demand) -> AsyncIterator[bool]:
        """Holds a slot for one more connection. Takes slots that others leave free; takes the last one only if it stays
        free for a moment. Yields whether there was a slot."""
        asked = demand.requested.is_set()
        async with self._leases.try_slot(
            self._name, self.most, min(1 if asked else SPARE_CONNECTIONS + 1, self.most - 1)
        ) as free:
            if free:
                yield True
                return
        if not asked:
            yield False
            return
        await asyncio.sleep(YIELD_SECONDS)
        async with self._leases.try_slot(self._name, self.most) as free:
            yield free


PULL_LINGER_SECONDS: Final = 60.0
"""Time for which prefetching continues after the last sign of the pull it belongs to."""


class ImagePull:
    """An image that a client is pulling. `clock`: monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._readers = 0
        self._last = clock()

    def enter(self) -> None:
        """Called when a reader of one of the image's blobs starts."""
        self._readers += 1

    def leave(self) -> None:
        """Called when such a reader ends."""
        self._readers -= 1
        self._last = self._clock()

    def touch(self) -> None:
        """Called at every other sign of the pull."""
        self._last = self._clock()

    def is_active(self) -> bool:
        """Returns whether readers are left or the last sign is recent."""
        return self._readers > 0 or self._clock() - self._last < PULL_LINGER_SECONDS


class Demand:
    """Who wants a blob. `requested`: a client of any process has asked for it, so it is fetched to its end. Otherwise
    it is fetched as long as one of `pulls` is active."""

    def __init__(self) -> None:
        self.requested = asyncio.Event()
        self.pulls: set[ImagePull] = set()
        self._offsets: Counter[int] = Counter()

    def request(self) -> None:
        """Records that a client asks for the blob."""
        self.requested.set()

    def is_alive(self) -> bool:
        """Returns whether the fill should go on."""
        return self.requested.is_set() or any(pull.is_active() for pull in self.pulls)

    @property
    def offsets(self) -> list[int]:
        """The offsets at which readers wait."""
        return list(self._offsets)

    @contextmanager
    def waiting(self, at: int) -> Iterator[None]:
        """Registers a reader that waits at an offset, during the block."""
        self._offsets[at] += 1
        try:
            yield
        finally:
            self._offsets[at] -= 1
            if not self._offsets[at]:
                del self._offsets[at]
