"""An opened registry, for the suites of its parts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from storage.opening import open_registry, prepare
from storage.stored import StoredRegistry
from tests.storage.filling import BOOT


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A prepared data directory."""
    prepare(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
async def registry(data: Path) -> AsyncIterator[StoredRegistry]:
    async with open_registry(data, boot=BOOT) as opened:
        yield opened
