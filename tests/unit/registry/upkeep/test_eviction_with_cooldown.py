"""Eviction deletes mirrored images if the cache is larger than its budget, but not images that are served because of a
cooldown. A cooldown is the time for which a digest must hold an upstream's tag before the mirror serves it."""

from __future__ import annotations

from pydantic import ByteSize

from registry.config import Settings, Upstream
from registry.naming import NamingRules
from registry.router import Router
from registry.upkeep.budgets import scope_definitions
from registry.upkeep.components import upkeep_components
from storage.content import Manifest
from storage.errors import BlobUnknown, ManifestUnknown
from storage.names import RepositoryName, Tag
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.evictor import Evictor
from storage.upkeep.usage_counting import configure_and_count
from storage.upstream_tags import Sighting
from tests.fakes.registry_content import BY, image_of, index_of, push_blob
from tests.fakes.upkeep_store import DAY, Clock

APP = RepositoryName("docker.io/library/app")
TAG = Tag("1")


async def evictor_of(store: StoredRegistry, clock: Clock, cooldown: float) -> Evictor:
    """Returns the evictor of a server whose cache has a budget of one byte."""
    settings = Settings(upstream=[Upstream(name="docker.io", cache_max=ByteSize(1), cooldown=cooldown)])
    router = Router(store, {}, store.is_known_repository, NamingRules(["docker.io"]))
    await configure_and_count(store.usage, store.leases, scope_definitions(settings))
    return upkeep_components(settings, store, router, clock).evictor


async def store_mirrored_index(store: StoredRegistry, clock: Clock, seed: str) -> Manifest:
    """Stores an index of one image, and records that the upstream's tag points at it. Returns the index."""
    child = image_of(await push_blob(store, APP, f"config of {seed}".encode()), [])
    index = index_of([child.descriptor])
    await store.put_manifest(APP, child, by=BY, sparse=True)
    await store.put_manifest(APP, index, [TAG], by=BY, sparse=True)
    sightings = await store.upstream_tags.sightings(APP, TAG)
    await store.upstream_tags.save_sightings(APP, TAG, [*sightings, Sighting(clock(), index.digest)])
    clock.now += 1
    return index


async def are_cached(store: StoredRegistry, *indexes: Manifest) -> list[bool]:
    """Returns for each index whether the index and its image are cached."""
    results = []
    for index in indexes:
        try:
            for digest in (index.digest, *(child.digest for child in index.manifests)):
                for blob in (await store.get_manifest(APP, digest)).blobs:
                    await store.resolve_blob(APP, blob.digest)
        except (ManifestUnknown, BlobUnknown):
            results.append(False)
        else:
            results.append(True)
    return results


async def test_an_image_that_a_cooldown_serves_is_not_evicted(store: StoredRegistry, clock: Clock) -> None:
    """While the cooldown holds back the newest digest of a tag, the older image that is served stays. Images that are
    not served are evicted."""
    evictor = await evictor_of(store, clock, 3 * DAY)
    oldest = await store_mirrored_index(store, clock, "oldest")
    clock.pass_days(10)
    served = await store_mirrored_index(store, clock, "served")
    clock.pass_days(10)
    newest = await store_mirrored_index(store, clock, "newest")
    clock.pass_days(1)
    assert await evictor.evict() == 2
    assert await are_cached(store, oldest, served, newest) == [False, True, False]
    clock.pass_days(1.9)
    assert await evictor.evict() == 0
    clock.pass_days(0.2)
    assert await evictor.evict() == 1
    assert await are_cached(store, served) == [False]


async def test_without_a_cooldown_all_images_are_evicted(store: StoredRegistry, clock: Clock) -> None:
    """Without a cooldown, the images of all digests of a tag can be evicted."""
    evictor = await evictor_of(store, clock, 0.0)
    images = [await store_mirrored_index(store, clock, seed) for seed in ("older", "newer")]
    clock.pass_days(1)
    assert await evictor.evict() == 2
    assert await are_cached(store, *images) == [False, False]
