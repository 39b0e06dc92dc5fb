"""How garbage collection looks for strays: blob files without a row in the database. The files are in directories
(shards). A round looks into a few shards, and into fewer if they have many files, so that its cost does not depend on
the size of the store. Several rounds together look into all shards."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from storage.composition import open_registry, prepare_data_dir
from storage.data_dir.layout import Layout
from storage.store.stored_registry import StoredRegistry
from storage.upkeep import collector

NOW = 512 * 10_000.0
"""A time in seconds at which the first round begins with shard 0: a multiple of the number of shards, 256."""


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[StoredRegistry]:
    prepare_data_dir(tmp_path)
    async with open_registry(tmp_path, clock=lambda: NOW) as opened:
        yield opened


def add_strays(data: Path, shard: int, count: int) -> None:
    for number in range(count):
        path = Layout(data).shard(shard) / f"{shard:02x}{number:062x}"
        path.write_bytes(b"stray")
        os.utime(path, (1, 1))


async def test_a_round_stops_after_a_limited_number_of_files(
    store: StoredRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round that has listed at least `BLOBS_LISTED_PER_ROUND` files lists no further shard. The next round begins
    with the following shard."""
    monkeypatch.setattr(collector, "BLOBS_LISTED_PER_ROUND", 5)
    for shard, count in ((1, 3), (2, 4), (3, 1), (30, 2)):
        add_strays(tmp_path, shard, count)
    removed = [(await store.collector.collect()).strays for _ in range(4)]
    assert removed == [7, 1, 2, 0]  # shards 0 to 2, 3 to 18, 19 to 34, 35 to 50: at most 16 shards in a round


async def test_all_shards_are_listed_on_request(
    store: StoredRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `all_shards`, a round looks into all shards, even if they have many files."""
    monkeypatch.setattr(collector, "BLOBS_LISTED_PER_ROUND", 5)
    for shard in (1, 100, 255):
        add_strays(tmp_path, shard, 9)
    assert (await store.collector.collect(all_shards=True)).strays == 27
