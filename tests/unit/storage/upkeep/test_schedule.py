"""Rounds of upkeep."""

from __future__ import annotations

import asyncio
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from storage.data_dir.file_leases import FileLeases
from storage.data_dir.system import System
from storage.errors import StorageFailed
from storage.upkeep.schedule import cancel_all, run_rounds


async def test_one_process_does_the_work_and_another_takes_it_over(tmp_path: Path) -> None:
    """Of two processes with the same file of leases, only one works at a time. When it ends, the other one works."""
    working: set[str] = set()
    rounds = {"one": 0, "two": 0}
    changed = asyncio.Event()

    async def work(name: str) -> None:
        assert not working, f"{name} works beside {working}"
        working.add(name)
        await asyncio.sleep(0.01)
        working.discard(name)
        rounds[name] += 1
        changed.set()

    path = tmp_path / "leases"
    with closing(FileLeases(path, System())) as one, closing(FileLeases(path, System())) as two:
        tasks = {
            name: asyncio.create_task(run_rounds(partial(work, name), leases, 0.001, lambda: False))
            for name, leases in (("one", one), ("two", two))
        }
        async with asyncio.timeout(60):
            while sum(rounds.values()) < 5:
                changed.clear()
                await changed.wait()
            await cancel_all([tasks.pop("one")])
            before = rounds["two"]
            working.clear()
            while rounds["two"] < before + 2:
                changed.clear()
                await changed.wait()
        await cancel_all(list(tasks.values()))


async def test_an_error_of_the_store_ends_a_round_and_not_the_rounds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An error of the store ends the round and is logged. The next round starts as usual."""
    rounds = 0
    second = asyncio.Event()

    async def work() -> None:
        nonlocal rounds
        rounds += 1
        if rounds == 1:
            raise StorageFailed("the disk failed")
        second.set()

    with closing(FileLeases(tmp_path / "leases", System())) as leases:
        task = asyncio.create_task(run_rounds(work, leases, 0.001, lambda: False))
        async with asyncio.timeout(60):
            await second.wait()
        await cancel_all([task])
    assert "upkeep stopped with an error: the disk failed" in caplog.text
