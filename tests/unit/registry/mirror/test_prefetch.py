"""What is prefetched, and what is not."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from registry.mirror.entitlement import MIRROR_ACTOR
from registry.mirror.fill.slots import PULL_IDLE_SECONDS
from storage.content import Manifest, Span, digest_of
from storage.errors import BlobUnknown, UpstreamUnavailable
from storage.names import Tag
from tests.fakes.mirror_source import FakeSource
from tests.fakes.registry_content import image_of, index_of, read_blob
from tests.unit.registry.conftest import wait_until
from tests.unit.registry.mirror.conftest import (
    BIG,
    DIGEST,
    MIB,
    MIRRORED_REPO,
    UPSTREAM_REPO,
    MirrorStore,
    MirrorWorker,
    sent_once,
    stored,
)

CONFIG = b'{"architecture":"amd64"}'
LAYERS = (b"first layer", b"second layer" * 10_000, b"third layer")
TAG = Tag("1")


@pytest.fixture
async def worker(site: MirrorStore) -> AsyncIterator[MirrorWorker]:
    site.configure(prefetch="layers")
    async with site.worker() as opened:
        yield opened


def image(site: MirrorStore) -> Manifest:
    return site.far.add_image(UPSTREAM_REPO, *LAYERS, config=CONFIG)


async def idle(worker: MirrorWorker) -> None:
    """Waits until nothing is being fetched."""
    await wait_until(lambda: not worker.mirror.busy)


async def test_a_manifest_brings_its_config(site: MirrorStore, worker: MirrorWorker) -> None:
    """Pulling an image's manifest fetches its config at once, and nothing else."""
    image(site)
    await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
    await stored(worker, digest_of(CONFIG))
    await idle(worker)
    assert set(site.far.sent) == {digest_of(CONFIG)}
    for _ in range(3):
        await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
    await idle(worker)
    assert site.far.calls == {"get manifest": 1, "get blob": 1}


async def test_a_layer_brings_the_others(site: MirrorStore, worker: MirrorWorker) -> None:
    """Requesting a layer fetches the image's other layers, each once."""
    image(site)
    await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
    assert await read_blob(worker.mirror, MIRRORED_REPO, digest_of(LAYERS[1])) == LAYERS[1]
    for data in (*LAYERS, CONFIG):
        await stored(worker, digest_of(data))
        assert await read_blob(worker.mirror, MIRRORED_REPO, digest_of(data)) == data
    assert site.far.calls == {"get manifest": 1, "get blob": 4}


async def test_looking_starts_nothing(site: MirrorStore, worker: MirrorWorker) -> None:
    """HEAD requests, and requests for an index or a config, prefetch no layer."""
    made = image(site)
    site.far.add_manifest(UPSTREAM_REPO, index_of([made.descriptor]), "list")
    await worker.mirror.resolve_manifest(MIRRORED_REPO, TAG)
    await worker.mirror.get_manifest(MIRRORED_REPO, Tag("list"))
    await worker.mirror.resolve_blob(MIRRORED_REPO, digest_of(LAYERS[0]))
    await idle(worker)
    assert site.far.sent == {}
    assert await read_blob(worker.mirror, MIRRORED_REPO, digest_of(CONFIG)) == CONFIG
    await idle(worker)
    assert set(site.far.sent) == {digest_of(CONFIG)}


@pytest.mark.parametrize(("mode", "brought"), [("off", set()), ("config", {digest_of(CONFIG)})])
async def test_modes(site: MirrorStore, mode: str, brought: set[str]) -> None:
    """`prefetch` sets how much is prefetched."""
    site.configure(prefetch=mode)
    async with site.worker() as worker:
        image(site)
        await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
        await read_blob(worker.mirror, MIRRORED_REPO, digest_of(LAYERS[0]))
        await idle(worker)
    assert set(site.far.sent) == {digest_of(LAYERS[0]), *brought}


async def test_few_requests_left(site: MirrorStore, worker: MirrorWorker) -> None:
    """Nothing is prefetched when few requests are left at the upstream."""
    site.far.faults.few_left = True
    image(site)
    await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
    await read_blob(worker.mirror, MIRRORED_REPO, digest_of(LAYERS[0]))
    await idle(worker)
    assert set(site.far.sent) == {digest_of(LAYERS[0])}


async def test_foreign_layers_are_left_alone(site: MirrorStore, worker: MirrorWorker) -> None:
    """Foreign layers, which are stored elsewhere, are not requested."""
    foreign = "application/vnd.oci.image.layer.nondistributable.v1.tar"
    first, second = (site.far.add_blob(UPSTREAM_REPO, layer) for layer in LAYERS[:2])
    made = image_of(
        site.far.add_blob(UPSTREAM_REPO, CONFIG), [first, type(second)(foreign, digest_of(b"elsewhere"), 9), second]
    )
    site.far.add_manifest(UPSTREAM_REPO, made, "1")
    await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
    await read_blob(worker.mirror, MIRRORED_REPO, first.digest)
    await stored(worker, second.digest)
    await idle(worker)
    assert digest_of(b"elsewhere") not in site.far.asked


async def test_of_many_images_the_one_being_pulled(site: MirrorStore, worker: MirrorWorker) -> None:
    """A request for a base layer of many images prefetches only the layers of the image that is being pulled."""
    for number in range(3):
        site.far.add_image(UPSTREAM_REPO, LAYERS[0], b"top %d" % number, tags=(str(number),))
        await worker.mirror.resolve_manifest(MIRRORED_REPO, Tag(str(number)))
    await worker.mirror.get_manifest(MIRRORED_REPO, Tag("1"))
    await read_blob(worker.mirror, MIRRORED_REPO, digest_of(LAYERS[0]))
    await stored(worker, digest_of(b"top 1"))
    await idle(worker)
    assert set(site.far.sent) == {digest_of(data) for data in (b"{}", LAYERS[0], b"top 1")}


