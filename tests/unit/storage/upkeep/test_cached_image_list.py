"""The list of cached images, in a real store: sizes, last pulls, orders, the filter and the limit."""

from __future__ import annotations

import pytest

from storage.cached_images import CachedImagePage, ImageOrder
from storage.metadata.sqlite.upkeep import cached_image_list
from tests.unit.storage.upkeep.test_evictor import APP, FAR, SIZE, WEB, Cache, cache

__all__ = ["cache"]
BOTH = ("hub", "other")


def names(page: CachedImagePage) -> list[str]:
    return [f"{image.repository}:{','.join(image.tags)}" for image in page.images]


async def test_images_are_listed_by_size_and_last_pull(cache: Cache) -> None:
    """An index is one image with its parts: a pull of a part is a pull of the image, and each blob counts once. Blobs
    that are not stored do not count."""
    small = await cache.fetch(APP, "one", tag="small")
    large = await cache.fetch(FAR, "one", "two", "three", tag="large")
    parts = [await cache.fetch(WEB, "shared", part) for part in ("amd64", "arm64")]
    await cache.list(WEB, parts, "index")
    await cache.fetch(APP, "nowhere", tag="missing", complete=False)
    cache.pull(large, parts[0], small)

    by_size = await cache.store.cached_images.images(BOTH, "", ImageOrder.SIZE, 0, 10)
    assert names(by_size) == ["hub/web:index", "other/app:large", "hub/app:small", "hub/app:missing"]
    assert [image.bytes for image in by_size.images] == [3 * SIZE + 2, 3 * SIZE + 2, SIZE + 2, 2]
    assert [image.manifests for image in by_size.images] == [3, 1, 1, 1]
    assert (by_size.total, by_size.is_complete) == (4, True)

    newest = await cache.store.cached_images.images(BOTH, "", ImageOrder.NEWEST_PULL, 0, 10)
    assert names(newest) == ["hub/app:small", "hub/web:index", "other/app:large", "hub/app:missing"]
    assert newest.images[0].last_pulled == cache.clock.now
    oldest = await cache.store.cached_images.images(BOTH, "", ImageOrder.OLDEST_PULL, 0, 10)
    assert names(oldest) == names(newest)[::-1]


async def test_a_filter_and_pages(cache: Cache) -> None:
    """The text of the filter is a part of the repository's name. The list can be limited to one upstream, and has
    pages."""
    for number in range(3):
        await cache.fetch(APP, f"layer {number}", tag=f"t{number}")
    await cache.fetch(FAR, "far", tag="far")
    await cache.fetch(WEB, "web", tag="web")
    images, order = cache.store.cached_images.images, ImageOrder.OLDEST_PULL
    assert names(await images(BOTH, "app", order, 0, 2)) == ["hub/app:t0", "hub/app:t1"]
    second = await images(BOTH, "app", order, 2, 2)
    assert (names(second), second.total) == (["hub/app:t2", "other/app:far"], 4)
    assert names(await images(["hub"], "app", order, 0, 9)) == ["hub/app:t0", "hub/app:t1", "hub/app:t2"]
    assert names(await images(["other"], "", order, 0, 9)) == ["other/app:far"]
    assert names(await images(BOTH, "%", order, 0, 9)) == []
    assert names(await images([], "", order, 0, 9)) == []


async def test_a_long_list_is_cut(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list that is too long is cut, and says so. Without a filter, it has the images that eviction would take
    first."""
    monkeypatch.setattr(cached_image_list, "MAX_LISTED_IMAGES", 2)
    for number in range(3):
        await cache.fetch(APP, f"layer {number}", tag=f"t{number}")
    for text in ("", "app"):
        page = await cache.store.cached_images.images(BOTH, text, ImageOrder.NEWEST_PULL, 0, 10)
        assert (page.total, page.is_complete) == (2, False)
    page = await cache.store.cached_images.images(BOTH, "", ImageOrder.OLDEST_PULL, 0, 10)
    assert names(page) == ["hub/app:t0", "hub/app:t1"]
