"""Turns and slots, in one process and over several."""

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
async def turns(tmp_path: Path) -> AsyncIterator[FileLeases]:
    opened = FileLeases(tmp_path / "turns", System())
    yield opened
    opened.close()


async def test_a_turn_is_had_by_one_at_a_time_in_the_order_of_asking(turns: FileLeases) -> None:
    """Twenty ask for one key: no two have it at once, first come first served; another key is free meanwhile."""
    order: list[int] = []
    inside = 0

    async def one(number: int) -> None:
        nonlocal inside
        async with turns.take("token docker.io"):
            inside += 1
            assert inside == 1
            async with turns.take("token ghcr.io"):
                await asyncio.sleep(0)
            order.append(number)
            inside -= 1

    await asyncio.gather(*map(one, range(20)))
    assert order == list(range(20))


async def test_two_openings_of_the_file_exclude_each_other(turns: FileLeases, tmp_path: Path) -> None:
    """As two processes do."""
    neighbour = FileLeases(tmp_path / "turns", System())
    async with neighbour.take("a"), neighbour.slot("n", 1):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02), turns.take("a"):
                pass
        async with turns.try_slot("n", 1) as have:
            assert not have
        waiting = asyncio.create_task(_had(turns, "a"))
        await asyncio.sleep(0)
        assert not waiting.done()
    await waiting
    neighbour.close()


async def _had(turns: FileLeases, key: str) -> None:
    async with turns.take(key):
        pass


async def test_who_is_cancelled_leaves_the_turn_to_the_next(turns: FileLeases) -> None:
    """While waiting, while having it, and when it raises."""
    async with turns.take("a"):
        waiting = [asyncio.create_task(_had(turns, "a")) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        waiting[1].cancel()
    await asyncio.wait(waiting)
    assert [task.cancelled() for task in waiting] == [True, True, False]
    with pytest.raises(ValueError, match="oops"):
        async with turns.take("a"), turns.slot("n", 1):
            raise ValueError("oops")
    async with asyncio.timeout(60), turns.take("a"), turns.slot("n", 1):
        pass


async def test_as_many_have_a_slot_as_there_are(turns: FileLeases) -> None:
    """Thirty want one of four slots: never more than four at once, and all get their turn."""
    inside = most = done = 0

    async def one() -> None:
        nonlocal inside, most, done
        async with turns.slot("docker.io", 4):
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0.002)
            inside -= 1
            done += 1

    await asyncio.gather(*(one() for _ in range(30)))
    assert most == 4
    assert done == 30


async def test_who_leaves_some_free_lets_the_urgent_through(turns: FileLeases) -> None:
    """With two of three slots to be left, one is had at the most; who leaves none gets the others at once, also past
    those that wait to leave some."""
    async with AsyncExitStack() as stack:
        assert await stack.enter_async_context(turns.try_slot("n", 3, keep_free=2))
        async with turns.try_slot("n", 3, keep_free=2) as second:
            assert not second
        prefetch = asyncio.create_task(_slot(turns, 3, 2))
        await asyncio.sleep(0)
        async with asyncio.timeout(60), turns.slot("n", 3), turns.slot("n", 3):
            async with turns.try_slot("n", 3) as third:
                assert not third
            assert not prefetch.done()
    async with asyncio.timeout(60):
        await prefetch


async def _slot(turns: FileLeases, count: int, leave: int) -> None:
    async with turns.slot("n", count, leave):
        pass


async def test_nothing_is_kept_of_keys_that_nobody_uses(turns: FileLeases) -> None:
    """After a thousand keys there is nothing left to remember, and the file is empty."""
    for number in range(1000):
        async with turns.take(f"manifest {number}"):
            pass
    assert not turns._queues._locks
    assert not turns._held_bytes


@pytest.mark.slow
async def test_turns_and_slots_hold_over_processes_and_fall_with_them(registry: StoredRegistry, data: Path) -> None:
    """What another process has is not to be had here; when it is killed it is, within a moment."""
    turns = registry.leases
    async with partial_peer(data) as first, partial_peer(data) as second:
        await first.ask("take", "tag docker.io/library/ubuntu:18.04")
        await first.ask("slot", "docker.io", 2)
        assert await second.ask("try", "docker.io", 2, 1) is False
        assert await second.ask("try", "docker.io", 2) is True
        async with turns.try_slot("docker.io", 2) as have:
            assert not have
        await second.start("take", "tag docker.io/library/ubuntu:18.04")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05), turns.take("tag docker.io/library/ubuntu:18.04"):
                pass
        await first.kill()
        await second.answer()
        async with asyncio.timeout(60), turns.slot("docker.io", 2):
            pass
        await second.ask("leave")
        async with asyncio.timeout(60), turns.take("tag docker.io/library/ubuntu:18.04"):
            pass
