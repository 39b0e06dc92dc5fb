"""Eviction deletes mirrored images if the cache is larger than its budget or the disk has too little free space. The
tests check in a real store which images are evicted, in which order, and how many."""

from __future__ import annotations

import asyncio

import apsw
import pytest

from storage.cached_images import EvictedImage
from storage.metadata.sqlite.upkeep import cached_image_tables
from storage.metadata.sqlite.upkeep.cached_image_tables import Image
from storage.names import RepositoryName, Tag
from storage.pulls import PullCount
from storage.upkeep.evictor import Budget
from storage.upkeep.usage_counting import configure_and_count
from tests.fakes.mirror_cache import APP, LAYER_BYTES, OTHER_APP, SCOPES, WEB, Cache
from tests.fakes.registry_content import BY


async def test_images_that_were_not_pulled_for_the_longest_time_are_evicted(cache: Cache) -> None:
    """If the cache is above its budget, the images that were not pulled for the longest time are evicted, until the
    cache has at most 95 % of the budget. Their tags, links and files are deleted. The images of all upstreams are in
    one order."""
    images = [await cache.fetch(repo, f"layer {n}", tag=f"t{n}") for n, repo in enumerate([APP, WEB, OTHER_APP] * 2)]
    cache.pull(images[0])
    assert await cache.counted_bytes() == 6 * LAYER_BYTES + 2
    cache.clock.now += 1
    assert await cache.evictor(4 * LAYER_BYTES).evict() == 3
    assert [await cache.has(repo, image) for repo, image in zip([APP, WEB, OTHER_APP] * 2, images, strict=True)] == [
        *(True, False, False),
        *(False, True, True),
    ]
    assert await cache.counted_bytes() == await cache.stored_bytes() == 3 * LAYER_BYTES + 2
    assert not await cache.has(WEB, "t1")
    assert await cache.has(APP, "t0")
    [*audit_rows] = cache.db.execute(
        "SELECT actor, action, target FROM audit WHERE action = 'manifest.delete' ORDER BY id"
    )
    assert audit_rows == [("entrepot eviction", "manifest.delete", repo) for repo in (WEB, OTHER_APP, APP)]


async def test_nothing_is_evicted_within_the_budget(cache: Cache) -> None:
    """If the cache is as large as its budget, no image is evicted."""
    image = await cache.fetch(APP, "layer")
    cache.clock.now += 1
    assert await cache.evictor(LAYER_BYTES + 2).evict() == 0
    assert await cache.has(APP, image)


async def test_a_pull_of_a_child_counts_for_its_index(cache: Cache) -> None:
    """A pull of a manifest counts as a pull of the index that lists it. An index is evicted together with its
    manifests, except manifests that another index lists."""
    children = [await cache.fetch(APP, f"child {n}") for n in range(3)]
    old_index = await cache.add_index(APP, children[:2], "old")
    new_index = await cache.add_index(APP, children[1:], "new")
    alone = await cache.fetch(WEB, "alone")
    cache.pull(children[2])
    cache.clock.now += 1
    # The cache may then use 95 % of the budget, which is enough for three layers.
    await cache.evictor(3 * LAYER_BYTES + 500).evict()
    assert [await cache.has(APP, each) for each in (old_index, *children, new_index)] == [
        False,
        False,
        True,
        True,
        True,
    ]
    assert await cache.has(WEB, alone)
    await cache.evictor(2 * LAYER_BYTES + 500).evict()
    assert [await cache.has(APP, each) for each in (*children, new_index)] == [False, True, True, True]
    assert not await cache.has(WEB, alone)


@pytest.mark.parametrize("restorable", [True, False])
async def test_pulls_of_a_deleted_manifest_do_not_count_for_a_new_one(cache: Cache, restorable: bool) -> None:
    """A manifest that is stored after another one was deleted has its own pulls and its own rank (its position in the
    order of evictions), even if it gets the same row id."""
    first = await cache.fetch(APP, "first", tag="1")
    cache.pull(first)
    await cache.store.delete_manifest(APP, first.digest, by=BY, restorable=restorable)
    for table in ("manifest_pull", "cached_manifest"):
        assert cache.db.execute(f"SELECT count(*) FROM {table}").get == 0
    # This pull was counted before the delete.
    await cache.store.pulls.save([PullCount(APP, first.digest, "hub", cache.clock.now, 1)])
    second = await cache.fetch(APP, "second")
    record = await cache.store.pulls.record_of(APP, second.digest)
    assert record is not None
    assert (record.last, record.pulls) == (cache.clock.now, 0)
    assert cache.db.execute("SELECT upstream, rank FROM cached_manifest").fetchall() == [("hub", cache.clock.now)]


