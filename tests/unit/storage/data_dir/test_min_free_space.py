"""The minimum of free disk space in the settings. If less space is free, pushes and new downloads of mirrors are
refused, so that the disk does not become full."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from storage.composition import open_registry, prepare_data_dir
from storage.data_dir.reserve import MinFreeSpace
from storage.errors import StorageFull
from storage.names import RepositoryName, Tag
from storage.store.stored_registry import StoredRegistry
from tests.fakes.registry_content import BY, descriptor_of, push_blob, push_image

APP = RepositoryName("team/app")
TIB = 1 << 40


@pytest.fixture
async def low_space_store(tmp_path: Path) -> AsyncIterator[StoredRegistry]:
    """A store with an image, on a disk that has less free space than the minimum."""
    prepare_data_dir(tmp_path)
    async with open_registry(tmp_path) as store:
        await push_image(store, APP, "seed", "latest")
    async with open_registry(tmp_path, min_free=MinFreeSpace(size=1000 * TIB)) as store:
        yield store


def test_the_greater_limit_counts() -> None:
    """The minimum can be given as a size and as a percentage of the disk. The greater of the two counts."""
    assert MinFreeSpace(size=100, percent=10).required_bytes(500) == 100
    assert MinFreeSpace(size=100, percent=10).required_bytes(5000) == 500
    assert [str(MinFreeSpace(1 << 30)), str(MinFreeSpace(0, 2.5))] == ["1 GiB", "2.5 %"]
    assert str(MinFreeSpace(1 << 30, 2.5)) == "1 GiB or 2.5 %"


async def test_new_bytes_are_refused(low_space_store: StoredRegistry) -> None:
    """Below the minimum, uploads and new downloads of a mirror are refused. The error names the minimum."""
    with pytest.raises(StorageFull, match="the disk is almost full: less than 1000 TiB would stay free"):
        await push_blob(low_space_store, APP, b"more")
    with pytest.raises(StorageFull, match="almost full"):
        await low_space_store.partials.claim(descriptor_of(b"more").digest, 4)
    assert low_space_store.push_refusal_reason() == low_space_store.storage_problem()
    assert "almost full" in (low_space_store.push_refusal_reason() or "")


async def test_reads_deletes_and_collection_work(low_space_store: StoredRegistry) -> None:
    """Below the minimum, content can be read and deleted, and garbage collection works."""
    manifest = await low_space_store.get_manifest(APP, Tag("latest"))
    await low_space_store.delete_manifest(APP, manifest.digest, by=BY)
    low_space_store.collector.grace = 0.0
    assert (await low_space_store.collector.collect()).blobs == 2


async def test_the_announced_size_counts(tmp_path: Path) -> None:
    """A push or download is refused if less space than the minimum would be free after its announced size is stored."""
    prepare_data_dir(tmp_path)
    async with open_registry(tmp_path, min_free=MinFreeSpace(size=1)) as store:
        free = store.free_bytes()
        assert free is not None
        assert store.push_refusal_reason(free // 2) is None
        assert store.push_refusal_reason(2 * free) is not None
        with pytest.raises(StorageFull):
            await store.partials.claim(descriptor_of(b"large").digest, 1000 * TIB)
        assert store.storage_problem() is None


async def test_a_running_download_is_finished(tmp_path: Path) -> None:
    """A download that has begun before the space became low can be finished, because its size was checked when it
    began."""
    prepare_data_dir(tmp_path)
    data = b"downloaded"
    async with open_registry(tmp_path) as store:
        partial = await store.partials.claim(descriptor_of(data).digest, len(data))
        await asyncio.to_thread(partial.write_at, 0, data[:5])
        partial.close()
    async with open_registry(tmp_path, min_free=MinFreeSpace(size=1000 * TIB)) as store:
        partial = await store.partials.claim(descriptor_of(data).digest, len(data))
        await asyncio.to_thread(partial.write_at, 5, data[5:])
        assert (await partial.commit(APP)).size == len(data)
        partial.close()
