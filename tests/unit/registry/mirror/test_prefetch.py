"""Which blobs of an image a mirror prefetches: downloads from the upstream before the client requests them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from registry.mirror.fill.demand import PULL_IDLE_SECONDS
from storage import manifest_parser
from storage.content import MIRROR_ACTOR, Manifest, Span, digest_of
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
    MirrorSite,
    MirrorWorker,
    assert_each_byte_sent_once,
    wait_until_stored,
)

CONFIG = b'{"architecture":"amd64"}'
LAYERS = (b"first layer", b"second layer" * 10_000, b"third layer")
TAG = Tag("1")


@pytest.fixture
async def worker(site: MirrorSite) -> AsyncIterator[MirrorWorker]:
    site.configure(prefetch="layers")
    async with site.worker() as opened:
        yield opened


def add_image(site: MirrorSite) -> Manifest:
    """Adds the image with `CONFIG` and `LAYERS` to the upstream."""
    return site.upstream.add_image(UPSTREAM_REPO, *LAYERS, config=CONFIG)


async def wait_until_idle(worker: MirrorWorker) -> None:
    """Waits until the worker fetches nothing and has nothing more to fetch."""
    await wait_until(lambda: not worker.mirror.is_busy)


async def test_a_pull_of_a_manifest_prefetches_the_config(site: MirrorSite, worker: MirrorWorker) -> None:
    """When a client pulls the manifest of an image, the config is fetched at once, and no other blob."""
    add_image(site)
    await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
    await wait_until_stored(worker, digest_of(CONFIG))
    await wait_until_idle(worker)
    assert set(site.upstream.sent) == {digest_of(CONFIG)}
    for _ in range(3):
        await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
    await wait_until_idle(worker)
    assert site.upstream.calls == {"get manifest": 1, "get blob": 1}


async def test_a_cached_manifest_is_not_parsed_at_each_request(
    site: MirrorSite, worker: MirrorWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Further requests for the manifest of an image that is being pulled do not parse the manifest again."""
    add_image(site)
    await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
    await wait_until_idle(worker)
    parsed = list[bytes]()
    load_object = manifest_parser.load_object

    def record_and_load(body: bytes) -> dict[str, object]:
        parsed.append(body)
        return load_object(body)

    monkeypatch.setattr(manifest_parser, "load_object", record_and_load)
    manifest = await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
    await worker.mirror.get_manifest(MIRRORED_REPO, manifest.digest)
    assert parsed == []
    assert manifest.is_readable
    assert parsed == [manifest.body]


async def test_a_request_for_a_layer_prefetches_the_other_layers(site: MirrorSite, worker: MirrorWorker) -> None:
    """When a client requests a layer, the other layers of the image are fetched, each once."""
    add_image(site)
    await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
    assert await read_blob(worker.mirror, MIRRORED_REPO, digest_of(LAYERS[1])) == LAYERS[1]
    for data in (*LAYERS, CONFIG):
        await wait_until_stored(worker, digest_of(data))
        assert await read_blob(worker.mirror, MIRRORED_REPO, digest_of(data)) == data
    assert site.upstream.calls == {"get manifest": 1, "get blob": 4}


async def test_head_requests_prefetch_no_layer(site: MirrorSite, worker: MirrorWorker) -> None:
    """HEAD requests, and requests for an index or a config, prefetch no layer."""
    manifest = add_image(site)
    site.upstream.add_manifest(UPSTREAM_REPO, index_of([manifest.descriptor]), "list")
    await worker.mirror.resolve_manifest(MIRRORED_REPO, TAG)
    await worker.mirror.get_manifest(MIRRORED_REPO, Tag("list"))
    await worker.mirror.resolve_blob(MIRRORED_REPO, digest_of(LAYERS[0]))
    await wait_until_idle(worker)
    assert site.upstream.sent == {}
    assert await read_blob(worker.mirror, MIRRORED_REPO, digest_of(CONFIG)) == CONFIG
    await wait_until_idle(worker)
    assert set(site.upstream.sent) == {digest_of(CONFIG)}


