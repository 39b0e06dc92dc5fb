"""Background work that one process at a time does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import apsw
import pytest

from storage.background_rounds import run_in_one_process
from storage.data_dir.file_leases import FileLeases
from storage.data_dir.system import System
from storage.errors import StorageFailed
from storage.leases import Leases
from storage.upkeep.schedule import cancel_all


def start(leases: Leases, work: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
    """Starts a task that runs rounds of the work with short pauses."""
    log = logging.getLogger("test")
    return asyncio.create_task(
        run_in_one_process(leases, "slot", work, lambda: asyncio.sleep(0.001), log=log, what_failed="the work failed")
    )


async def test_one_process_works_and_another_takes_over(tmp_path: Path) -> None:
    """Two processes use the same file of leases. Only one of them works at a time. When it ends, the other process runs
    the next rounds."""
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
        tasks = {name: start(leases, partial(work, name)) for name, leases in (("one", first), ("two", second))}
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
        task = start(leases, work)
        async with asyncio.timeout(60):
            await second_round.wait()
        await cancel_all([task])
    assert "the work failed" in caplog.text
    assert str(error) in caplog.text


@pytest.mark.parametrize("error", [StorageFailed("the disk failed"), None])
async def test_work_that_replaces_its_cancellation_runs_no_further_round(
    tmp_path: Path, error: StorageFailed | None
) -> None:
    """If the task is cancelled, and the clean-up of the round fails or the work returns, the task ends instead of
    starting another round."""
    started = asyncio.Event()

    async def work() -> None:
        assert not started.is_set()
        try:
            started.set()
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            if error is not None:
                raise error from None

    with closing(FileLeases(tmp_path / "leases", System())) as leases:
        task = start(leases, work)
        async with asyncio.timeout(60):
            await started.wait()
            await cancel_all([task])
    assert task.cancelled()
