"""Rounds of upkeep, such as garbage collection. `test_background_rounds` tests that only one process runs them at a
time."""

from __future__ import annotations

import asyncio
from contextlib import closing
from pathlib import Path

import pytest

from storage.data_dir.file_leases import FileLeases
from storage.data_dir.system import System
from storage.errors import StorageFailed
from storage.upkeep.schedule import cancel_all, run_rounds


async def test_rounds_continue_after_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """If a round raises an error, the error is logged. The next round starts as usual."""
    rounds = 0
    second_round = asyncio.Event()

    async def work() -> None:
        nonlocal rounds
        rounds += 1
        if rounds == 1:
            raise StorageFailed("the disk failed")
        second_round.set()

    with closing(FileLeases(tmp_path / "leases", System())) as leases:
        task = asyncio.create_task(run_rounds(work, leases, 0.001, lambda: False))
        async with asyncio.timeout(60):
            await second_round.wait()
        await cancel_all([task])
    assert "upkeep stopped with an error: the disk failed" in caplog.text
