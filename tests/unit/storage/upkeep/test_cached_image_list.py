"""The list of the images that mirrors have cached, with their sizes and last pulls. The tests use a real store."""

from __future__ import annotations

import pytest

from storage.cached_images import CachedImagePage, ImageOrder
from storage.metadata.sqlite.upkeep import cached_image_list
from tests.fakes.mirror_cache import APP, LAYER_BYTES, OTHER_APP, WEB, Cache

BOTH_UPSTREAMS = ("hub", "other")


def image_names(page: CachedImagePage) -> list[str]:
    return [f"{image.repository}:{','.join(image.tags)}" for image in page.images]


async def test_images_are_listed_by_size_and_last_pull(cache: Cache) -> None:
    """An index and the manifests that it lists are one image: a pull of a listed manifest counts as a pull of the
    image, and each blob counts once. Blobs that are not stored do not count."""
    small = await cache.fetch(APP, "one", tag="small")
    large = await cache.fetch(OTHER_APP, "one", "two", "three", tag="large")
    children = [await cache.fetch(WEB, "shared", part) for part in ("amd64", "arm64")]
    await cache.add_index(WEB, children, "index")
    await cache.fetch(APP, "nowhere", tag="missing", complete=False)
    cache.pull(large, children[0], small)

    by_size = await cache.store.cached_images.images(BOTH_UPSTREAMS, "", ImageOrder.SIZE, 0, 10)
    assert image_names(by_size) == ["hub/web:index", "other/app:large", "hub/app:small", "hub/app:missing"]
    assert [image.bytes for image in by_size.images] == [3 * LAYER_BYTES + 2, 3 * LAYER_BYTES + 2, LAYER_BYTES + 2, 2]
    assert [image.manifests for image in by_size.images] == [3, 1, 1, 1]
    assert (by_size.total, by_size.is_complete) == (4, True)

    newest = await cache.store.cached_images.images(BOTH_UPSTREAMS, "", ImageOrder.NEWEST_PULL, 0, 10)
    assert image_names(newest) == ["hub/app:small", "hub/web:index", "other/app:large", "hub/app:missing"]
    assert newest.images[0].last_pulled == cache.clock.now
    oldest = await cache.store.cached_images.images(BOTH_UPSTREAMS, "", ImageOrder.OLDEST_PULL, 0, 10)
    assert image_names(oldest) == image_names(newest)[::-1]


async def test_a_filter_and_pages(cache: Cache) -> None:
    """The list can be filtered by a part of the repository's name and by upstream. It is returned in pages."""
    for number in range(3):
        await cache.fetch(APP, f"layer {number}", tag=f"t{number}")
    await cache.fetch(OTHER_APP, "far", tag="far")
    await cache.fetch(WEB, "web", tag="web")
    images, order = cache.store.cached_images.images, ImageOrder.OLDEST_PULL
    assert image_names(await images(BOTH_UPSTREAMS, "app", order, 0, 2)) == ["hub/app:t0", "hub/app:t1"]
    second_page = await images(BOTH_UPSTREAMS, "app", order, 2, 2)
    assert (image_names(second_page), second_page.total) == (["hub/app:t2", "other/app:far"], 4)
    assert image_names(await images(["hub"], "app", order, 0, 9)) == ["hub/app:t0", "hub/app:t1", "hub/app:t2"]
    assert image_names(await images(["other"], "", order, 0, 9)) == ["other/app:far"]
    assert image_names(await images(BOTH_UPSTREAMS, "%", order, 0, 9)) == []
    assert image_names(await images([], "", order, 0, 9)) == []


async def test_the_list_is_limited_in_length(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list has at most `MAX_LISTED_IMAGES` images, and states whether it is complete. Without a filter, it has the
    images that would be evicted first."""
    monkeypatch.setattr(cached_image_list, "MAX_LISTED_IMAGES", 2)
    for number in range(3):
        await cache.fetch(APP, f"layer {number}", tag=f"t{number}")
    for text in ("", "app"):
        page = await cache.store.cached_images.images(BOTH_UPSTREAMS, text, ImageOrder.NEWEST_PULL, 0, 10)
        assert (page.total, page.is_complete) == (2, False)
    page = await cache.store.cached_images.images(BOTH_UPSTREAMS, "", ImageOrder.OLDEST_PULL, 0, 10)
    assert image_names(page) == ["hub/app:t0", "hub/app:t1"]
