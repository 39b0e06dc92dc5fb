"""Rounds of upkeep, such as garbage collection. Only one of the server's processes runs them at a time."""

from __future__ import annotations

import asyncio
from contextlib import closing
from functools import partial
from pathlib import Path

import apsw
import pytest

from storage.data_dir.file_leases import FileLeases
from storage.data_dir.system import System
from storage.errors import StorageFailed
from storage.upkeep.schedule import cancel_all, run_rounds


async def test_one_process_runs_rounds_and_another_takes_over(tmp_path: Path) -> None:
    """Two processes use the same file of leases. Only one of them runs rounds. When it ends, the other process runs the
    next rounds."""
    working: list[str] = []
    simultaneous: list[list[str]] = []
    rounds = {"one": 0, "two": 0}
    changed = asyncio.Event()

    async def work(name: str) -> None:
        working.append(name)
        if len(working) > 1:
            simultaneous.append(working.copy())
        try:
            await asyncio.sleep(0.01)
        finally:
            working.remove(name)
        rounds[name] += 1
        changed.set()

    path = tmp_path / "leases"
    with closing(FileLeases(path, System())) as first, closing(FileLeases(path, System())) as second:
        tasks = {
            name: asyncio.create_task(run_rounds(partial(work, name), leases, 0.001, lambda: False))
            for name, leases in (("one", first), ("two", second))
        }
        async with asyncio.timeout(60):
            while sum(rounds.values()) < 5:
                changed.clear()
                await changed.wait()
            await cancel_all([tasks.pop("one")])
            rounds_before = rounds["two"]
            while rounds["two"] < rounds_before + 2:
                changed.clear()
                await changed.wait()
        await cancel_all(list(tasks.values()))
    assert simultaneous == []


@pytest.mark.parametrize("error", [StorageFailed("the disk failed"), apsw.BusyError("database is locked")])
async def test_rounds_continue_after_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    """If a round raises an error of the store, or one of SQLite, the error is logged. The next round starts as
    usual."""
    rounds = 0
    second_round = asyncio.Event()

    async def work() -> None:
        nonlocal rounds
        rounds += 1
        if rounds == 1:
            raise error
        second_round.set()

    with closing(FileLeases(tmp_path / "leases", System())) as leases:
        task = asyncio.create_task(run_rounds(work, leases, 0.001, lambda: False))
        async with asyncio.timeout(60):
            await second_round.wait()
        await cancel_all([task])
    assert "upkeep stopped with an error" in caplog.text
    assert str(error) in caplog.text


async def test_an_error_during_a_cancellation_ends_the_task(tmp_path: Path) -> None:
    """If the clean-up of a round fails after the task was cancelled, the task ends instead of starting another
    round."""
    started = asyncio.Event()

    async def work() -> None:
        try:
            started.set()
            await asyncio.sleep(600)
        finally:
            raise StorageFailed("the disk failed")

    with closing(FileLeases(tmp_path / "leases", System())) as leases:
        task = asyncio.create_task(run_rounds(work, leases, 0.001, lambda: False))
        async with asyncio.timeout(60):
            await started.wait()
            await cancel_all([task])
    assert task.cancelled()
