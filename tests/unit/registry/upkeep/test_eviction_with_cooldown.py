"""Eviction keeps the images that a cooldown serves, with a real store and the settings of an upstream."""

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
from storage.upkeep.usage_counting import count_scopes
from storage.upstream_tags import Sighting
from tests.fakes.registry_content import BY, image_of, index_of, push_blob
from tests.fakes.upkeep_store import DAY, Clock

APP = RepositoryName("docker.io/library/app")
TAG = Tag("1")


async def evictor_of(store: StoredRegistry, clock: Clock, cooldown: float) -> Evictor:
    """Returns the evictor of a server whose cache may have one byte."""
    settings = Settings(upstream=[Upstream(name="docker.io", cache_max=ByteSize(1), cooldown=cooldown)])
    router = Router(store, {}, store.is_known_repository, NamingRules(["docker.io"]))
    await count_scopes(store.usage, store.leases, scope_definitions(settings))
    return upkeep_components(settings, store, router, clock).evictor


async def mirror(store: StoredRegistry, clock: Clock, seed: str) -> Manifest:
    """Stores an index of one image and points the upstream's tag at it. Returns the index."""
    child = image_of(await push_blob(store, APP, f"config of {seed}".encode()), [])
    index = index_of([child.descriptor])
    await store.put_manifest(APP, child, by=BY, sparse=True)
    await store.put_manifest(APP, index, [TAG], by=BY, sparse=True)
    before = await store.upstream_tags.sightings(APP, TAG)
    await store.upstream_tags.save_sightings(APP, TAG, [*before, Sighting(clock(), index.digest)])
    clock.now += 1
    return index


async def cached(store: StoredRegistry, *indexes: Manifest) -> list[bool]:
    """Returns for each index whether it is cached with its image."""
    found = []
    for index in indexes:
        try:
            for digest in (index.digest, *(child.digest for child in index.manifests)):
                for blob in (await store.get_manifest(APP, digest)).blobs:
                    await store.resolve_blob(APP, blob.digest)
        except (ManifestUnknown, BlobUnknown):
            found.append(False)
        else:
            found.append(True)
    return found


async def test_what_a_cooldown_serves_stays(store: StoredRegistry, clock: Clock) -> None:
    """An older image stays until the newest digest is served. Images that are not served are evicted."""
    evictor = await evictor_of(store, clock, 3 * DAY)
    oldest = await mirror(store, clock, "oldest")
    clock.pass_days(10)
    served = await mirror(store, clock, "served")
    clock.pass_days(10)
    newest = await mirror(store, clock, "newest")
    clock.pass_days(1)
    assert await evictor.evict() == 2
    assert await cached(store, oldest, served, newest) == [False, True, False]
    clock.pass_days(1.9)
    assert await evictor.evict() == 0
    clock.pass_days(0.2)
    assert await evictor.evict() == 1
    assert await cached(store, served) == [False]


async def test_without_a_cooldown_it_goes(store: StoredRegistry, clock: Clock) -> None:
    evictor = await evictor_of(store, clock, 0.0)
    images = [await mirror(store, clock, seed) for seed in ("older", "newer")]
    clock.pass_days(1)
    assert await evictor.evict() == 2
    assert await cached(store, *images) == [False, False]
