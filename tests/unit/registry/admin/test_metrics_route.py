"""The route `/metrics` while a read of the store hangs."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import httpx2
from fastapi import FastAPI

from registry.admin.metrics_route import METRICS_PATH, metrics_router
from registry.admin.store_metrics import StoreMetrics
from registry.config import Settings
from registry.telemetry.telemetry import Telemetry
from storage.composition import prepare_data_dir
from tests.fakes.metrics_reader import Scrape, parse


class HangingClock:
    """A clock whose reads block until `may_continue` is set. Each read of the store's metrics reads it, so it stands
    for a disk that hangs. `reads`: how often it was read."""

    def __init__(self) -> None:
        self.reads = 0
        self.may_continue = threading.Event()

    def __call__(self) -> float:
        self.reads += 1
        assert self.may_continue.wait(60)
        return time.time()


async def test_only_one_read_of_the_store_at_a_time(tmp_path: Path) -> None:
    """While one read of the store hangs, no second read starts. Scrapes during this time have all metrics except those
    of the store."""
    prepare_data_dir(tmp_path)
    settings, clock, app = Settings(data=tmp_path), HangingClock(), FastAPI()
    telemetry = Telemetry(settings)
    telemetry.start_worker()
    store = StoreMetrics(settings, clock)
    app.include_router(metrics_router(telemetry, ["0.0.0.0/0"], store, store_wait_seconds=0.05))
    client = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://test")

    async def scrape() -> Scrape:
        answer = await client.get(METRICS_PATH)
        assert answer.status_code == 200
        return parse(answer.text)

    try:
        for metrics in await asyncio.gather(*(scrape() for _ in range(20))):
            assert not list(metrics.values("entrepot_store_readable"))
            assert metrics.total("entrepot_build_info") == 1
        assert clock.reads <= 1
    finally:
        clock.may_continue.set()
    async with asyncio.timeout(60):
        while not (await scrape()).total("entrepot_store_readable"):
            pass
    assert clock.reads == 1
