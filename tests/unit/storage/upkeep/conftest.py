"""A fixture for the tests of cached images and their eviction: the cached content of two mirrors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from storage.composition import open_registry, prepare_data_dir
from storage.metadata.sqlite.database import connect
from storage.upkeep.usage_counting import configure_and_count
from tests.fakes.mirror_cache import SCOPES, Cache, StillClock


@pytest.fixture
async def cache(tmp_path: Path) -> AsyncIterator[Cache]:
    prepare_data_dir(tmp_path)
    clock = StillClock()
    db = connect(tmp_path / "entrepot.db")
    async with open_registry(tmp_path, clock=clock) as store:
        await configure_and_count(store.usage, store.leases, SCOPES)
        yield Cache(store, db, clock)
    db.close()
