"""While a backup holds removals back, no process removes blobs. Otherwise many may remove blobs at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack, closing
from pathlib import Path

import pytest

from storage.data_dir.file_leases import FileLeases
from storage.data_dir.system import System
from storage.upkeep.removal_gate import SLOT_COUNT, removal_slot, removals_held_back


@pytest.fixture
def collector(tmp_path: Path) -> Iterator[FileLeases]:
    """The leases of one process."""
    with closing(FileLeases(tmp_path / "leases", System())) as leases:
        yield leases


@pytest.fixture
def backup(tmp_path: Path) -> Iterator[FileLeases]:
    """The leases of another process."""
    with closing(FileLeases(tmp_path / "leases", System())) as leases:
        yield leases


async def may_remove(leases: FileLeases) -> bool:
    async with removal_slot(leases) as has_slot:
        return has_slot


async def test_removals_are_held_back(collector: FileLeases, backup: FileLeases) -> None:
    assert await may_remove(collector)
    async with removals_held_back(backup):
        assert not await may_remove(collector)
        assert not await may_remove(backup)
    assert await may_remove(collector)


async def test_several_remove_at_the_same_time(collector: FileLeases) -> None:
    async with AsyncExitStack() as stack:
        slots = [await stack.enter_async_context(removal_slot(collector)) for _ in range(SLOT_COUNT + 1)]
    assert slots == [True] * SLOT_COUNT + [False]


async def test_holding_back_waits_for_a_running_removal(collector: FileLeases, backup: FileLeases) -> None:
    """A backup waits until running removals have ended. No further removal begins during this wait."""
    held = asyncio.Event()

    async def hold() -> None:
        async with removals_held_back(backup):
            held.set()

    async with removal_slot(collector) as has_slot:
        assert has_slot
        holding = asyncio.create_task(hold())
        for _ in range(100):
            if not await may_remove(collector):
                break
            await asyncio.sleep(0.01)
        assert not await may_remove(collector)
        assert not held.is_set()
    async with asyncio.timeout(10):
        await holding
    assert held.is_set()


async def test_a_dead_process_holds_nothing_back(collector: FileLeases, tmp_path: Path) -> None:
    backup = FileLeases(tmp_path / "leases", System())
    async with removals_held_back(backup):
        assert not await may_remove(collector)
        backup.close()  # as the kernel does at the end of a process
        assert await may_remove(collector)