@pytest.mark.parametrize(("mode", "prefetched_blobs"), [("off", set()), ("config", {digest_of(CONFIG)})])
async def test_what_the_prefetch_setting_allows(site: MirrorSite, mode: str, prefetched_blobs: set[str]) -> None:
    """The setting `prefetch` determines whether nothing or only the config is prefetched."""
    site.configure(prefetch=mode)
    async with site.worker() as worker:
        add_image(site)
        await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
        await read_blob(worker.mirror, MIRRORED_REPO, digest_of(LAYERS[0]))
        await wait_until_idle(worker)
    assert set(site.upstream.sent) == {digest_of(LAYERS[0]), *prefetched_blobs}


async def test_nothing_is_prefetched_if_few_requests_are_left(site: MirrorSite, worker: MirrorWorker) -> None:
    """Nothing is prefetched while the upstream's rate limit leaves only few requests."""
    site.upstream.faults.is_near_rate_limit = True
    add_image(site)
    await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
    await read_blob(worker.mirror, MIRRORED_REPO, digest_of(LAYERS[0]))
    await wait_until_idle(worker)
    assert set(site.upstream.sent) == {digest_of(LAYERS[0])}


async def test_foreign_layers_are_not_prefetched(site: MirrorSite, worker: MirrorWorker) -> None:
    """Foreign layers are not requested, because they are stored outside the registry."""
    foreign_type = "application/vnd.oci.image.layer.nondistributable.v1.tar"
    first, second = (site.upstream.add_blob(UPSTREAM_REPO, layer) for layer in LAYERS[:2])
    manifest = image_of(
        site.upstream.add_blob(UPSTREAM_REPO, CONFIG),
        [first, type(second)(foreign_type, digest_of(b"elsewhere"), 9), second],
    )
    site.upstream.add_manifest(UPSTREAM_REPO, manifest, "1")
    await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
    await read_blob(worker.mirror, MIRRORED_REPO, first.digest)
    await wait_until_stored(worker, second.digest)
    await wait_until_idle(worker)
    assert digest_of(b"elsewhere") not in site.upstream.requested_spans


async def test_only_layers_of_the_image_being_pulled_are_prefetched(site: MirrorSite, worker: MirrorWorker) -> None:
    """Several images share a base layer. A request for this layer prefetches only the layers of the image whose
    manifest was pulled."""
    for number in range(3):
        site.upstream.add_image(UPSTREAM_REPO, LAYERS[0], b"top %d" % number, tags=(str(number),))
        await worker.mirror.resolve_manifest(MIRRORED_REPO, Tag(str(number)))
    await worker.mirror.get_manifest(MIRRORED_REPO, Tag("1"))
    await read_blob(worker.mirror, MIRRORED_REPO, digest_of(LAYERS[0]))
    await wait_until_stored(worker, digest_of(b"top 1"))
    await wait_until_idle(worker)
    assert set(site.upstream.sent) == {digest_of(data) for data in (b"{}", LAYERS[0], b"top 1")}


async def test_a_request_for_a_stored_layer_prefetches_the_missing_layers(
    site: MirrorSite, worker: MirrorWorker
) -> None:
    """If a client first requests a layer that is stored already, the missing layers are prefetched while the client
    reads this layer."""
    site.upstream.add_image("library/base", LAYERS[0], tags=("1",))
    base_repo = type(MIRRORED_REPO)("docker.io/library/base")
    await worker.mirror.get_manifest(base_repo, TAG)
    assert await read_blob(worker.mirror, base_repo, digest_of(LAYERS[0])) == LAYERS[0]
    add_image(site)
    await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
    await worker.store.mount_blob(MIRRORED_REPO, digest_of(LAYERS[0]), base_repo, MIRROR_ACTOR)
    reader = await worker.mirror.open_blob(MIRRORED_REPO, digest_of(LAYERS[0]))
    for data in LAYERS[1:]:
        await wait_until_stored(worker, digest_of(data))
    await reader.aclose()
    await wait_until_idle(worker)
    assert site.upstream.bytes_sent(digest_of(LAYERS[0])) == len(LAYERS[0])


