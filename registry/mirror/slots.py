"""The connections to one upstream: as many as are set, over all processes, and who comes first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from registry.mirror.demand import Demand
from registry.mirror.source import Source
from storage.interface import Turns

SPARED: Final = 2
"""Connections that a fetch nobody waits for leaves to others."""
YIELD: Final = 0.015
"""Seconds in which whoever waits for a slot has looked again."""
LOOK: Final = 0.04
"""Seconds between two looks of what nobody waits for."""


class Slots:
    """Only what fetches for somebody waits in line."""

    def __init__(self, turns: Turns, source: Source) -> None:
        self._turns = turns
        self._source = source
        self._name = f"upstream-{source.name}"

    @property
    def most(self) -> int:
        return self._source.connections

    @property
    def _spared(self) -> int:
        return min(SPARED, self.most - 1)

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
                async with asyncio.timeout(LOOK):
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
            await asyncio.sleep(YIELD)
        async with self._turns.slot(self._name, self.most):
            yield True

    @asynccontextmanager
    async def further(self, demand: Demand) -> AsyncIterator[bool]:
        """For one more: takes what others leave, and the last one only when nobody else takes it for a moment; whether
        there was one."""
        asked = demand.asked.is_set()
        async with self._turns.try_slot(self._name, self.most, min(1 if asked else SPARED + 1, self.most - 1)) as free:
            if free:
                yield True
                return
        if not asked:
            yield False
            return
        await asyncio.sleep(YIELD)
        async with self._turns.try_slot(self._name, self.most) as free:
            yield free
