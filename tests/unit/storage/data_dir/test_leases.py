"""Leases and slots, within one process and between processes. A *lease* is the exclusive right to do some work. A
*slot* is one of a limited number of permits. Each lease and each slot is the lock on one byte of a file."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from math import inf
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


async def test_a_lease_has_one_owner_at_a_time_in_the_order_of_requests(leases: FileLeases) -> None:
    """Twenty tasks request the lease of the same key. They get it one at a time, in the order of their calls. Meanwhile
    the lease of another key is free."""
    order: list[int] = []
    owners = 0

    async def take_both(number: int) -> None:
        nonlocal owners
        async with leases.take("token docker.io"):
            owners += 1
            assert owners == 1
            async with leases.take("token ghcr.io"):
                await asyncio.sleep(0)
            order.append(number)
            owners -= 1

    await asyncio.gather(*map(take_both, range(20)))
    assert order == list(range(20))


async def test_two_instances_for_the_same_file_exclude_each_other(leases: FileLeases, tmp_path: Path) -> None:
    """Two instances of `FileLeases` that open the same file in one process exclude each other, as the instances of two
    processes do."""
    other_leases = FileLeases(tmp_path / "leases", System())
    async with other_leases.take("a"), other_leases.slot("n", 1):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02), leases.take("a"):
                pass
        async with leases.try_slot("n", 1) as has_slot:
            assert not has_slot
        waiting_task = asyncio.create_task(_take_and_release(leases, "a"))
        await asyncio.sleep(0)
        assert not waiting_task.done()
    await waiting_task
    other_leases.close()


async def _take_and_release(leases: FileLeases, key: str) -> None:
    async with leases.take(key):
        pass


async def test_lease_says_whether_it_was_waited_for(leases: FileLeases, tmp_path: Path) -> None:
    """The owner of a lease learns whether another task or process had the lease when it asked for it."""
    other_leases = FileLeases(tmp_path / "leases", System())

    async def has_waited() -> bool:
        async with leases.take("a") as waited:
            return waited

    assert not await has_waited()
    for owner in (leases, other_leases):
        async with owner.take("a"):
            waiting = [asyncio.create_task(has_waited()) for _ in range(2)]
            await asyncio.sleep(0)
        assert await asyncio.gather(*waiting) == [True, True]
    other_leases.close()


async def test_a_cancelled_task_leaves_the_lease_to_the_next(leases: FileLeases) -> None:
    """If a task is cancelled while it waits for a lease, the next task gets the lease. If the owner of a lease raises
    an error, the lease is released."""
    async with leases.take("a"):
        waiting = [asyncio.create_task(_take_and_release(leases, "a")) for _ in range(3)]
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


async def test_no_more_tasks_have_a_slot_than_there_are_slots(leases: FileLeases) -> None:
    """Thirty tasks share four slots. At most four tasks have a slot at the same time, and every task gets one in the
    end."""
    owners = most_owners = done = 0

    async def take_slot() -> None:
        nonlocal owners, most_owners, done
        async with leases.slot("docker.io", 4):
            owners += 1
            most_owners = max(most_owners, owners)
            await asyncio.sleep(0.002)
            owners -= 1
            done += 1

    await asyncio.gather(*(take_slot() for _ in range(30)))
    assert most_owners == 4
    assert done == 30


async def test_slots_that_are_kept_free_are_for_urgent_tasks(leases: FileLeases) -> None:
    """There are three slots. Tasks with `keep_free=2` can take only one of them. A task without `keep_free` gets the
    other two slots at once, even if a task with `keep_free` waits already."""
    async with AsyncExitStack() as stack:
        assert await stack.enter_async_context(leases.try_slot("n", 3, keep_free=2))
        async with leases.try_slot("n", 3, keep_free=2) as has_slot:
            assert not has_slot
        prefetch = asyncio.create_task(_take_and_release_slot(leases, 3, 2))
        await asyncio.sleep(0)
        async with asyncio.timeout(60), leases.slot("n", 3), leases.slot("n", 3):
            async with leases.try_slot("n", 3) as has_slot:
                assert not has_slot
            assert not prefetch.done()
    async with asyncio.timeout(60):
        await prefetch


async def _take_and_release_slot(leases: FileLeases, count: int, keep_free: int) -> None:
    async with leases.slot("n", count, keep_free):
        pass


async def test_urgent_tasks_get_a_free_slot_first(leases: FileLeases, tmp_path: Path) -> None:
    """Tasks of two processes wait for a slot. The urgent task, which has waited for the shortest time, gets it first.
    A task that is urgent after some time gets it before those that never become urgent. While an urgent task waits,
    `try_slot` takes none."""
    other_leases = FileLeases(tmp_path / "leases", System())
    order: list[str] = []

    async def take_slot(instance: FileLeases, name: str, urgent_after: float) -> None:
        async with instance.slot("n", 1, urgent_after=urgent_after):
            order.append(name)

    async with leases.slot("n", 1):
        waiting = [asyncio.create_task(take_slot(instance, "patient", inf)) for instance in (leases, other_leases) * 2]
        waiting.append(asyncio.create_task(take_slot(leases, "soon urgent", 0.01)))
        await _wait_for_urgent_task(leases)
        waiting.append(asyncio.create_task(take_slot(other_leases, "urgent", 0.0)))
        await _wait_for_urgent_task(other_leases)
    async with leases.try_slot("n", 1) as has_slot:
        assert not has_slot
    async with asyncio.timeout(60):
        await asyncio.gather(*waiting)
    assert order[2:] == ["patient"] * 4
    assert set(order[:2]) == {"urgent", "soon urgent"}
    other_leases.close()


async def test_an_urgent_task_that_is_cancelled_delays_nobody(leases: FileLeases) -> None:
    """An urgent task is cancelled while it waits for a slot. Then the slot can be taken without urgency."""
    async with leases.slot("n", 1):
        waiting = asyncio.create_task(_take_urgently(leases))
        await _wait_for_urgent_task(leases)
        waiting.cancel()
        await asyncio.wait([waiting])
    async with leases.try_slot("n", 1) as has_slot:
        assert has_slot


async def _wait_for_urgent_task(leases: FileLeases) -> None:
    """Waits until an urgent task of this process waits for a slot."""
    async with asyncio.timeout(60):
        while not leases._urgent_waits:  # noqa: ASYNC110  the other task does not signal the change
            await asyncio.sleep(0)


async def _take_urgently(leases: FileLeases) -> None:
    async with leases.slot("n", 1, urgent_after=0.0):
        pass


async def test_unused_keys_use_no_memory(leases: FileLeases) -> None:
    """After the leases of a thousand keys and an urgent slot were taken and released, no data about these is in
    memory."""
    for number in range(1000):
        async with leases.take(f"manifest {number}"):
            pass
    async with leases.slot("n", 1):
        waiting = asyncio.create_task(_take_urgently(leases))
        await _wait_for_urgent_task(leases)
    await waiting
    assert not leases._queues._locks
    assert not leases._urgent_waits
    assert not leases._held_bytes  # the offsets of the bytes of the file that this process has locked


@pytest.mark.slow
async def test_leases_and_slots_of_a_killed_process_are_released(registry: StoredRegistry, data: Path) -> None:
    """While one process has a lease or a slot, no other process can take it. After the process was killed, other
    processes can take its lease and slot."""
    leases = registry.leases
    async with partial_peer(data) as first, partial_peer(data) as second:
        await first.ask("take", "tag docker.io/library/ubuntu:18.04")
        await first.ask("slot", "docker.io", 2)
        assert await second.ask("try", "docker.io", 2, 1) is False
        assert await second.ask("try", "docker.io", 2) is True
        async with leases.try_slot("docker.io", 2) as has_slot:
            assert not has_slot
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
