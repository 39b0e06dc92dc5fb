"""Eviction after the clock of the machine was ahead for some time and was then set back."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.future_times import CLOCK_MARGIN_SECONDS
from storage.upkeep.evictor import UNUSED_SECONDS
from tests.fakes.mirror_cache import APP, LAYER_BYTES, Cache
from tests.fakes.registry_content import BY

DAY = 86_400.0
LIMIT = 2 * LAYER_BYTES + 200
"""A budget for two images."""


@pytest.mark.parametrize("event", ["stored", "pulled", "checked"])
async def test_images_from_the_future_are_evicted(cache: Cache, event: str) -> None:
    """Images were stored, pulled or checked while the clock was a day ahead. After the clock was set back, they are
    evicted after the older images, as far as the budget requires."""
    if event == "stored":
        cache.clock.now += DAY
    images = [await cache.fetch(APP, f"layer {number}") for number in range(4)]
    if event != "stored":
        cache.clock.now += DAY
    if event == "pulled":
        cache.pull(*images)
    if event == "checked":
        assert await cache.evictor(LIMIT, is_kept=lambda _: True).evict() == 0
    cache.clock.now -= DAY
    old_image = await cache.fetch(APP, "old layer")
    cache.clock.now += 1
    assert await cache.evictor(LIMIT).evict() == 3
    remaining = [image for image in [*images, old_image] if await cache.has(APP, image)]
    assert len(remaining) == 2
    if event != "checked":
        assert remaining == images[-2:]
    assert await cache.counted_bytes() <= LIMIT


async def test_kept_images_from_the_future_are_checked_once(cache: Cache) -> None:
    """An eviction that may evict nothing ends, although the ranks of the images are in the future."""
    cache.clock.now += DAY
    images = [await cache.fetch(APP, f"layer {number}") for number in range(4)]
    cache.pull(*images)
    cache.clock.now -= DAY
    for _ in range(2):
        assert await cache.evictor(10, is_kept=lambda _: True).evict() == 0
        cache.clock.now += 1
    assert await cache.evictor(10).evict() == 4


async def test_incomplete_images_from_the_future_are_evicted(cache: Cache) -> None:
    """An image that lacks blobs is not kept as one that a client is pulling, if its last pull is in the future."""
    cache.clock.now += DAY
    image = await cache.fetch(APP, "layer", complete=False)
    await cache.fetch(APP, "other")
    cache.clock.now -= DAY
    await cache.evictor(10).evict()
    assert not await cache.has(APP, image)


async def test_images_that_are_stored_during_an_eviction_stay(cache: Cache) -> None:
    """An image whose time is a moment later than the start of the eviction is not taken for one from the future."""
    cache.clock.now += CLOCK_MARGIN_SECONDS / 2
    image = await cache.fetch(APP, "layer", complete=False)
    cache.clock.now -= CLOCK_MARGIN_SECONDS / 2
    await cache.fetch(APP, "other")
    cache.clock.now += 1
    await cache.evictor(10).evict()
    assert await cache.has(APP, image)


async def test_unused_links_from_the_future_are_removed(cache: Cache) -> None:
    """A blob that no manifest uses is evicted, although it was last used while the clock was ahead. A search that found
    nothing before the clock was set back does not prevent the next search."""
    cache.clock.now += DAY
    image = await cache.fetch(APP, "layer")
    evictor = cache.evictor(10)
    assert await evictor.evict() == 0
    await cache.store.delete_manifest(APP, image.digest, by=BY)
    assert await evictor.evict() == 0
    assert await cache.counted_bytes() == LAYER_BYTES + 2
    cache.clock.now -= DAY
    cache.monotonic.now += UNUSED_SECONDS
    await evictor.evict()
    assert await cache.counted_bytes() == await cache.stored_bytes() == 0


async def test_warnings_continue_after_the_clock_was_set_back(
    cache: Cache, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """While the budget cannot be kept, a warning is logged every ten minutes, also after the clock was set back."""
    cache.clock.now += DAY
    await cache.fetch(APP, "layer")
    evictor = cache.evictor(10, is_kept=lambda _: True)
    for expected_warnings in (1, 2):
        await evictor.evict()
        assert caplog.text.count("the cache exceeds its limits") == expected_warnings
        cache.clock.now -= DAY
        cache.monotonic.now += 600