async def test_a_layer_that_is_here_brings_the_others(site: MirrorStore, worker: MirrorWorker) -> None:
    """If a client starts with layers that are stored already, the missing layers are prefetched meanwhile."""
    site.far.add_image("library/base", LAYERS[0], tags=("1",))
    base = type(MIRRORED_REPO)("docker.io/library/base")
    await worker.mirror.get_manifest(base, TAG)
    assert await read_blob(worker.mirror, base, digest_of(LAYERS[0])) == LAYERS[0]
    image(site)
    await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
    await worker.store.mount_blob(MIRRORED_REPO, digest_of(LAYERS[0]), base, MIRROR_ACTOR)
    reader = await worker.mirror.open_blob(MIRRORED_REPO, digest_of(LAYERS[0]))
    for data in LAYERS[1:]:
        await stored(worker, digest_of(data))
    await reader.aclose()
    await idle(worker)
    assert site.far.bytes_sent(digest_of(LAYERS[0])) == len(LAYERS[0])


async def test_an_image_that_is_here_is_looked_at_once(site: MirrorStore, worker: MirrorWorker) -> None:
    """A pull of an image that is completely stored prefetches nothing. Neither does a request for a layer without a
    request for the manifest, or long after it."""
    image(site)
    for _ in range(3):
        await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
        for data in (CONFIG, *LAYERS):
            assert await read_blob(worker.mirror, MIRRORED_REPO, digest_of(data)) == data
        await idle(worker)
        assert site.far.calls == {"get manifest": 1, "get blob": 4}
    site.far.add_image(UPSTREAM_REPO, LAYERS[0], b"another", config=CONFIG, tags=("2",))
    await worker.mirror.get_manifest(MIRRORED_REPO, Tag("2"))
    site.monotonic.now += PULL_IDLE_SECONDS + 1
    await read_blob(worker.mirror, MIRRORED_REPO, digest_of(LAYERS[0]))
    await idle(worker)
    assert digest_of(b"another") not in site.far.sent


async def test_what_nobody_reads_stops(site: MirrorStore, worker: MirrorWorker) -> None:
    """Once the pull is over, a prefetched layer without readers is not fetched further. Its stored bytes are kept, so
    that for a later client only the rest is fetched."""
    site.far.add_image(UPSTREAM_REPO, LAYERS[0], BIG)
    await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
    gate = site.far.faults.gates[MIB] = threading.Event()
    await read_blob(worker.mirror, MIRRORED_REPO, digest_of(LAYERS[0]))
    await wait_until(lambda: site.far.bytes_sent(DIGEST) >= MIB)
    site.monotonic.now += PULL_IDLE_SECONDS + 1
    gate.set()
    await idle(worker)
    assert MIB < site.far.bytes_sent(DIGEST) < len(BIG)
    with pytest.raises(BlobUnknown):
        await worker.store.resolve_blob(MIRRORED_REPO, DIGEST)
    assert await read_blob(worker.mirror, MIRRORED_REPO, DIGEST) == BIG
    sent_once(site, DIGEST, len(BIG))


async def test_a_reader_keeps_the_pull_alive(site: MirrorStore, worker: MirrorWorker) -> None:
    """While a client reads a blob of the image, however slowly, its other layers are fetched."""
    site.far.connections = 8
    slow = BIG[: 9 * MIB]
    site.far.add_image(UPSTREAM_REPO, slow, BIG)
    await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
    gate = site.far.faults.gates[9 * MIB + 1] = threading.Event()
    reader = await worker.mirror.open_blob(MIRRORED_REPO, digest_of(slow))
    site.monotonic.now += PULL_IDLE_SECONDS + 1
    gate.set()
    await stored(worker, DIGEST)
    await reader.aclose()


async def test_what_somebody_waits_for_goes_first(site: MirrorStore, worker: MirrorWorker) -> None:
    """Prefetching leaves some connections free, so that the fill of a blob that a client requests starts at once."""
    site.far.connections = 3
    layers = [BIG[start : start + 100_000] for start in range(10)]
    site.far.add_image(UPSTREAM_REPO, *layers)
    other = site.far.add_image("library/other", BIG[: 2 * MIB], tags=("1",))
    repo = type(MIRRORED_REPO)("docker.io/library/other")
    await worker.mirror.get_manifest(repo, TAG)
    await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
    gate = site.far.faults.gates[70_000] = threading.Event()
    first = asyncio.create_task(read_blob(worker.mirror, MIRRORED_REPO, digest_of(layers[0]), Span(0, 10)))
    assert len(await first) == 10
    async with asyncio.timeout(60):
        reader = await worker.mirror.open_blob(repo, other.layers[0].digest)
        assert await reader.readable_until(0) > 0
    await reader.aclose()
    gate.set()
    await stored(worker, digest_of(layers[9]))


async def test_a_shutdown_ends_it(site: MirrorStore) -> None:
    """A server that stops does not wait for prefetched blobs, and closes the connections properly."""
    site.configure(prefetch="layers")
    far: FakeSource = site.far
    async with site.worker() as worker:
        image(site)
        await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
        far.faults.gates[0] = threading.Event()
        waiting = asyncio.create_task(read_blob(worker.mirror, MIRRORED_REPO, digest_of(LAYERS[1])))
        await wait_until(lambda: far.at_once >= 2)  # the others of the image may have begun as well
    with pytest.raises(UpstreamUnavailable):
        await waiting
    assert far.closed
