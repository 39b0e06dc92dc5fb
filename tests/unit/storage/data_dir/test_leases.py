"""Leases and slots, in one process and over several. A *lease* is the exclusive right to do some work, a *slot* one of
a limited number of permits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from storage.data_dir.file_leases import FileLeases
from storage.data_dir.system import System
from storage.store.stored_registry import StoredRegistry
from tests.fakes.partial_peer import partial_peer


@pytest.fixture
async def leases(tmp_path: Path) -> AsyncIterator[FileLeases]:
    opened = FileLeases(tmp_path / "leases", System())
    yield opened
    opened.close()


async def test_a_lease_is_had_by_one_at_a_time_in_the_order_of_asking(leases: FileLeases) -> None:
    """Twenty tasks that take the lease of one key get it one at a time, in the order of their calls. The lease of
    another key is free meanwhile."""
    order: list[int] = []
    inside = 0

    async def one(number: int) -> None:
        nonlocal inside
        async with leases.take("token docker.io"):
            inside += 1
            assert inside == 1
            async with leases.take("token ghcr.io"):
                await asyncio.sleep(0)
            order.append(number)
            inside -= 1

    await asyncio.gather(*map(one, range(20)))
    assert order == list(range(20))


async def test_two_openings_of_the_file_exclude_each_other(leases: FileLeases, tmp_path: Path) -> None:
    """Two openings of the file in one process exclude each other, as those of two processes do."""
    neighbour = FileLeases(tmp_path / "leases", System())
    async with neighbour.take("a"), neighbour.slot("n", 1):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02), leases.take("a"):
                pass
        async with leases.try_slot("n", 1) as have:
            assert not have
        waiting = asyncio.create_task(_had(leases, "a"))
        await asyncio.sleep(0)
        assert not waiting.done()
    await waiting
    neighbour.close()


async def _had(leases: FileLeases, key: str) -> None:
    async with leases.take(key):
        pass


async def test_who_is_cancelled_leaves_the_lease_to_the_next(leases: FileLeases) -> None:
    """A task that is cancelled while it waits, and a block that raises, leave the lease to the next task."""
    async with leases.take("a"):
        waiting = [asyncio.create_task(_had(leases, "a")) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        waiting[1].cancel()
    await asyncio.wait(waiting)
    assert [task.cancelled() for task in waiting] == [True, True, False]
    with pytest.raises(ValueError, match="oops"):
        async with leases.take("a"), leases.slot("n", 1):
            raise ValueError("oops")
    async with asyncio.timeout(60), leases.take("a"), leases.slot("n", 1):
        pass


async def test_as_many_have_a_slot_as_there_are(leases: FileLeases) -> None:
    """Of thirty tasks that take one of four slots, never more than four have one, and all get one in the end."""
    inside = most = done = 0

    async def one() -> None:
        nonlocal inside, most, done
        async with leases.slot("docker.io", 4):
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0.002)
            inside -= 1
            done += 1

    await asyncio.gather(*(one() for _ in range(30)))
    assert most == 4
    assert done == 30


async def test_who_leaves_some_free_lets_the_urgent_through(leases: FileLeases) -> None:
    """With `keep_free=2`, only one of three slots can be taken. A task without `keep_free` gets the other two at once,
    also before tasks that wait with `keep_free`."""
    async with AsyncExitStack() as stack:
        assert await stack.enter_async_context(leases.try_slot("n", 3, keep_free=2))
        async with leases.try_slot("n", 3, keep_free=2) as second:
            assert not second
        prefetch = asyncio.create_task(_slot(leases, 3, 2))
        await asyncio.sleep(0)
        async with asyncio.timeout(60), leases.slot("n", 3), leases.slot("n", 3):
            async with leases.try_slot("n", 3) as third:
                assert not third
            assert not prefetch.done()
    async with asyncio.timeout(60):
        await prefetch


async def _slot(leases: FileLeases, count: int, leave: int) -> None:
    async with leases.slot("n", count, leave):
        pass


async def test_nothing_is_kept_of_keys_that_nobody_uses(leases: FileLeases) -> None:
    """After a thousand keys were used, no memory is used for them."""
    for number in range(1000):
        async with leases.take(f"manifest {number}"):
            pass
    assert not leases._queues._locks
    assert not leases._held_bytes


@pytest.mark.slow
async def test_turns_and_slots_hold_over_processes_and_fall_with_them(registry: StoredRegistry, data: Path) -> None:
    """A lease or slot of another process cannot be taken here. After the other process was killed, it can, within a
    moment."""
    leases = registry.leases
    async with partial_peer(data) as first, partial_peer(data) as second:
        await first.ask("take", "tag docker.io/library/ubuntu:18.04")
        await first.ask("slot", "docker.io", 2)
        assert await second.ask("try", "docker.io", 2, 1) is False
        assert await second.ask("try", "docker.io", 2) is True
        async with leases.try_slot("docker.io", 2) as have:
            assert not have
        await second.start("take", "tag docker.io/library/ubuntu:18.04")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05), leases.take("tag docker.io/library/ubuntu:18.04"):
                pass
        await first.kill()
        await second.answer()
        async with asyncio.timeout(60), leases.slot("docker.io", 2):
            pass
        await second.ask("leave")
        async with asyncio.timeout(60), leases.take("tag docker.io/library/ubuntu:18.04"):
            pass
