"""Freed memory is returned to the system without blocking the event loop."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator

import pytest

from registry.server.process.free_memory import FEW_CONNECTIONS, TRIM_BYTES, TRIM_PAUSES, MemoryTrimmer, trim_memory

pytestmark = pytest.mark.slow


class Cycle:
    """An object that only the garbage collector can free."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def by_hand() -> Iterator[None]:
    """Disables automatic garbage collection, and returns the free memory of earlier tests to the system, so that the
    memory of this test makes the process grow."""
    trim_memory()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize(("connections", "collected"), [(FEW_CONNECTIONS, True), (FEW_CONNECTIONS + 1, False)])
async def test_a_busy_worker_collects_only_what_is_new(by_hand: None, connections: int, collected: bool) -> None:
    """A worker with many connections collects only new garbage, because to examine all objects of thousands of
    connections would take 100 ms."""
    memory = MemoryTrimmer(asyncio.get_running_loop(), range(connections))
    old, new = Cycle(), None
    gc.collect()  # it is old now
    new = Cycle()
    gone = weakref.ref(old), weakref.ref(new)
    del old, new
    large = b"x" * (2 * TRIM_BYTES)
    memory.release_if_due(1000.0)
    del large
    assert [each() is None for each in gone] == [collected, True]


async def test_memory_that_comes_and_goes_is_given_back_soon(by_hand: None) -> None:
    """Attempts to release memory become rare while they find nothing, and frequent again after memory was used."""
    memory = MemoryTrimmer(asyncio.get_running_loop(), ())
    held, now = [b"x" * (2 * TRIM_BYTES)], 1000.0
    for _ in range(10):
        now += TRIM_PAUSES[1]
        memory.release_if_due(now)
    held.append(b"x" * TRIM_BYTES)
    memory.release_if_due(now + 1)
    garbage = Cycle()
    gone = weakref.ref(garbage)
    del garbage
    memory.release_if_due(now + 1 + TRIM_PAUSES[0])
    assert gone() is None
