"""Two who use one data directory: the test's own registry, and a peer in this process or in another one."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from storage.opening import open_registry, prepare
from storage.stored import StoredRegistry
from tests.race.stopping import BOOT, Peer, Stopping, foreigner, neighbour


def later() -> float:
    """Far enough on that the collector takes every file for an old one."""
    return time.time() + 3600


@pytest.fixture
def data(tmp_path: Path) -> Path:
    prepare(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def system() -> Stopping:
    return Stopping()


@pytest.fixture
async def registry(data: Path, system: Stopping) -> AsyncIterator[StoredRegistry]:
    async with open_registry(data, grace=0, system=system, boot=BOOT, clock=later) as opened:
        yield opened


@pytest.fixture(params=["one process", "two processes"])
async def peer(request: pytest.FixtureRequest, data: Path) -> AsyncIterator[Peer]:
    opening = neighbour if request.param == "one process" else foreigner
    async with opening(data, later) as opened:
        yield opened
