"""Fixtures for all unit tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from storage.store.stored_registry import StoredRegistry
from tests.fakes.forked_process import NO_CERTIFICATES
from tests.fakes.small_store import small_store as small_store
from tests.fakes.upkeep_store import Clock, clocked_store


@pytest.fixture(autouse=True)
def no_certificates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets environment variables so that no time is spent on reading the certificates of the system."""
    for name, value in NO_CERTIFICATES.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def store(tmp_path: Path, clock: Clock) -> AsyncIterator[StoredRegistry]:
    """Opens a store that reads the time from `clock`."""
    async with clocked_store(tmp_path, clock) as opened:
        yield opened
