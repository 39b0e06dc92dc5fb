"""Eviction deletes mirrored images if the cache is larger than its budget. The tests check in a real store which images
are evicted, in which order, and which images stay."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import apsw
import pytest

from storage.cached_images import EvictedImage, EvictionRules
from storage.composition import open_registry, prepare_data_dir
from storage.content import Manifest, digest_of
from storage.data_dir.layout import Layout
from storage.errors import ManifestUnknown
from storage.metadata.sqlite.database import connect
from storage.metadata.sqlite.manifest_deletion import MAX_TAGS_PER_TRANSACTION
from storage.names import Digest, Reference, RepositoryName, Tag
from storage.outbox import LIST_READER, EventAction, EventReader
from storage.pulls import PullCount
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.evictor import Budget, CacheLimits, Evictor
from storage.upkeep.usage_counting import count_scopes
from storage.usage import ScopeDefinition
from tests.fakes.registry_content import BY, CONFIG_TYPE, descriptor_of, image_of, index_of

SCOPES = [
    ScopeDefinition("cache hub", ("hub/",), upstream="hub"),
    ScopeDefinition("cache other", ("other/",), upstream="other"),
    ScopeDefinition("cache", ("hub/", "other/")),
]
APP, WEB, OTHER_APP = RepositoryName("hub/app"), RepositoryName("hub/web"), RepositoryName("other/app")
LAYER_BYTES = 1000
"""The size of each layer in these tests. Each config has 2 bytes."""


class StillClock:
    """A clock that stands still until a test moves it."""

    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Cache:
    """A store with the cached content of two mirrors. `downloads`: the blobs that are being downloaded. `free`: the
    free bytes of the disk; None: unknown."""

    def __init__(self, store: StoredRegistry, db: apsw.Connection, clock: StillClock) -> None:
        self.store = store
        self.db = db
        self.clock = clock
        self.monotonic = StillClock()
        self.downloads: set[Digest] = set()
        self.free: int | None = None

    def evictor(self, max_bytes: int | None = None, **limits: object) -> Evictor:
        """Returns an evictor with these limits. `max_bytes`: the budget of both mirrors together; None: no budget."""
        budgets = () if max_bytes is None else (Budget("cache", ("hub", "other"), max_bytes),)
        all_limits = CacheLimits(("hub", "other"), budgets, **limits)  # type: ignore[arg-type]
        store = self.store

        async def list_downloads() -> set[Digest]:
            return self.downloads

        return Evictor(
            store.cached_images,
            store.usage,
            store.collector,
            store.leases,
            all_limits,
            list_downloads=list_downloads,
            free_bytes=lambda: self.free,
            clock=self.clock,
            monotonic=self.monotonic,
        )

    async def fetch(self, repo: RepositoryName, *layers: str, tag: str = "", complete: bool = True) -> Manifest:
        """Stores an image as a mirror does, one second after the previous change. `layers`: the texts in its layers.
        `complete`: whether its blobs are stored as well."""
        self.clock.now += 1
        contents = [layer.encode().ljust(LAYER_BYTES, b".") for layer in layers]
        image = image_of(descriptor_of(b"{}", CONFIG_TYPE), [descriptor_of(data) for data in contents])
        await self.store.put_manifest(repo, image, [Tag(tag)] if tag else [], by=BY, sparse=True)
        for data in [b"{}", *contents] if complete else []:
            await self.add_blob(repo, data)
        return image

    async def add_blob(self, repo: RepositoryName, data: bytes) -> None:
        digest = digest_of(data)
        place = Layout.blob_place(digest)
        path = Path(self.db.filename).parent / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        await self.store.metadata.adopt_blob(repo, digest, len(data), place)

    async def list(self, repo: RepositoryName, children: Sequence[Manifest], tag: str) -> Manifest:
        """Stores an index that lists the children."""
        index = index_of([child.descriptor for child in children])
        await self.store.put_manifest(repo, index, [Tag(tag)], by=BY, sparse=True)
        return index

    def pull(self, *manifests: Manifest) -> None:
        """Records a pull of each manifest. Each pull is one second after the previous change."""
        for manifest in manifests:
            self.clock.now += 1
            self.db.execute(
                "INSERT INTO manifest_pull (manifest, upstream, last, pulls) "
                "SELECT id, 'hub', ?, 1 FROM manifest WHERE digest = ? "
                "ON CONFLICT (manifest) DO UPDATE SET last = excluded.last, pulls = pulls + 1",
                (self.clock.now, manifest.digest),
            )

    async def has(self, repo: RepositoryName, manifest: Manifest | str) -> bool:
        reference: Reference = Tag(manifest) if isinstance(manifest, str) else manifest.digest
        try:
            await self.store.resolve_manifest(repo, reference)
        except ManifestUnknown:
            return False
        return True

    async def stored_bytes(self) -> int:
        """Returns the total size of all blob files. Checks that the trash is empty."""
        root = Path(self.db.filename).parent
        assert list((root / "trash").iterdir()) == []
        return sum(file.stat().st_size for file in (root / "blobs").rglob("*") if file.is_file())

    async def counted_bytes(self) -> int:
        """Returns the bytes that the store counts for both mirrors. Checks that they equal a recount."""
        use = await self.store.usage.scope("cache")
        assert use == await self.store.usage.recount("cache")
        assert use is not None
        return use.bytes


@pytest.fixture
async def cache(tmp_path: Path) -> AsyncIterator[Cache]:
    prepare_data_dir(tmp_path)
    clock = StillClock()
    db = connect(tmp_path / "entrepot.db")
    async with open_registry(tmp_path, clock=clock) as store:
        await count_scopes(store.usage, store.leases, SCOPES)
        yield Cache(store, db, clock)
    db.close()


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


async def test_an_evicted_image_has_events(cache: Cache) -> None:
    """An eviction adds one event for the tag and one for the manifest of the image. The download of the image (a fill)
    has added an event as well."""
    await cache.store.outbox.configure([EventReader(LIST_READER, frozenset(EventAction), ("**",))])
    image = await cache.fetch(APP, "layer", tag="v1")
    cache.clock.now += 1
    await cache.evictor(10).evict()
    events = [event.content for event in (await cache.store.outbox.after(0, 10)).events]
    assert [(event.action, event.tag, event.digest) for event in events] == [
        (EventAction.FILL, "v1", image.digest),
        (EventAction.EVICTION, "v1", image.digest),
        (EventAction.EVICTION, None, image.digest),
    ]


async def test_nothing_is_evicted_within_the_budget(cache: Cache) -> None:
    """If the cache is as large as its budget, no image is evicted."""
    image = await cache.fetch(APP, "layer")
    cache.clock.now += 1
    assert await cache.evictor(LAYER_BYTES + 2).evict() == 0
    assert await cache.has(APP, image)


async def test_a_shared_layer_counts_once_and_stays(cache: Cache) -> None:
    """A layer of several images counts once. It stays until all of these images are evicted."""
    first = await cache.fetch(APP, "base", "one")
    second = await cache.fetch(WEB, "base", "two")
    third = await cache.fetch(APP, "base", "three")
    cache.clock.now += 1
    assert await cache.counted_bytes() == 4 * LAYER_BYTES + 2
    await cache.evictor(3 * LAYER_BYTES + 500).evict()
    assert [await cache.has(APP, first), await cache.has(WEB, second), await cache.has(APP, third)] == [
        *(False, True, True)
    ]
    assert await cache.counted_bytes() == await cache.stored_bytes() == 3 * LAYER_BYTES + 2


async def test_a_blob_that_was_mounted_by_a_hosted_repository_stays(cache: Cache) -> None:
    """If a hosted repository has mounted a blob of an evicted image, the file of the blob stays. It no longer counts
    for the cache."""
    image = await cache.fetch(APP, "layer")
    await cache.store.mount_blob(RepositoryName("team/app"), image.blobs[1].digest, APP, BY)
    cache.clock.now += 1
    await cache.evictor(10).evict()
    assert not await cache.has(APP, image)
    assert (await cache.counted_bytes(), await cache.stored_bytes()) == (0, LAYER_BYTES)


async def test_a_pull_of_a_child_counts_for_its_index(cache: Cache) -> None:
    """A pull of a manifest counts as a pull of the index that lists it. An index is evicted together with its
    manifests, except manifests that another index lists."""
    children = [await cache.fetch(APP, f"child {n}") for n in range(3)]
    old_index = await cache.list(APP, children[:2], "old")
    new_index = await cache.list(APP, children[1:], "new")
    alone = await cache.fetch(WEB, "alone")
    cache.pull(children[2])
    cache.clock.now += 1
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


async def test_referrers_are_evicted_with_their_subject(cache: Cache) -> None:
    """A pull of a signature counts as a pull of the signed image. When the image is evicted, the signature is evicted
    as well."""
    image = await cache.fetch(APP, "layer")
    signature = image_of(descriptor_of(b"{}", CONFIG_TYPE), subject=image.digest)
    await cache.store.put_manifest(APP, signature, by=BY, sparse=True)
    other = await cache.fetch(WEB, "other")
    cache.pull(signature)
    cache.clock.now += 1
    await cache.evictor(LAYER_BYTES + 500).evict()
    assert [await cache.has(APP, image), await cache.has(WEB, other)] == [True, False]
    await cache.evictor(500).evict()
    assert [await cache.has(APP, image), await cache.has(APP, signature)] == [False, False]


async def test_images_that_are_never_evicted(cache: Cache) -> None:
    """An image is not evicted if a pattern of the settings keeps it, if a tag is frozen at it, if one of its blobs is
    being downloaded, or if its manifest was stored a short time ago."""
    kept_image = await cache.fetch(RepositoryName("hub/library/app"), "kept")
    frozen_image = await cache.fetch(APP, "frozen", tag="frozen")
    cache.db.execute("INSERT INTO frozen_tag VALUES (?, 'frozen', ?, 0, '')", (APP, frozen_image.digest))
    downloaded = await cache.fetch(APP, "downloaded")
    cache.downloads.add(downloaded.blobs[1].digest)
    begun_image = await cache.fetch(APP, "begun", complete=False)
    last_image = await cache.fetch(WEB, "last")
    cache.clock.now += 1
    evictor = cache.evictor(1, is_kept=lambda repo: repo.startswith("hub/library/"))
    assert await evictor.evict() == 1
    assert not await cache.has(WEB, last_image)
    cache.downloads.clear()
    cache.clock.now += 601
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
    index = await cache.list(APP, children, "1")
    await cache.store.upstream_tags.freeze(APP, Tag("1"), index.digest, by=BY)
    nested = await cache.fetch(WEB, "nested")
    await cache.list(WEB, [nested], "1")  # only the manifest that this index lists is frozen
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


async def test_evicted_manifests_are_not_stored_for_a_restore(cache: Cache) -> None:
    """An evicted manifest is not stored until the end of the grace period, because the mirror can fetch it again. Its
    pulls and its rank in the order of eviction are deleted with it."""
    children = [await cache.fetch(APP, f"child {n}") for n in range(2)]
    await cache.list(APP, children, "1")
    cache.pull(children[0])
    cache.clock.now += 1
    assert await cache.evictor(1).evict() == 1
    for table in ("manifest", "deleted_manifest", "manifest_pull", "cached_manifest"):
        assert cache.db.execute(f"SELECT count(*) FROM {table}").get == 0


async def test_many_tags_are_evicted_in_several_transactions(cache: Cache) -> None:
    """A call that finds an image with very many tags deletes only some of them, and returns True. The next calls delete
    the rest and then the image."""
    image = await cache.fetch(APP, "layer")
    tags = [Tag(f"t{number}") for number in range(2 * MAX_TAGS_PER_TRANSACTION + 1)]
    await cache.store.put_manifest(APP, image, tags, by=BY, sparse=True)
    cache.clock.now += 1
    rules = EvictionRules(lambda _: False, frozenset(), 0.0)
    tag_counts: list[int] = []
    outcome: EvictedImage | bool = True
    while outcome is True:
        outcome = await cache.store.cached_images.evict_next(["hub"], rules, cache.clock.now, BY)
        tag_counts.append(cache.db.execute("SELECT count(*) FROM tag").get)
    assert isinstance(outcome, EvictedImage)
    assert tag_counts == [MAX_TAGS_PER_TRANSACTION + 1, 1, 0]


@pytest.mark.parametrize("restorable", [True, False])
async def test_pulls_of_a_deleted_manifest_do_not_count_for_a_new_one(cache: Cache, restorable: bool) -> None:
    """A manifest that is stored after another one was deleted has its own pulls and rank, even if it gets the same row
    id."""
    first = await cache.fetch(APP, "first", tag="1")
    cache.pull(first)
    await cache.store.delete_manifest(APP, first.digest, by=BY, restorable=restorable)
    for table in ("manifest_pull", "cached_manifest"):
        assert cache.db.execute(f"SELECT count(*) FROM {table}").get == 0
    # This pull was counted before the delete.
    await cache.store.pulls.save([PullCount(APP, first.digest, "hub", cache.clock.now, 1)])
    second = await cache.fetch(APP, "second")
    record = await cache.store.pulls.record(APP, second.digest)
    assert record is not None
    assert (record.last, record.pulls) == (cache.clock.now, 0)
    assert cache.db.execute("SELECT upstream, rank FROM cached_manifest").fetchall() == [("hub", cache.clock.now)]


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
    """The plan for a budget lists the same images, in the same order and with the same freed bytes, as the eviction.
    The test has shared layers, indexes and pulls."""
    children = [await cache.fetch(APP, "base", f"child {n}") for n in range(3)]
    await cache.list(APP, children[:2], "one")
    await cache.list(APP, children[1:], "two")
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


async def test_unused_links_are_evicted_when_no_image_is_left(cache: Cache) -> None:
    """If the cache is above its budget and no image is left, the blobs of a deleted manifest are evicted, although
    their grace period has not ended."""
    image = await cache.fetch(APP, "layer")
    await cache.store.delete_manifest(APP, image.digest, by=BY)
    cache.clock.now += 30
    assert await cache.evictor(10).evict() == 0
    assert await cache.counted_bytes() == LAYER_BYTES + 2
    cache.clock.now += 60
    await cache.evictor(10).evict()
    assert await cache.counted_bytes() == await cache.stored_bytes() == 0


async def test_images_from_before_the_configuration_are_evicted(cache: Cache) -> None:
    """Images that were stored before their upstream was in the settings can be evicted."""
    store = cache.store
    await count_scopes(store.usage, store.leases, [])
    assert cache.db.execute("SELECT count(*) FROM cached_manifest").get == 0
    images = [await cache.fetch(APP, f"layer {n}") for n in range(3)]
    await count_scopes(store.usage, store.leases, SCOPES)
    cache.clock.now += 1
    assert (await store.cached_images.summary("hub")).images == 3
    await cache.evictor(2 * LAYER_BYTES).evict()
    assert [await cache.has(APP, image) for image in images] == [False, False, True]


async def test_simultaneous_evictions_evict_no_more_than_needed(cache: Cache, tmp_path: Path) -> None:
    """Evictions that are started at the same time run one after the other. Together they evict no more images than
    needed."""
    for n in range(20):
        await cache.fetch(APP, f"layer {n}")
    cache.clock.now += 1
    assert sum(await asyncio.gather(*(cache.evictor(10 * LAYER_BYTES).evict() for _ in range(3)))) == 11
    assert await cache.counted_bytes() == 9 * LAYER_BYTES + 2


async def test_each_image_is_read_once(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """An eviction reads images that must stay, and manifests that indexes list, once, and not again for each evicted
    image."""
    pinned = RepositoryName("hub/library/app")
    children = [await cache.fetch(pinned, f"child {n}") for n in range(30)]
    await cache.list(pinned, children, "all")
    for n in range(30):
        await cache.fetch(APP, f"layer {n}")
    evictor = cache.evictor(50 * LAYER_BYTES, is_kept=lambda repo: repo == pinned)
    cache.clock.now += 1
    await evictor.evict()
    calls = 0
    cached_images = cache.store.cached_images
    evict_next = cached_images.evict_next

    async def count_and_evict(*arguments: object) -> EvictedImage | bool:
        nonlocal calls
        calls += 1
        return await evict_next(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(cached_images, "evict_next", count_and_evict)
    cache.clock.now += 1
    await cache.evictor(45 * LAYER_BYTES, is_kept=lambda repo: repo == pinned).evict()
    assert calls == 5  # one call for each evicted image


def blobs_of_manifests(cache: Cache) -> set[tuple[int, str]]:
    """Returns a pair of a manifest's row id and a blob's digest for each blob of a manifest that the manifest's
    repository has."""
    rows = cache.db.execute(
        "SELECT g.manifest, g.digest FROM manifest_blob g JOIN blob b ON b.digest = g.digest "
        "JOIN blob_link l ON l.blob = b.id AND l.repository = g.repository"
    )
    return {(manifest, digest) for manifest, digest in rows}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.slow
async def test_remaining_content_is_complete(cache: Cache, seed: int) -> None:
    """After evictions among random images, indexes, mounts and pulls, each remaining manifest has all its blobs, and
    each remaining index has all manifests that it lists. The counted bytes are right, and the files are those of the
    remaining blobs."""
    rng = random.Random(seed)
    hosted = RepositoryName("team/app")
    images: list[tuple[RepositoryName, Manifest]] = []
    for number in range(60):
        repo = rng.choice([APP, WEB, OTHER_APP])
        layers = {f"shared {rng.randrange(6)}", f"own {rng.randrange(40)}"}
        image = await cache.fetch(repo, *sorted(layers), tag=rng.choice(["", f"t{rng.randrange(9)}"]))
        images.append((repo, image))
        in_repo = [manifest for name, manifest in images if name == repo and await cache.has(repo, manifest)]
        if rng.random() < 0.3:
            await cache.list(repo, rng.sample(in_repo, min(3, len(in_repo))), f"index{rng.randrange(5)}")
        if rng.random() < 0.2:
            await cache.store.mount_blob(hosted, image.blobs[1].digest, repo, BY)
        if rng.random() < 0.5:
            cache.pull(rng.choice(images)[1])
        if number % 10 == 9:
            cache.clock.now += 1
            blobs_before = blobs_of_manifests(cache)
            target = (await cache.counted_bytes()) * 2 // 3
            await cache.evictor().evict_to(Budget("cache", ("hub", "other"), target))
            assert await cache.counted_bytes() <= target
            remaining_ids = {manifest for (manifest,) in cache.db.execute("SELECT id FROM manifest")}
            assert {link for link in blobs_before if link[0] in remaining_ids} <= blobs_of_manifests(cache)
            missing_children = cache.db.execute(
                "SELECT count(*) FROM manifest_child c WHERE NOT EXISTS (SELECT 1 FROM manifest m "
                "WHERE m.repository = c.repository AND m.digest = c.digest)"
            ).get
            assert missing_children == 0
            assert await cache.stored_bytes() == cache.db.execute("SELECT sum(size) FROM blob").get
