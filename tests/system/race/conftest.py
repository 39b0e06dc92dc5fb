"""Fixtures for tests in which two registries use the same data directory at the same time: the `registry` of the test,
and a `peer` in the same process or in another process."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from storage.composition import prepare_data_dir
from storage.store.stored_registry import StoredRegistry
from tests.system.race.content_kinds import KINDS, ContentKind
from tests.system.race.gated_system import GatedSystem, PeerRegistry, open_gated, peer_in_process, peer_process


def future_clock() -> float:
    """A clock for the registries. It is an hour ahead, so that the garbage collector considers every file old."""
    return time.time() + 3600


@pytest.fixture
def data(tmp_path: Path) -> Path:
    prepare_data_dir(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def system() -> GatedSystem:
    return GatedSystem()


@pytest.fixture(params=sorted(KINDS))
def kind(request: pytest.FixtureRequest) -> ContentKind:
    return KINDS[request.param]


@pytest.fixture
async def registry(data: Path, kind: ContentKind, system: GatedSystem) -> AsyncIterator[StoredRegistry]:
    async with open_gated(data, kind, system, future_clock) as opened:
        yield opened


@pytest.fixture(params=["one process", "two processes"])
async def peer(request: pytest.FixtureRequest, data: Path, kind: ContentKind) -> AsyncIterator[PeerRegistry]:
    opening = peer_in_process if request.param == "one process" else peer_process
    async with opening(data, kind, future_clock) as opened:
        yield opened
