"""The queue of blobs that a mirror prefetches: downloads from the upstream before a client requests them."""

from __future__ import annotations

import threading
from contextlib import AsyncExitStack

import pytest

from registry.mirror.fill.demand import PULL_IDLE_SECONDS
from registry.mirror.prefetch import MAX_IMAGE_BLOBS, MAX_QUEUED_BLOBS, MAX_RUNNING_FILLS
from storage.content import digest_of
from storage.names import Digest, RepositoryName, Tag
from storage.partials import Partial
from tests.fakes.open_files import open_files_below
from tests.fakes.registry_content import read_blob
from tests.unit.registry.conftest import wait_until
from tests.unit.registry.mirror.conftest import (
    MIRRORED_REPO,
    UPSTREAM_REPO,
    MirrorSite,
    MirrorWorker,
    wait_until_stored,
)

FIRST = b"a first layer"
TAG = Tag("1")


def layers(count: int, prefix: str = "layer") -> list[bytes]:
    return [f"{prefix} {number}".encode() * 20_000 for number in range(count)]


async def take_connections(worker: MirrorWorker, stack: AsyncExitStack, count: int) -> None:
    """Takes `count` of the 4 upstream connections, as other fills (downloads of blobs into the cache) would."""
    for _ in range(count):
        assert await stack.enter_async_context(worker.store.leases.try_slot("upstream-docker.io", 4))


def record_fills(worker: MirrorWorker, monkeypatch: pytest.MonkeyPatch) -> list[Digest]:
    """Returns a list to which each blob is added when its fill begins, in order. On a slow machine, the requests to the
    upstream may have another order."""
    begun_digests: list[Digest] = []
    claim = worker.store.partials.claim

    async def recorded_claim(digest: Digest, size: int, source: str = "") -> Partial:
        begun_digests.append(digest)
        return await claim(digest, size, source)

    monkeypatch.setattr(worker.store.partials, "claim", recorded_claim)
    return begun_digests


async def test_queued_blobs_use_no_files_and_no_fills(site: MirrorSite, monkeypatch: pytest.MonkeyPatch) -> None:
    """While other fills hold all connections, the queued blobs have no open files and no fills of their own. When
    connections are free again, the queued blobs are fetched a few at a time, in the order of the manifest."""
    site.configure(prefetch="layers")
    manifest = site.upstream.add_image(UPSTREAM_REPO, FIRST, *layers(40))
    site.upstream.connections = 8
    async with site.worker() as worker, AsyncExitStack() as stack:
        begun_digests = record_fills(worker, monkeypatch)
        await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
        await wait_until(lambda: not worker.mirror.is_busy)
        for _ in range(7):
            assert await stack.enter_async_context(worker.store.leases.try_slot("upstream-docker.io", 8))
        await read_blob(worker.mirror, MIRRORED_REPO, digest_of(FIRST))
        await wait_until(lambda: not worker.mirror.running_fills)
        assert worker.mirror.is_busy
        assert open_files_below(site.data / "partials") == []
        gate = site.upstream.faults.gates[0] = threading.Event()
        await stack.aclose()
        await wait_until(lambda: site.upstream.at_once == MAX_RUNNING_FILLS)
        assert len(worker.mirror.running_fills) == MAX_RUNNING_FILLS
        gate.set()
        await wait_until_stored(worker, manifest.layers[-1].digest)
        await wait_until(lambda: not worker.mirror.is_busy)
    assert site.upstream.most_at_once <= MAX_RUNNING_FILLS
    # The fills of the config and of the first layer began before those of the queued layers.
    positions = [begun_digests.index(layer.digest) for layer in manifest.layers[1:]]
    assert all(abs(position - number) <= 2 * MAX_RUNNING_FILLS for number, position in enumerate(positions, start=2))


