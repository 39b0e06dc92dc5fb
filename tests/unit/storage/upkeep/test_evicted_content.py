"""What an eviction deletes together with an image, such as its tags, referrers and pulls. Blobs that other manifests or
repositories use stay. The tests use a real store."""

from __future__ import annotations

import random

import pytest

from storage.cached_images import EvictedImage, EvictionRules
from storage.content import Manifest
from storage.metadata.sqlite.manifest_deletion import MAX_TAGS_PER_TRANSACTION
from storage.names import RepositoryName, Tag
from storage.outbox import LIST_READER, EventAction, EventReader
from storage.upkeep.evictor import Budget
from tests.fakes.mirror_cache import APP, LAYER_BYTES, OTHER_APP, WEB, Cache
from tests.fakes.registry_content import BY, CONFIG_TYPE, descriptor_of, image_of


async def test_an_evicted_image_has_events(cache: Cache) -> None:
    """An eviction adds one event for the tag and one for the manifest of the image. Before, storing the image in
    the cache has added an event (`FILL`)."""
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


async def test_evicted_manifests_are_not_kept_to_be_put_back(cache: Cache) -> None:
    """No copy of an evicted manifest is kept, from which it could be put back, because the mirror can fetch it again.
    Its pulls and its rank in the order of eviction are deleted with it."""
    children = [await cache.fetch(APP, f"child {n}") for n in range(2)]
    await cache.add_index(APP, children, "1")
    cache.pull(children[0])
    cache.clock.now += 1
    assert await cache.evictor(1).evict() == 1
    for table in ("manifest", "deleted_manifest", "manifest_pull", "cached_manifest"):
        assert cache.db.execute(f"SELECT count(*) FROM {table}").get == 0


@pytest.mark.slow
async def test_many_tags_are_evicted_in_several_transactions(cache: Cache) -> None:
    """If the image that `evict_next` has to evict has very many tags, the call deletes only some of them and returns
    True. The next calls delete more, and the last one deletes the rest and the image."""
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


async def test_blobs_of_a_deleted_manifest_are_removed_when_no_image_is_left(cache: Cache) -> None:
    """If the cache exceeds its budget and has no image left to evict, the eviction removes the blobs of a deleted
    manifest. It does not wait for the end of their grace period, which would leave the cache above its budget. But it
    keeps blobs that were used in the last 60 seconds (`storage.upkeep.evictor.UNUSED_SECONDS`)."""
    image = await cache.fetch(APP, "layer")
    await cache.store.delete_manifest(APP, image.digest, by=BY)
    cache.clock.now += 30
    assert await cache.evictor(10).evict() == 0
    assert await cache.counted_bytes() == LAYER_BYTES + 2
    cache.clock.now += 60
    await cache.evictor(10).evict()
    assert await cache.counted_bytes() == await cache.stored_bytes() == 0


def blobs_of_manifests(cache: Cache) -> set[tuple[int, str]]:
    """Returns which manifest refers to which blob, as pairs of the manifest's row id and the blob's digest. Leaves out
    the blobs that the manifest's repository does not have."""
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
            await cache.add_index(repo, rng.sample(in_repo, min(3, len(in_repo))), f"index{rng.randrange(5)}")
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
            expected = {(manifest, digest) for manifest, digest in blobs_before if manifest in remaining_ids}
            assert expected <= blobs_of_manifests(cache)
            missing_children = cache.db.execute(
                "SELECT count(*) FROM manifest_child c WHERE NOT EXISTS (SELECT 1 FROM manifest m "
                "WHERE m.repository = c.repository AND m.digest = c.digest)"
            ).get
            assert missing_children == 0
            assert await cache.stored_bytes() == cache.db.execute("SELECT sum(size) FROM blob").get
