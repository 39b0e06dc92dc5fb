"""Two who use one data directory: the test's own registry, and a peer in this process or in another one."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from storage.composition import open_registry, prepare_data_dir
from storage.store.stored_registry import StoredRegistry
from tests.system.race.gated_system import BOOT, GatedSystem, PeerRegistry, peer_in_process, peer_process


def later() -> float:
    """Far enough on that the collector takes every file for an old one."""
    return time.time() + 3600


@pytest.fixture
def data(tmp_path: Path) -> Path:
    prepare_data_dir(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def system() -> GatedSystem:
    return GatedSystem()


@pytest.fixture
async def registry(data: Path, system: GatedSystem) -> AsyncIterator[StoredRegistry]:
    async with open_registry(data, grace=0, system=system, boot=BOOT, clock=later) as opened:
        yield opened


@pytest.fixture(params=["one process", "two processes"])
async def peer(request: pytest.FixtureRequest, data: Path) -> AsyncIterator[PeerRegistry]:
    opening = peer_in_process if request.param == "one process" else peer_process
    async with opening(data, later) as opened:
        yield opened
