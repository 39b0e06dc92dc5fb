"""The queue of blobs to prefetch."""

from __future__ import annotations

import os
import threading
from contextlib import AsyncExitStack

import pytest

from registry.mirror.fill.slots import PULL_IDLE_SECONDS
from registry.mirror.prefetch import MAX_IMAGE_BLOBS, MAX_QUEUED_BLOBS, MAX_RUNNING_FILLS
from storage.content import digest_of
from storage.names import Digest, RepositoryName, Tag
from tests.fakes.registry_content import read_blob
from tests.unit.registry.conftest import wait_until
from tests.unit.registry.mirror.conftest import MIRRORED_REPO, UPSTREAM_REPO, MirrorStore, MirrorWorker, stored

FIRST = b"a first layer"
TAG = Tag("1")


def layers(count: int, of: str = "layer") -> list[bytes]:
    return [f"{of} {number}".encode() * 20_000 for number in range(count)]


async def take(worker: MirrorWorker, stack: AsyncExitStack, count: int) -> None:
    """Takes connections as other fills would."""
    for _ in range(count):
        assert await stack.enter_async_context(worker.store.leases.try_slot("upstream-docker.io", 4))


def fetched(site: MirrorStore) -> list[Digest]:
    """Returns the blobs in the order in which they were fetched."""
    order: list[Digest] = []
    site.far.on_fetch = order.append
    return order


async def test_what_waits_costs_nothing(site: MirrorStore) -> None:
    """While other fills hold all connections, queued blobs have no open file and no fill. After that, they are fetched
    a few at a time, in the order of the image."""
    site.configure(prefetch="layers")
    made = site.far.add_image(UPSTREAM_REPO, FIRST, *layers(40))
    site.far.connections = 8
    order = fetched(site)
    async with site.worker() as worker, AsyncExitStack() as stack:
        await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
        await wait_until(lambda: not worker.mirror.busy)
        for _ in range(7):
            assert await stack.enter_async_context(worker.store.leases.try_slot("upstream-docker.io", 8))
        before = len(os.listdir("/proc/self/fd"))
        await read_blob(worker.mirror, MIRRORED_REPO, digest_of(FIRST))
        await wait_until(lambda: not worker.mirror.running_fills)
        assert worker.mirror.busy
        assert len(os.listdir("/proc/self/fd")) <= before
        gate = site.far.faults.gates[0] = threading.Event()
        await stack.aclose()
        await wait_until(lambda: site.far.at_once == MAX_RUNNING_FILLS)
        assert len(worker.mirror.running_fills) == MAX_RUNNING_FILLS
        gate.set()
        await stored(worker, made.layers[-1].digest)
        await wait_until(lambda: not worker.mirror.busy)
    assert site.far.most_at_once <= MAX_RUNNING_FILLS
    places = [order.index(layer.digest) for layer in made.layers[1:]]
    assert all(abs(place - number) <= 2 * MAX_RUNNING_FILLS for number, place in enumerate(places, start=2))


async def test_a_blob_is_not_fetched_twice_for_two_images(site: MirrorStore) -> None:
    """Images that share layers, in one repository or two, fetch each layer once."""
    site.configure(prefetch="layers")
    other = RepositoryName("docker.io/library/other")
    shared = layers(6)
    site.far.add_image(UPSTREAM_REPO, FIRST, *shared, tags=("1",))
    site.far.add_image(UPSTREAM_REPO, FIRST, *shared, b"one more", tags=("2",))
    site.far.add_image("library/other", FIRST, *shared)
    async with site.worker() as worker, AsyncExitStack() as stack:
        await take(worker, stack, 3)
        for repo, tag in ((MIRRORED_REPO, "1"), (MIRRORED_REPO, "2"), (other, "1")):
            await worker.mirror.get_manifest(repo, Tag(tag))
            await read_blob(worker.mirror, repo, digest_of(FIRST))
        await stack.aclose()
        await wait_until(lambda: not worker.mirror.busy)
        for layer in shared:
            assert await read_blob(worker.mirror, other, digest_of(layer)) == layer
            assert site.far.bytes_sent(digest_of(layer)) == len(layer)


async def test_what_is_stale_is_dropped(site: MirrorStore) -> None:
    """Queued blobs of an image whose pull is over are dropped. A newer pull of the image keeps them."""
    site.configure(prefetch="layers")
    site.far.add_image(UPSTREAM_REPO, FIRST, *layers(10, "old"), tags=("1",))
    site.far.add_image(UPSTREAM_REPO, FIRST, *layers(10, "new"), tags=("2",))
    async with site.worker() as worker, AsyncExitStack() as stack:
        for tag in ("1", "2"):
            await worker.mirror.get_manifest(MIRRORED_REPO, Tag(tag))
        await wait_until(lambda: not worker.mirror.busy)
        await take(worker, stack, 3)
        await read_blob(worker.mirror, MIRRORED_REPO, digest_of(FIRST))
        site.monotonic.now += PULL_IDLE_SECONDS - 1
        await worker.mirror.get_manifest(MIRRORED_REPO, Tag("2"))
        site.monotonic.now += 2
        await stack.aclose()
        await wait_until(lambda: not worker.mirror.busy)
        assert not any(digest_of(layer) in site.far.sent for layer in layers(10, "old"))
        assert all(digest_of(layer) in site.far.sent for layer in layers(10, "new"))


@pytest.mark.slow
async def test_a_monstrous_image(site: MirrorStore) -> None:
    """A manifest with tens of thousands of layers queues only as many blobs as one image may queue. The length of the
    queue is limited as well."""
    site.configure(prefetch="layers")
    assert MAX_IMAGE_BLOBS < MAX_QUEUED_BLOBS
    many = [b"%d" % number for number in range(2 * MAX_IMAGE_BLOBS)]
    for number in range(6):
        site.far.add_image(UPSTREAM_REPO, FIRST, *(each + b" of %d" % number for each in many), tags=(str(number),))
    async with site.worker() as worker, AsyncExitStack() as stack:
        for number in range(6):
            await worker.mirror.get_manifest(MIRRORED_REPO, Tag(str(number)))
        await wait_until(lambda: not worker.mirror.busy)
        await take(worker, stack, 3)
        await read_blob(worker.mirror, MIRRORED_REPO, digest_of(FIRST))
        await stack.aclose()
        await wait_until(lambda: not worker.mirror.busy)
    ahead = len(site.far.sent) - 2  # without the config, which they share, and the layer asked for
    assert MAX_IMAGE_BLOBS < ahead <= MAX_QUEUED_BLOBS + MAX_RUNNING_FILLS
    assert sum(digest_of(each + b" of 0") in site.far.sent for each in many) <= MAX_IMAGE_BLOBS
