"""The connections to one upstream: as many as are set, over all processes, and who comes first.

Who wants a blob that is on its way in: its readers, where they wait, and the pulls it was begun for.
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
"""Connections that a fetch nobody waits for leaves to others."""
YIELD_SECONDS: Final = 0.015
"""Seconds in which whoever waits for a slot has looked again."""
SPARE_POLL_SECONDS: Final = 0.04
"""Seconds between two looks of what nobody waits for."""


class ConnectionSlots:
    """Only what fetches for somebody waits in line."""

    def __init__(self, turns: Leases, source: UpstreamClient) -> None:
        self._turns = turns
        self._source = source
        self._name = f"upstream-{source.name}"

    @property
    def most(self) -> int:
        return self._source.connections

    @property
    def _spared(self) -> int:
        return min(SPARE_CONNECTIONS, self.most - 1)

    async def room(self) -> None:
        """Waits until there is one for what nobody waits for, in the order of asking."""
        async with self._turns.slot(self._name, self.most, self._spared):
            return

    @asynccontextmanager
    async def first(self, demand: Demand, *, new: bool) -> AsyncIterator[bool]:
        """For a fetch's only connection: waits for a slot, and for its next piece (not `new`) behind those who wait
        already. While nobody waits for the blob, a few slots stay free for those somebody waits for. False: it is not
        wanted any more."""
        while not demand.asked.is_set() and demand.alive():
            async with self._turns.try_slot(self._name, self.most, self._spared) as free:
                if free:
                    yield True
                    return
            try:
                async with asyncio.timeout(SPARE_POLL_SECONDS):
                    await demand.asked.wait()
            except TimeoutError:
                continue
        if not demand.asked.is_set():
            yield False
            return
        if not new:
            async with self._turns.try_slot(self._name, self.most, 1) as free:
                if free:
                    yield True
                    return
            await asyncio.sleep(YIELD_SECONDS)
        async with self._turns.slot(self._name, self.most):
            yield True

    @asynccontextmanager
    async def additional(self, demand: Demand) -> AsyncIterator[bool]:
        """For one more: takes what others leave, and the last one only when nobody else takes it for a moment; whether
        there was one."""
        asked = demand.asked.is_set()
        async with self._turns.try_slot(
            self._name, self.most, min(1 if asked else SPARE_CONNECTIONS + 1, self.most - 1)
        ) as free:
            if free:
                yield True
                return
        if not asked:
            yield False
            return
        await asyncio.sleep(YIELD_SECONDS)
        async with self._turns.try_slot(self._name, self.most) as free:
            yield free


PULL_LINGER_SECONDS: Final = 60.0
"""Seconds for which a blob that nobody asked for is fetched on, after the last sign of the pull it belongs to."""


class ImagePull:
    """An image that is being pulled. `clock` runs on, in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._readers = 0
        self._last = clock()

    def enter(self) -> None:
        self._readers += 1

    def leave(self) -> None:
        self._readers -= 1
        self._last = self._clock()

    def touch(self) -> None:
        self._last = self._clock()

    def active(self) -> bool:
        return self._readers > 0 or self._clock() - self._last < PULL_LINGER_SECONDS


class Demand:
    """`asked`: a client wants it, or did, of whichever process: it is fetched to its end, whoever leaves. Without that
    it was begun ahead of its readers, for the sake of `pulls`."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.pulls: set[ImagePull] = set()
        self._offsets: Counter[int] = Counter()

    def ask(self) -> None:
        self.asked.set()

    def alive(self) -> bool:
        """Whether it is to be fetched on."""
        return self.asked.is_set() or any(pull.active() for pull in self.pulls)

    @property
    def offsets(self) -> list[int]:
        """Where readers wait."""
        return list(self._offsets)

    @contextmanager
    def waiting(self, at: int) -> Iterator[None]:
        self._offsets[at] += 1
        try:
            yield
        finally:
            self._offsets[at] -= 1
            if not self._offsets[at]:
                del self._offsets[at]