async def test_a_blob_is_not_fetched_twice_for_two_images(site: MirrorSite) -> None:
    """If images of one or two repositories share layers, each shared layer is fetched once."""
    site.configure(prefetch="layers")
    other = RepositoryName("docker.io/library/other")
    shared = layers(6)
    site.upstream.add_image(UPSTREAM_REPO, FIRST, *shared, tags=("1",))
    site.upstream.add_image(UPSTREAM_REPO, FIRST, *shared, b"one more", tags=("2",))
    site.upstream.add_image("library/other", FIRST, *shared)
    async with site.worker() as worker, AsyncExitStack() as stack:
        await take_connections(worker, stack, 3)
        for repo, tag in ((MIRRORED_REPO, "1"), (MIRRORED_REPO, "2"), (other, "1")):
            await worker.mirror.get_manifest(repo, Tag(tag))
            await read_blob(worker.mirror, repo, digest_of(FIRST))
        await stack.aclose()
        await wait_until(lambda: not worker.mirror.is_busy)
        for layer in shared:
            assert await read_blob(worker.mirror, other, digest_of(layer)) == layer
            assert site.upstream.bytes_sent(digest_of(layer)) == len(layer)


async def test_queue_drops_blobs_of_an_image_whose_pull_is_over(site: MirrorSite) -> None:
    """When the pull of an image is over, its queued blobs are dropped from the queue. If a client pulls the manifest of
    the image again in time, its queued blobs stay in the queue."""
    site.configure(prefetch="layers")
    site.upstream.add_image(UPSTREAM_REPO, FIRST, *layers(10, "old"), tags=("1",))
    site.upstream.add_image(UPSTREAM_REPO, FIRST, *layers(10, "new"), tags=("2",))
    async with site.worker() as worker, AsyncExitStack() as stack:
        for tag in ("1", "2"):
            await worker.mirror.get_manifest(MIRRORED_REPO, Tag(tag))
        await wait_until(lambda: not worker.mirror.is_busy)
        await take_connections(worker, stack, 3)
        await read_blob(worker.mirror, MIRRORED_REPO, digest_of(FIRST))
        site.monotonic.now += PULL_IDLE_SECONDS - 1
        await worker.mirror.get_manifest(MIRRORED_REPO, Tag("2"))
        site.monotonic.now += 2
        await stack.aclose()
        await wait_until(lambda: not worker.mirror.is_busy)
        assert not any(digest_of(layer) in site.upstream.sent for layer in layers(10, "old"))
        assert all(digest_of(layer) in site.upstream.sent for layer in layers(10, "new"))


@pytest.mark.slow
async def test_queue_length_is_limited_for_huge_images(site: MirrorSite) -> None:
    """A manifest with tens of thousands of layers adds at most `MAX_IMAGE_BLOBS` blobs to the queue. The whole queue
    has at most `MAX_QUEUED_BLOBS` blobs."""
    site.configure(prefetch="layers")
    assert MAX_IMAGE_BLOBS < MAX_QUEUED_BLOBS
    layer_texts = [b"%d" % number for number in range(2 * MAX_IMAGE_BLOBS)]
    for number in range(6):
        site.upstream.add_image(
            UPSTREAM_REPO, FIRST, *(each + b" of %d" % number for each in layer_texts), tags=(str(number),)
        )
    async with site.worker() as worker, AsyncExitStack() as stack:
        for number in range(6):
            await worker.mirror.get_manifest(MIRRORED_REPO, Tag(str(number)))
        await wait_until(lambda: not worker.mirror.is_busy)
        await take_connections(worker, stack, 3)
        await read_blob(worker.mirror, MIRRORED_REPO, digest_of(FIRST))
        await stack.aclose()
        await wait_until(lambda: not worker.mirror.is_busy)
    prefetched = len(site.upstream.sent) - 2  # without the config, which all images share, and the requested layer
    assert MAX_IMAGE_BLOBS < prefetched <= MAX_QUEUED_BLOBS + MAX_RUNNING_FILLS
    assert sum(digest_of(each + b" of 0") in site.upstream.sent for each in layer_texts) <= MAX_IMAGE_BLOBS
