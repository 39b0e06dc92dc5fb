"""The reports that worker processes write, and the server's status, which is made from these reports and from the
store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from registry.admin.server_status import read_server_status
from registry.asgi import ServerCounts
from registry.backend import open_backend
from registry.config import Settings
from registry.mirror.upstream_client import EndpointHealth
from registry.status import worker_report
from registry.status.worker_report import WorkerReporter, new_server_run, read_worker_reports
from storage.composition import layout_of, prepare_data_dir

TIMEOUT_SECONDS = 60.0


@pytest.mark.full_store
async def test_status_without_the_store(tmp_path: Path) -> None:
    """If the store cannot be read, the status states the reason, and has all values that could be read."""
    prepare_data_dir(tmp_path)
    async with open_backend(Settings(data=tmp_path)) as backend:
        assert (await read_server_status(backend.upkeep)).store_problem is None
        database = layout_of(tmp_path).metadata
        database.rename(tmp_path / "away")
        try:
            status = await read_server_status(backend.upkeep)
        finally:
            (tmp_path / "away").rename(database)
    assert "cannot read" in (status.store_problem or "")
    assert status.uploads is None
    assert status.disk.free > 0


@pytest.mark.slow
async def test_a_reporter_continues_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an unexpected error, for example that no thread can be started, a worker still writes reports. When it
    stops, it removes its report."""
    monkeypatch.setattr(worker_report, "CLOSE_SECONDS", TIMEOUT_SECONDS)  # the thread may be late to end its write
    prepare_data_dir(tmp_path)
    calls = 0

    def endpoints() -> Mapping[str, list[EndpointHealth]]:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("can't start new thread")
        return {}

    reporter = WorkerReporter(
        tmp_path, new_server_run(), counts=ServerCounts, endpoints=endpoints, is_read_only=lambda: False
    )
    task = asyncio.create_task(reporter.run())
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not read_worker_reports(tmp_path):
        assert not task.done()
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    task.cancel()
    await asyncio.wait([task])
    assert read_worker_reports(tmp_path) == []
