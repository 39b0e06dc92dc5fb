"""Eviction because the disk has too little free space, if the bytes of the evicted images do not become free space: a
backup holds them back, other links hold them, or the file system frees them later."""

from __future__ import annotations

from typing import Any

import pytest

from storage.cached_images import EvictedImage
from storage.content import Manifest
from storage.upkeep.eviction_for_space import (
    FIRST_PAUSE_SECONDS,
    LONGEST_PAUSE_SECONDS,
    PAUSE_FACTOR,
    SETTLE_SECONDS,
)
from storage.upkeep.evictor import Evictor
from storage.upkeep.removal_gate import blob_removals_blocked
from tests.fakes.mirror_cache import APP, LAYER_BYTES, Cache

IMAGES = 12
LOW_FREE, HIGH_FREE = 1900, 2500
FREE = 1000
"""The free bytes of the disk at the start. An eviction must free 1,500 bytes, which are two images."""


@pytest.fixture
async def images(cache: Cache) -> list[Manifest]:
    """Images of the cache, least recently pulled first."""
    images = [await cache.fetch(APP, f"layer {number}") for number in range(IMAGES)]
    cache.clock.now += 1
    cache.free = FREE
    return images


def evictor_of(cache: Cache) -> Evictor:
    """Returns the evictor of a process that keeps free space."""
    return cache.evictor(low_free=LOW_FREE, high_free=HIGH_FREE)


async def count_of(cache: Cache, images: list[Manifest]) -> int:
    """Returns how many of the images are in the cache. Checks that these are the most recently pulled ones."""
    are_cached = [await cache.has(APP, image) for image in images]
    assert are_cached == sorted(are_cached)
    return sum(are_cached)


async def test_no_image_is_evicted_for_space_while_a_backup_runs(
    cache: Cache, images: list[Manifest], caplog: pytest.LogCaptureFixture
) -> None:
    """While a backup runs, the removal of blobs frees nothing, so no image is evicted for free space. The log says so.
    After the backup, the blobs that it has held back are removed first."""
    evictor = evictor_of(cache)
    async with blob_removals_blocked(cache.store.leases):
        assert not await evictor.check()
        assert await evictor.evict() == 0
        assert caplog.text.count("no image is evicted for it while a backup runs") == 1
        assert "must stay" not in caplog.text
        assert await count_of(cache, images) == IMAGES
        await cache.evictor((IMAGES - 4) * LAYER_BYTES).evict()
        in_budget = await count_of(cache, images)
        assert in_budget < IMAGES
        assert await cache.stored_bytes() == IMAGES * LAYER_BYTES + 2
    await evictor.check()
    assert await count_of(cache, images) == in_budget - 2
    assert await cache.stored_bytes() == (in_budget - 2) * LAYER_BYTES + 2


async def test_an_eviction_for_space_ends_when_the_lacking_bytes_are_evicted(
    cache: Cache, images: list[Manifest]
) -> None:
    """If the free space does not grow, an eviction removes only as many bytes as were lacking at its start."""
    assert await evictor_of(cache).evict() == 2
    assert await count_of(cache, images) == IMAGES - 2


async def test_evictions_without_effect_pause(
    cache: Cache, images: list[Manifest], caplog: pytest.LogCaptureFixture
) -> None:
    """After an eviction that freed no space, the evictors of all processes pause, each time longer. The log says what
    may hold the bytes. Budgets are still kept. When the free space has grown, evictions go on at once."""
    evictors = [evictor_of(cache), evictor_of(cache)]

    async def check() -> int:
        for evictor in evictors:
            await evictor.check()
        return await count_of(cache, images)

    assert [await check(), await check()] == [IMAGES - 2, IMAGES - 2]
    assert not caplog.records
    cache.monotonic.now += SETTLE_SECONDS
    assert [await check(), await check()] == [IMAGES - 2, IMAGES - 2]
    [record] = caplog.records
    assert "2.0 KiB were evicted" in record.getMessage()
    assert "backup on the same file system" in record.getMessage()
    assert "in the next 4 minutes" in record.getMessage()
    cache.monotonic.now += FIRST_PAUSE_SECONDS - SETTLE_SECONDS
    assert [await check(), await check()] == [IMAGES - 4, IMAGES - 4]
    cache.monotonic.now += FIRST_PAUSE_SECONDS * PAUSE_FACTOR - 1
    assert await check() == IMAGES - 4
    await cache.evictor((IMAGES - 4) * LAYER_BYTES).check()
    in_budget = await count_of(cache, images)
    assert in_budget == IMAGES - 5
    cache.free = FREE + LAYER_BYTES * 3 // 4  # an old backup was deleted
    assert await check() == in_budget - 1


async def test_no_eviction_follows_if_the_file_system_frees_blocks_later(
    cache: Cache, images: list[Manifest], caplog: pytest.LogCaptureFixture
) -> None:
    """If the file system frees the bytes of an eviction some seconds later, nothing is logged and nothing more is
    evicted."""
    evictor = evictor_of(cache)
    assert await evictor.check()
    cache.monotonic.now += SETTLE_SECONDS / 2
    cache.free = FREE + 2 * LAYER_BYTES
    assert await evictor.check()
    cache.monotonic.now += LONGEST_PAUSE_SECONDS
    assert await evictor.check()
    assert await count_of(cache, images) == IMAGES - 2
    assert not caplog.records


async def test_other_writers_do_not_cause_a_pause(
    cache: Cache, images: list[Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients and mirrors write more bytes during an eviction than it frees. The next eviction follows at once, because
    the free space grew whenever blobs were removed."""
    bytes_before = await cache.stored_bytes()
    collector, cached_images = cache.store.collector, cache.store.cached_images
    free_unlinked_blobs, evict_next = collector.free_unlinked_blobs, cached_images.evict_next
    written_bytes = 0

    async def free_and_measure() -> int:
        blobs = await free_unlinked_blobs()
        cache.free = FREE + bytes_before - await cache.stored_bytes() - written_bytes
        return blobs

    async def write_and_evict(*arguments: Any) -> EvictedImage | bool:
        nonlocal written_bytes
        written_bytes += 2 * LAYER_BYTES
        await free_and_measure()
        return await evict_next(*arguments)

    monkeypatch.setattr(collector, "free_unlinked_blobs", free_and_measure)
    monkeypatch.setattr(cached_images, "evict_next", write_and_evict)
    evictor = evictor_of(cache)
    assert await evictor.check()
    assert await count_of(cache, images) == IMAGES - 2
    assert await evictor.check()
    assert await count_of(cache, images) < IMAGES - 2
