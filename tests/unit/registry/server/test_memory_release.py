"""Tests of `MemoryTrimmer`: it decides when a worker collects garbage and returns free memory to the operating system,
without long pauses of the event loop."""

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
def no_automatic_collection() -> Iterator[None]:
    """Disables automatic garbage collection. First returns the free memory of earlier tests to the system, so that the
    process grows when the test uses memory."""
    trim_memory()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize(("connections", "collected"), [(FEW_CONNECTIONS, True), (FEW_CONNECTIONS + 1, False)])
async def test_a_worker_with_many_connections_collects_only_new_garbage(
    no_automatic_collection: None, connections: int, collected: bool
) -> None:
    """A worker with many connections collects only new garbage, because a collection that examines all objects of
    thousands of connections would take 100 ms. `collected`: whether old garbage is collected."""
    memory = MemoryTrimmer(asyncio.get_running_loop(), range(connections))
    old, new = Cycle(), None
    gc.collect()  # `old` is in the oldest generation now
    new = Cycle()
    references = weakref.ref(old), weakref.ref(new)
    del old, new
    large = b"x" * (2 * TRIM_BYTES)
    memory.trim_if_due(1000.0)
    del large
    assert [each() is None for each in references] == [collected, True]


async def test_full_collections_take_a_small_share_of_the_time(no_automatic_collection: None) -> None:
    """After a full collection, the trimmer makes the next one only when a thousand times the duration of the first has
    passed. Until then, it releases memory without collecting old garbage."""
    memory = MemoryTrimmer(asyncio.get_running_loop(), ())
    objects: list[list[None]] = [[] for _ in range(300_000)]  # a full collection takes more than 5 ms
    used_memory, now = [b"x" * (2 * TRIM_BYTES)], 1000.0
    memory.trim_if_due(now)
    old = Cycle()
    references = [weakref.ref(old)]
    gc.collect()  # `old` is in the oldest generation now
    del old
    used_memory.append(b"x" * TRIM_BYTES)
    memory.trim_if_due(now + TRIM_PAUSES[0])
    assert references[0]() is not None
    memory.trim_if_due(now + 3600.0)
    assert references[0]() is None
    assert len(objects) == 300_000


async def test_memory_is_released_soon_after_it_was_used(no_automatic_collection: None) -> None:
    """While attempts to release memory find nothing to release, the pauses between them grow. After the process has
    used more memory, the pauses are short again."""
    memory = MemoryTrimmer(asyncio.get_running_loop(), ())
    used_memory, now = [b"x" * (2 * TRIM_BYTES)], 1000.0
    for _ in range(10):
        now += TRIM_PAUSES[1]
        memory.trim_if_due(now)
    used_memory.append(b"x" * TRIM_BYTES)
    memory.trim_if_due(now + 1)
    garbage = Cycle()
    references = weakref.ref(garbage)
    del garbage
    memory.trim_if_due(now + 1 + TRIM_PAUSES[0])
    assert references() is None
