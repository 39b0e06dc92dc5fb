"""Eviction of mirrored images in a real store: which images are evicted, in which order, and which stay."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import apsw
import pytest

from storage.cached_images import EvictedImage
from storage.composition import open_registry, prepare_data_dir
from storage.content import Manifest, digest_of
from storage.data_dir.layout import Layout
from storage.errors import ManifestUnknown
from storage.metadata.sqlite.database import connect
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
APP, WEB, FAR = RepositoryName("hub/app"), RepositoryName("hub/web"), RepositoryName("other/app")
SIZE = 1000
"""Bytes of a layer here; configs have 2 bytes."""


class Time:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Cache:
    """A store with mirrored content."""

    def __init__(self, store: StoredRegistry, db: apsw.Connection, clock: Time) -> None:
        self.store = store
        self.db = db
        self.clock = clock
        self.downloads: set[Digest] = set()
        self.free: int | None = None

    def evictor(self, max_bytes: int | None = None, **limits: object) -> Evictor:
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
        )

    async def fetch(self, repo: RepositoryName, *layers: str, tag: str = "", complete: bool = True) -> Manifest:
        """Stores an image as a mirror does, one second after the previous one. `layers`: the texts in its layers."""
        self.clock.now += 1
        contents = [layer.encode().ljust(SIZE, b".") for layer in layers]
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
        """Stores an index of the children."""
        index = index_of([child.descriptor for child in children])
        await self.store.put_manifest(repo, index, [Tag(tag)], by=BY, sparse=True)
        return index

    def pull(self, *manifests: Manifest) -> None:
        """Records a pull of each manifest, one second after the last one."""
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
        """Returns the size of all files of blobs. Checks that the trash is empty."""
        root = Path(self.db.filename).parent
        assert list((root / "trash").iterdir()) == []
        return sum(file.stat().st_size for file in (root / "blobs").rglob("*") if file.is_file())

    async def used(self) -> int:
        use = await self.store.usage.scope("cache")
        assert use == await self.store.usage.recount("cache")
        assert use is not None
        return use.bytes


@pytest.fixture
async def cache(tmp_path: Path) -> AsyncIterator[Cache]:
    prepare_data_dir(tmp_path)
    clock = Time()
    db = connect(tmp_path / "entrepot.db")
    async with open_registry(tmp_path, clock=clock) as store:
        await count_scopes(store.usage, store.leases, SCOPES)
        yield Cache(store, db, clock)
    db.close()


async def test_images_that_were_not_pulled_for_the_longest_time_are_evicted(cache: Cache) -> None:
    """The images that were not pulled for the longest time are evicted, down to 95 % of the budget, with their tags,
    links and files. Pulls count for images of any upstream."""
    images = [await cache.fetch(repo, f"layer {n}", tag=f"t{n}") for n, repo in enumerate([APP, WEB, FAR] * 2)]
    cache.pull(images[0])
    assert await cache.used() == 6 * SIZE + 2
    cache.clock.now += 1
    assert await cache.evictor(4 * SIZE).evict() == 3
    assert [await cache.has(repo, image) for repo, image in zip([APP, WEB, FAR] * 2, images, strict=True)] == [
        *(True, False, False),
        *(False, True, True),
    ]
    assert await cache.used() == await cache.stored_bytes() == 3 * SIZE + 2
    assert not await cache.has(WEB, "t1")
    assert await cache.has(APP, "t0")
    [*lines] = cache.db.execute("SELECT actor, action, target FROM audit WHERE action = 'manifest.delete' ORDER BY id")
    assert lines == [("entrepot eviction", "manifest.delete", repo) for repo in (WEB, FAR, APP)]


async def test_an_evicted_image_has_events(cache: Cache) -> None:
    """The tag and the manifest of an evicted image have one event each. So has content that was fetched."""
    await cache.store.outbox.configure([EventReader(LIST_READER, frozenset(EventAction), ("**",))])
    image = await cache.fetch(APP, "layer", tag="v1")
    cache.clock.now += 1
    await cache.evictor(10).evict()
    events = [event.content for event in await cache.store.outbox.after(0, 10)]
    assert [(event.action, event.tag, event.digest) for event in events] == [
        (EventAction.FILL, "v1", image.digest),
        (EventAction.EVICTION, "v1", image.digest),
        (EventAction.EVICTION, None, image.digest),
    ]


async def test_nothing_goes_within_the_budget(cache: Cache) -> None:
    image = await cache.fetch(APP, "layer")
    cache.clock.now += 1
    assert await cache.evictor(SIZE + 2).evict() == 0
    assert await cache.has(APP, image)


async def test_a_shared_layer_counts_once_and_stays(cache: Cache) -> None:
    """A shared layer counts once. It stays as long as any remaining image has it."""
    first = await cache.fetch(APP, "base", "one")
    second = await cache.fetch(WEB, "base", "two")
    third = await cache.fetch(APP, "base", "three")
    cache.clock.now += 1
    assert await cache.used() == 4 * SIZE + 2
    await cache.evictor(3 * SIZE + 500).evict()
    assert [await cache.has(APP, first), await cache.has(WEB, second), await cache.has(APP, third)] == [
        *(False, True, True)
    ]
    assert await cache.used() == await cache.stored_bytes() == 3 * SIZE + 2


async def test_a_blob_that_was_mounted_by_a_hosted_repository_stays(cache: Cache) -> None:
    """A blob that a hosted repository has mounted no longer counts for the cache, and its file stays."""
    image = await cache.fetch(APP, "layer")
    await cache.store.mount_blob(RepositoryName("team/app"), image.blobs[1].digest, APP, BY)
    cache.clock.now += 1
    await cache.evictor(10).evict()
    assert not await cache.has(APP, image)
    assert (await cache.used(), await cache.stored_bytes()) == (0, SIZE)


async def test_a_pull_of_a_child_counts_for_its_index(cache: Cache) -> None:
    """An index and its children are evicted together. A child that another index lists stays."""
    children = [await cache.fetch(APP, f"child {n}") for n in range(3)]
    old = await cache.list(APP, children[:2], "old")
    new = await cache.list(APP, children[1:], "new")
    alone = await cache.fetch(WEB, "alone")
    cache.pull(children[2])
    cache.clock.now += 1
    await cache.evictor(3 * SIZE + 500).evict()
    assert [await cache.has(APP, each) for each in (old, *children, new)] == [False, False, True, True, True]
    assert await cache.has(WEB, alone)
    await cache.evictor(2 * SIZE + 500).evict()
    assert [await cache.has(APP, each) for each in (*children, new)] == [False, True, True, True]
    assert not await cache.has(WEB, alone)


async def test_referrers_go_with_their_subject(cache: Cache) -> None:
    image = await cache.fetch(APP, "layer")
    signature = image_of(descriptor_of(b"{}", CONFIG_TYPE), subject=image.digest)
    await cache.store.put_manifest(APP, signature, by=BY, sparse=True)
    other = await cache.fetch(WEB, "other")
    cache.pull(signature)
    cache.clock.now += 1
    await cache.evictor(SIZE + 500).evict()
    assert [await cache.has(APP, image), await cache.has(WEB, other)] == [True, False]
    await cache.evictor(500).evict()
    assert [await cache.has(APP, image), await cache.has(APP, signature)] == [False, False]


async def test_images_that_are_never_evicted(cache: Cache) -> None:
    """These images stay: those that a pattern or a frozen tag keeps, those that are being downloaded, and those whose
    download began a short time ago."""
    kept = await cache.fetch(RepositoryName("hub/library/app"), "kept")
    frozen = await cache.fetch(APP, "frozen", tag="frozen")
    cache.db.execute("INSERT INTO frozen_tag VALUES (?, 'frozen', ?, 0, '')", (APP, frozen.digest))
    downloaded = await cache.fetch(APP, "downloaded")
    cache.downloads.add(downloaded.blobs[1].digest)
    begun = await cache.fetch(APP, "begun", complete=False)
    last = await cache.fetch(WEB, "last")
    cache.clock.now += 1
    evictor = cache.evictor(1, is_kept=lambda repo: repo.startswith("hub/library/"))
    assert await evictor.evict() == 1
    assert not await cache.has(WEB, last)
    cache.downloads.clear()
    cache.clock.now += 601
    assert await evictor.evict() == 2
    assert [await cache.has(APP, image) for image in (frozen, downloaded, begun)] == [True, False, False]
    assert await cache.has(RepositoryName("hub/library/app"), kept)
    cache.db.execute("DELETE FROM frozen_tag")
    cache.clock.now += 1
    assert await evictor.evict() == 1


async def test_a_frozen_tag_keeps_all_that_it_needs(cache: Cache) -> None:
    """The frozen index, its children and their blobs stay, although the tag points at another manifest now. The plan is
    the same."""
    children = [await cache.fetch(APP, f"child {n}") for n in range(2)]
    index = await cache.list(APP, children, "1")
    await cache.store.upstream_tags.freeze(APP, Tag("1"), index.digest, by=BY)
    nested = await cache.fetch(WEB, "nested")
    await cache.list(WEB, [nested], "1")  # only a child of this index is frozen
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
    assert await cache.used() == await cache.stored_bytes() == 3 * SIZE + 2


async def test_mirrored_manifests_are_not_kept_to_be_put_back(cache: Cache) -> None:
    """An evicted manifest is not kept for the grace period. Its pulls and its place in the order of eviction are
    deleted with it."""
    children = [await cache.fetch(APP, f"child {n}") for n in range(2)]
    await cache.list(APP, children, "1")
    cache.pull(children[0])
    cache.clock.now += 1
    assert await cache.evictor(1).evict() == 1
    for table in ("manifest", "deleted_manifest", "manifest_pull", "cached_manifest"):
        assert cache.db.execute(f"SELECT count(*) FROM {table}").get == 0


@pytest.mark.parametrize("restorable", [True, False])
async def test_a_deleted_manifest_is_no_image_of_the_cache(cache: Cache, restorable: bool) -> None:
    """A manifest that is stored later, even with the same row id, has its own pulls and its own place."""
    first = await cache.fetch(APP, "first", tag="1")
    cache.pull(first)
    await cache.store.delete_manifest(APP, first.digest, by=BY, restorable=restorable)
    for table in ("manifest_pull", "cached_manifest"):
        assert cache.db.execute(f"SELECT count(*) FROM {table}").get == 0
    await cache.store.pulls.save([PullCount(APP, first.digest, "hub", cache.clock.now, 1)])  # counted before the delete
    second = await cache.fetch(APP, "second")
    record = await cache.store.pulls.record(APP, second.digest)
    assert record is not None
    assert (record.last, record.pulls) == (cache.clock.now, 0)
    assert cache.db.execute("SELECT upstream, rank FROM cached_manifest").fetchall() == [("hub", cache.clock.now)]


async def test_free_space_of_the_disk(cache: Cache) -> None:
    """If less space than the low mark is free, images are evicted until the high mark is free."""
    images = [await cache.fetch(APP, f"layer {n}") for n in range(4)]
    before = await cache.stored_bytes()
    cache.clock.now += 1
    evictor = cache.evictor(low_free=1500, high_free=2500)
    gone: list[EvictedImage] = []

    async def on_evicted(image: EvictedImage) -> None:
        gone.append(image)
        cache.free = 1000 + before - await cache.stored_bytes()

    cache.free = 1500
    assert await evictor.evict(on_evicted) == 0
    cache.free = 1000
    assert await evictor.evict(on_evicted) == 2
    assert [image.digest for image in gone] == [image.digest for image in images[:2]]
    assert [image.bytes for image in gone] == [SIZE, SIZE]


async def test_the_plan_is_what_the_eviction_does(cache: Cache) -> None:
    """The plan lists what an eviction evicts, with shared layers, indexes, pulls and images that stay."""
    children = [await cache.fetch(APP, "base", f"child {n}") for n in range(3)]
    await cache.list(APP, children[:2], "one")
    await cache.list(APP, children[1:], "two")
    images = [await cache.fetch(WEB, "base", f"layer {n}", tag=f"t{n}") for n in range(4)]
    await cache.fetch(FAR, "base")
    cache.pull(images[1], children[0])
    cache.clock.now += 1
    for to in (7 * SIZE, 6 * SIZE, 3 * SIZE, SIZE, 1):
        evictor, budget = cache.evictor(), Budget("cache", ("hub", "other"), to)
        done: list[EvictedImage] = []
        planned = await evictor.plan(budget)
        before = await cache.used()

        async def on_evicted(image: EvictedImage, done: list[EvictedImage] = done) -> None:
            done.append(image)

        await evictor.evict_to(budget, on_evicted)
        assert done == planned
        assert before - await cache.used() == sum(image.bytes for image in planned)
    assert await cache.used() == await cache.stored_bytes() == 0


async def test_unused_links_are_evicted_when_no_image_is_left(cache: Cache) -> None:
    """If the cache is above its budget, the blobs of a deleted manifest are evicted before the end of the grace
    period."""
    image = await cache.fetch(APP, "layer")
    await cache.store.delete_manifest(APP, image.digest, by=BY)
    cache.clock.now += 30
    assert await cache.evictor(10).evict() == 0
    assert await cache.used() == SIZE + 2
    cache.clock.now += 60
    await cache.evictor(10).evict()
    assert await cache.used() == await cache.stored_bytes() == 0


async def test_existing_images_are_found(cache: Cache) -> None:
    """Images that were stored before the upstream was in the settings can be evicted."""
    store = cache.store
    await count_scopes(store.usage, store.leases, [])
    assert cache.db.execute("SELECT count(*) FROM cached_manifest").get == 0
    images = [await cache.fetch(APP, f"layer {n}") for n in range(3)]
    await count_scopes(store.usage, store.leases, SCOPES)
    cache.clock.now += 1
    assert (await store.cached_images.summary("hub")).images == 3
    await cache.evictor(2 * SIZE).evict()
    assert [await cache.has(APP, image) for image in images] == [False, False, True]


async def test_eviction_in_two_processes(cache: Cache, tmp_path: Path) -> None:
    """Two processes do not evict at the same time. Together they evict no more than needed."""
    for n in range(20):
        await cache.fetch(APP, f"layer {n}")
    cache.clock.now += 1
    assert sum(await asyncio.gather(*(cache.evictor(10 * SIZE).evict() for _ in range(3)))) == 11
    assert await cache.used() == 9 * SIZE + 2


async def test_each_image_is_read_once(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Children and images that stay are read once, and not for each evicted image."""
    pinned = RepositoryName("hub/library/app")
    children = [await cache.fetch(pinned, f"child {n}") for n in range(30)]
    await cache.list(pinned, children, "all")
    for n in range(30):
        await cache.fetch(APP, f"layer {n}")
    evictor = cache.evictor(50 * SIZE, is_kept=lambda repo: repo == pinned)
    cache.clock.now += 1
    await evictor.evict()
    looks = 0
    cached_images = cache.store.cached_images
    evict_next = cached_images.evict_next

    async def counted(*arguments: object) -> EvictedImage | bool:
        nonlocal looks
        looks += 1
        return await evict_next(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(cached_images, "evict_next", counted)
    cache.clock.now += 1
    await cache.evictor(45 * SIZE, is_kept=lambda repo: repo == pinned).evict()
    assert looks == 5  # one for each image


def links(cache: Cache) -> set[tuple[int, str]]:
    """Returns the blobs of manifests that their repositories have, as pairs of a manifest's row id and a digest."""
    rows = cache.db.execute(
        "SELECT g.manifest, g.digest FROM manifest_blob g JOIN blob b ON b.digest = g.digest "
        "JOIN blob_link l ON l.blob = b.id AND l.repository = g.repository"
    )
    return {(manifest, digest) for manifest, digest in rows}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.slow
async def test_remaining_content_is_complete(cache: Cache, seed: int) -> None:
    """For any images, indexes, mounts and pulls: a remaining manifest has each blob that it had, a remaining index its
    children, a hosted repository its mounts, and the counts and files are exact."""
    choice = random.Random(seed)
    hosted = RepositoryName("team/app")
    images: list[tuple[RepositoryName, Manifest]] = []
    for number in range(60):
        repo = choice.choice([APP, WEB, FAR])
        layers = {f"shared {choice.randrange(6)}", f"own {choice.randrange(40)}"}
        image = await cache.fetch(repo, *sorted(layers), tag=choice.choice(["", f"t{choice.randrange(9)}"]))
        images.append((repo, image))
        own = [other for where, other in images if where == repo and await cache.has(repo, other)]
        if choice.random() < 0.3:
            await cache.list(repo, choice.sample(own, min(3, len(own))), f"index{choice.randrange(5)}")
        if choice.random() < 0.2:
            await cache.store.mount_blob(hosted, image.blobs[1].digest, repo, BY)
        if choice.random() < 0.5:
            cache.pull(choice.choice(images)[1])
        if number % 10 == 9:
            cache.clock.now += 1
            before = links(cache)
            target = (await cache.used()) * 2 // 3
            await cache.evictor().evict_to(Budget("cache", ("hub", "other"), target))
            assert await cache.used() <= target
            kept = {manifest for (manifest,) in cache.db.execute("SELECT id FROM manifest")}
            assert {link for link in before if link[0] in kept} <= links(cache)
            lost = cache.db.execute(
                "SELECT count(*) FROM manifest_child c WHERE NOT EXISTS (SELECT 1 FROM manifest m "
                "WHERE m.repository = c.repository AND m.digest = c.digest)"
            ).get
            assert lost == 0
            assert await cache.stored_bytes() == cache.db.execute("SELECT sum(size) FROM blob").get