async def test_images_that_are_never_evicted(cache: Cache) -> None:
    """An image is not evicted if a pattern of the settings keeps it, if a tag is frozen at it, if one of its blobs is
    being downloaded, or if it lacks blobs and was stored less than 600 s ago."""
    kept_image = await cache.fetch(RepositoryName("hub/library/app"), "kept")
    frozen_image = await cache.fetch(APP, "frozen", tag="frozen")
    cache.db.execute("INSERT INTO frozen_tag VALUES (?, 'frozen', ?, 0, '')", (APP, frozen_image.digest))
    downloaded = await cache.fetch(APP, "downloaded")
    cache.downloads.add(downloaded.blobs[1].digest)
    begun_image = await cache.fetch(APP, "begun", complete=False)
    last_image = await cache.fetch(WEB, "last")
    cache.clock.now += 1
    # The budget of 1 byte needs the eviction of all images, also of those that were stored one second ago.
    evictor = cache.evictor(1, is_kept=lambda repo: repo.startswith("hub/library/"))
    assert await evictor.evict() == 1
    assert not await cache.has(WEB, last_image)
    cache.downloads.clear()
    cache.clock.now += 601  # from now on, the image that lacks blobs may be evicted
    assert await evictor.evict() == 2
    assert [await cache.has(APP, image) for image in (frozen_image, downloaded, begun_image)] == [True, False, False]
    assert await cache.has(RepositoryName("hub/library/app"), kept_image)
    cache.db.execute("DELETE FROM frozen_tag")
    cache.clock.now += 1
    assert await evictor.evict() == 1


async def test_content_of_a_frozen_tag_is_not_evicted(cache: Cache) -> None:
    """A tag is frozen at an index. The index, the manifests that it lists and their blobs stay, even after the upstream
    has moved the tag. The plan of the evictor has only the other images."""
    children = [await cache.fetch(APP, f"child {n}") for n in range(2)]
    index = await cache.add_index(APP, children, "1")
    await cache.store.upstream_tags.freeze(APP, Tag("1"), index.digest, by=BY)
    nested = await cache.fetch(WEB, "nested")
    await cache.add_index(WEB, [nested], "1")  # only the manifest that this index lists is frozen
    await cache.store.upstream_tags.freeze(WEB, Tag("2"), nested.digest, by=BY)
    newer = await cache.fetch(APP, "newer", tag="1")
    cache.clock.now += 1000
    evictor, budget = cache.evictor(1), Budget("cache", ("hub", "other"), 1)
    assert [image.digest for image in await evictor.plan(budget)] == [newer.digest]
    assert await evictor.evict() == 1
    for repo, image in [(APP, index), (APP, children[0]), (APP, children[1]), (WEB, nested)]:
        assert await cache.has(repo, image)
        for blob in image.blobs:
            await cache.store.resolve_blob(repo, blob.digest)
    assert await cache.counted_bytes() == await cache.stored_bytes() == 3 * LAYER_BYTES + 2


async def test_images_from_before_the_configuration_are_evicted(cache: Cache) -> None:
    """Images that were stored before their upstream was in the settings can be evicted."""
    store = cache.store
    await configure_and_count(store.usage, store.leases, [])
    assert cache.db.execute("SELECT count(*) FROM cached_manifest").get == 0
    images = [await cache.fetch(APP, f"layer {n}") for n in range(3)]
    await configure_and_count(store.usage, store.leases, SCOPES)
    cache.clock.now += 1
    assert (await store.cached_images.summary("hub")).images == 3
    await cache.evictor(2 * LAYER_BYTES).evict()
    assert [await cache.has(APP, image) for image in images] == [False, False, True]


