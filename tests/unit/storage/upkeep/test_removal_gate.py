"""The gate for removals of blobs. A process may remove blobs only while it holds one of the `SLOT_COUNT` removal slots.
It gets a slot only if at least half of all slots stay free. A backup blocks removals: it takes each slot as soon as the
slot is free, until it holds all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack, closing
from pathlib import Path

import pytest

from storage.data_dir.file_leases import FileLeases
from storage.data_dir.system import System
from storage.upkeep.removal_gate import SLOT_COUNT, SLOT_NAME, blob_removals_blocked, removal_slot


@pytest.fixture
def collector(tmp_path: Path) -> Iterator[FileLeases]:
    """The leases of a process that collects garbage."""
    with closing(FileLeases(tmp_path / "leases", System())) as leases:
        yield leases


@pytest.fixture
def backup(tmp_path: Path) -> Iterator[FileLeases]:
    """The leases of a process that makes a backup."""
    with closing(FileLeases(tmp_path / "leases", System())) as leases:
        yield leases


async def may_remove(leases: FileLeases) -> bool:
    """Tries to take a removal slot, and releases it at once. Returns whether there was one to take."""
    async with removal_slot(leases) as has_slot:
        return has_slot


async def test_a_backup_blocks_removals(collector: FileLeases, backup: FileLeases) -> None:
    """While a backup blocks removals, neither another process nor the process of the backup may remove blobs."""
    assert await may_remove(collector)
    async with blob_removals_blocked(backup):
        assert not await may_remove(collector)
        assert not await may_remove(backup)
    assert await may_remove(collector)


async def test_a_limited_number_of_removals_at_the_same_time(collector: FileLeases) -> None:
    """As each removal leaves half of all slots free, removals can hold the other half at the same time, and no more."""
    async with AsyncExitStack() as stack:
        slots = [await stack.enter_async_context(removal_slot(collector)) for _ in range(SLOT_COUNT)]
    assert slots == [True] * (SLOT_COUNT // 2) + [False] * (SLOT_COUNT // 2)


async def test_a_backup_waits_for_a_running_removal(collector: FileLeases, backup: FileLeases) -> None:
    """A backup waits until running removals have ended. While it waits, no other removal can begin."""
    are_blocked = asyncio.Event()

    async def block_removals() -> None:
        async with blob_removals_blocked(backup):
            are_blocked.set()

    async with removal_slot(collector) as has_slot:
        assert has_slot
        blocking = asyncio.create_task(block_removals())
        for _ in range(100):
            if not await may_remove(collector):
                break
            await asyncio.sleep(0.01)
        assert not await may_remove(collector)
        assert not are_blocked.is_set()
    async with asyncio.timeout(10):
        await blocking
    assert are_blocked.is_set()


@pytest.mark.parametrize("removals", [1, SLOT_COUNT // 2])
async def test_no_removal_begins_while_a_backup_waits(collector: FileLeases, backup: FileLeases, removals: int) -> None:
    """While a backup waits for running removals, no process can begin another removal, even if all of the running ones
    end before the backup polls again: too few slots are free then, because the backup holds the others. So a backup
    waits for one removal, not for a whole garbage collection."""
    async with AsyncExitStack() as backup_slots:
        async with AsyncExitStack() as running_removals:
            for _ in range(removals):
                assert await running_removals.enter_async_context(removal_slot(collector))
            for _ in range(SLOT_COUNT - removals):  # a waiting backup holds all other slots
                assert await backup_slots.enter_async_context(backup.try_slot(SLOT_NAME, SLOT_COUNT))
        # The running removals have ended, so `removals` slots are free. A removal that took one of them would leave
        # less than half of all slots free.
        assert not await may_remove(collector)
    assert await may_remove(collector)


async def test_a_dead_process_does_not_block_removals(collector: FileLeases, tmp_path: Path) -> None:
    """If the process of a backup ends without releasing its lock, removals are possible again."""
    backup = FileLeases(tmp_path / "leases", System())
    async with blob_removals_blocked(backup):
        assert not await may_remove(collector)
        backup.close()  # as the kernel does at the end of a process
        assert await may_remove(collector)