async def test_nothing_is_prefetched_for_a_stored_image_or_after_the_pull(
    site: MirrorSite, worker: MirrorWorker
) -> None:
    """A pull of an image that is completely stored prefetches nothing. A request for a layer long after the pull of the
    manifest prefetches nothing either."""
    add_image(site)
    for _ in range(3):
        await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
        for data in (CONFIG, *LAYERS):
            assert await read_blob(worker.mirror, MIRRORED_REPO, digest_of(data)) == data
        await wait_until_idle(worker)
        assert site.upstream.calls == {"get manifest": 1, "get blob": 4}
    site.upstream.add_image(UPSTREAM_REPO, LAYERS[0], b"another", config=CONFIG, tags=("2",))
    await worker.mirror.get_manifest(MIRRORED_REPO, Tag("2"))
    site.monotonic.now += PULL_IDLE_SECONDS + 1
    await read_blob(worker.mirror, MIRRORED_REPO, digest_of(LAYERS[0]))
    await wait_until_idle(worker)
    assert digest_of(b"another") not in site.upstream.sent


async def test_prefetch_without_readers_stops_when_the_pull_is_over(site: MirrorSite, worker: MirrorWorker) -> None:
    """When the pull is over, the prefetch of a layer without readers stops. The stored bytes are kept, so that only the
    missing bytes are fetched when a client requests the layer later."""
    site.upstream.add_image(UPSTREAM_REPO, LAYERS[0], BIG)
    await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
    gate = site.upstream.faults.gates[MIB] = threading.Event()
    await read_blob(worker.mirror, MIRRORED_REPO, digest_of(LAYERS[0]))
    await wait_until(lambda: site.upstream.bytes_sent(DIGEST) >= MIB)
    site.monotonic.now += PULL_IDLE_SECONDS + 1
    gate.set()
    await wait_until_idle(worker)
    assert MIB < site.upstream.bytes_sent(DIGEST) < len(BIG)
    with pytest.raises(BlobUnknown):
        await worker.store.resolve_blob(MIRRORED_REPO, DIGEST)
    assert await read_blob(worker.mirror, MIRRORED_REPO, DIGEST) == BIG
    assert_each_byte_sent_once(site, DIGEST, len(BIG))


async def test_prefetch_continues_while_a_client_reads(site: MirrorSite, worker: MirrorWorker) -> None:
    """While a client reads a blob of the image, even slowly, the other layers of the image are prefetched."""
    site.upstream.connections = 8
    slow_layer = BIG[: 9 * MIB]
    site.upstream.add_image(UPSTREAM_REPO, slow_layer, BIG)
    await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
    gate = site.upstream.faults.gates[9 * MIB + 1] = threading.Event()  # only `BIG` has this offset
    reader = await worker.mirror.open_blob(MIRRORED_REPO, digest_of(slow_layer))
    site.monotonic.now += PULL_IDLE_SECONDS + 1
    gate.set()
    await wait_until_stored(worker, DIGEST)
    await reader.aclose()


async def test_prefetch_leaves_connections_for_requested_blobs(site: MirrorSite, worker: MirrorWorker) -> None:
    """Prefetching leaves some connections free, so that a blob that a client requests is fetched at once."""
    site.upstream.connections = 3
    layers = [BIG[start : start + 100_000] for start in range(10)]
    site.upstream.add_image(UPSTREAM_REPO, *layers)
    other = site.upstream.add_image("library/other", BIG[: 2 * MIB], tags=("1",))
    other_repo = type(MIRRORED_REPO)("docker.io/library/other")
    await worker.mirror.get_manifest(other_repo, TAG)
    await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
    gate = site.upstream.faults.gates[70_000] = threading.Event()
    first = asyncio.create_task(read_blob(worker.mirror, MIRRORED_REPO, digest_of(layers[0]), Span(0, 10)))
    assert len(await first) == 10
    async with asyncio.timeout(60):
        reader = await worker.mirror.open_blob(other_repo, other.layers[0].digest)
        assert await reader.readable_until(0) > 0
    await reader.aclose()
    gate.set()
    await wait_until_stored(worker, digest_of(layers[9]))


async def test_a_shutdown_stops_prefetching(site: MirrorSite) -> None:
    """A server that stops does not wait until prefetched blobs are complete. It closes its connections to the
    upstream."""
    site.configure(prefetch="layers")
    upstream: FakeSource = site.upstream
    async with site.worker() as worker:
        add_image(site)
        await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
        upstream.faults.gates[0] = threading.Event()
        waiting = asyncio.create_task(read_blob(worker.mirror, MIRRORED_REPO, digest_of(LAYERS[1])))
        await wait_until(lambda: upstream.at_once >= 2)  # the fills of the image's other layers may have begun as well
    with pytest.raises(UpstreamUnavailable):
        await waiting
    assert upstream.closed