async def test_free_space_of_the_disk(cache: Cache) -> None:
    """If less than `low_free` bytes of the disk are free, images are evicted until `high_free` bytes are free."""
    images = [await cache.fetch(APP, f"layer {n}") for n in range(4)]
    bytes_before = await cache.stored_bytes()
    cache.clock.now += 1
    evictor = cache.evictor(low_free=1500, high_free=2500)
    evicted_images: list[EvictedImage] = []

    async def on_evicted(image: EvictedImage) -> None:
        evicted_images.append(image)
        cache.free = 1000 + bytes_before - await cache.stored_bytes()

    cache.free = 1500
    assert await evictor.evict(on_evicted) == 0
    cache.free = 1000
    assert await evictor.evict(on_evicted) == 2
    assert [image.digest for image in evicted_images] == [image.digest for image in images[:2]]
    assert [image.bytes for image in evicted_images] == [LAYER_BYTES, LAYER_BYTES]


async def test_the_plan_lists_the_images_that_an_eviction_evicts(cache: Cache) -> None:
    """The plan for a budget lists the images that the eviction evicts, in the same order and with the same freed bytes.
    The test has shared layers, indexes and pulls."""
    children = [await cache.fetch(APP, "base", f"child {n}") for n in range(3)]
    await cache.add_index(APP, children[:2], "one")
    await cache.add_index(APP, children[1:], "two")
    images = [await cache.fetch(WEB, "base", f"layer {n}", tag=f"t{n}") for n in range(4)]
    await cache.fetch(OTHER_APP, "base")
    cache.pull(images[1], children[0])
    cache.clock.now += 1
    for max_bytes in (7 * LAYER_BYTES, 6 * LAYER_BYTES, 3 * LAYER_BYTES, LAYER_BYTES, 1):
        evictor, budget = cache.evictor(), Budget("cache", ("hub", "other"), max_bytes)
        evicted: list[EvictedImage] = []
        planned = await evictor.plan(budget)
        used_before = await cache.counted_bytes()

        async def on_evicted(image: EvictedImage, evicted: list[EvictedImage] = evicted) -> None:
            evicted.append(image)

        await evictor.evict_to(budget, on_evicted)
        assert evicted == planned
        assert used_before - await cache.counted_bytes() == sum(image.bytes for image in planned)
    assert await cache.counted_bytes() == await cache.stored_bytes() == 0


async def test_simultaneous_evictions_evict_no_more_than_needed(cache: Cache) -> None:
    """Evictions that are started at the same time run one after the other. Together they evict no more images than
    needed."""
    for n in range(20):
        await cache.fetch(APP, f"layer {n}")
    cache.clock.now += 1
    assert sum(await asyncio.gather(*(cache.evictor(10 * LAYER_BYTES).evict() for _ in range(3)))) == 11
    # 95 % of the budget is enough for nine layers.
    assert await cache.counted_bytes() == 9 * LAYER_BYTES + 2


async def test_each_image_is_read_once(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """An eviction reads each image at most once, even if many images must stay and an index lists many manifests. The
    next eviction does not read the images that must stay again, and needs one call of `evict_next` for each evicted
    image."""
    pinned = RepositoryName("hub/library/app")
    children = [await cache.fetch(pinned, f"child {n}") for n in range(30)]
    await cache.add_index(pinned, children, "all")
    for n in range(30):
        await cache.fetch(APP, f"layer {n}")
    cached_images = cache.store.cached_images
    evict_next, find_image = cached_images.evict_next, cached_image_tables.find_image
    calls, read_manifests = 0, list[int]()

    async def count_and_evict(*arguments: object) -> EvictedImage | bool:
        nonlocal calls
        calls += 1
        return await evict_next(*arguments)  # type: ignore[arg-type]

    def record_and_find(db: apsw.Connection, manifest: int) -> Image | None:
        read_manifests.append(manifest)
        return find_image(db, manifest)

    monkeypatch.setattr(cached_images, "evict_next", count_and_evict)
    monkeypatch.setattr(cached_image_tables, "find_image", record_and_find)
    cache.clock.now += 1
    assert await cache.evictor(50 * LAYER_BYTES, is_kept=lambda repo: repo == pinned).evict() == 13
    assert len(read_manifests) == len(set(read_manifests)) == len(children) + 1 + 13
    calls = 0
    read_manifests.clear()
    cache.clock.now += 1
    assert await cache.evictor(45 * LAYER_BYTES, is_kept=lambda repo: repo == pinned).evict() == 5
    assert (calls, len(read_manifests)) == (5, 5)
