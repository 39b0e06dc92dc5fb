"""How a fill (the download of a blob from an upstream into the cache) copes with faults: broken connections, corrupt
bytes, an upstream that is down, and workers that stop."""

from __future__ import annotations

import asyncio
import random
import threading
from dataclasses import replace

import pytest

from registry.config import Upstream
from registry.mirror.mirror import Mirror
from storage.composition import open_registry
from storage.content import Span, digest_of
from storage.errors import BlobUnknown, Denied, DigestInvalid, RegistryError, TooManyRequests, UpstreamUnavailable
from storage.names import Tag
from tests.fakes.mirror_source import FakeSource
from tests.fakes.registry_content import image_of, read_blob
from tests.unit.registry.conftest import wait_until
from tests.unit.registry.mirror.conftest import (
    BIG,
    DIGEST,
    MIB,
    MIRRORED_REPO,
    OTHER,
    UPSTREAM_REPO,
    MirrorSite,
    MirrorWorker,
    assert_each_byte_sent_once,
    read_to_end,
    source_of_another_worker,
)

pytestmark = pytest.mark.slow

OTHER_UPSTREAM_REPO = "library/other"
SMALL = random.Random(5).randbytes(3 * MIB)


async def pull_manifest_of_new_image(site: MirrorSite, worker: MirrorWorker, layer: bytes) -> None:
    """Adds an image with this layer to the upstream, and pulls its manifest."""
    site.upstream.add_image(UPSTREAM_REPO, layer)
    await worker.mirror.get_manifest(MIRRORED_REPO, Tag("1"))


@pytest.mark.parametrize("data", [SMALL, BIG])
async def test_broken_connections_resume(site: MirrorSite, worker: MirrorWorker, data: bytes) -> None:
    """After a connection breaks, the download resumes at the first missing byte. No byte is sent twice, and readers
    notice nothing."""
    site.upstream.faults.drops = [MIB, 100_000, 70_000, 500_000]
    await pull_manifest_of_new_image(site, worker, data)
    assert await read_blob(worker.mirror, MIRRORED_REPO, digest_of(data)) == data
    assert_each_byte_sent_once(site, digest_of(data), len(data))
    assert not site.upstream.faults.drops


async def test_fill_without_progress_fails_after_the_stall_timeout(site: MirrorSite) -> None:
    """A fill that receives no new bytes is given up after the stall timeout. Its readers get an error, and the bytes
    that are stored already are kept."""
    site.stall_timeout = 0.5
    async with site.worker() as worker:
        await pull_manifest_of_new_image(site, worker, SMALL)
        site.upstream.faults.drops = [MIB, *[0] * 1000]
        reader = await worker.mirror.open_blob(MIRRORED_REPO, digest_of(SMALL))
        with pytest.raises(UpstreamUnavailable):
            await read_to_end(reader)
        assert 1 < site.upstream.calls["get blob"] < 10
        site.upstream.faults.drops = []
        assert await read_blob(worker.mirror, MIRRORED_REPO, digest_of(SMALL)) == SMALL
        assert_each_byte_sent_once(site, digest_of(SMALL), len(SMALL))


@pytest.mark.parametrize("error", [UpstreamUnavailable(), TooManyRequests(retry_after=1)], ids=lambda e: e.code)
async def test_fill_continues_after_the_upstream_restarts(
    site: MirrorSite, monkeypatch: pytest.MonkeyPatch, error: RegistryError
) -> None:
    """The fill of a blob that has readers continues when the upstream is back after a restart, however many attempts
    fail meanwhile."""
    monkeypatch.setattr("registry.mirror.fill.retry.LONGEST_PAUSE_SECONDS", 0.05)
    async with site.worker() as worker:
        await pull_manifest_of_new_image(site, worker, SMALL)
        gate = site.upstream.faults.gates[MIB] = threading.Event()
        reader = await worker.mirror.open_blob(MIRRORED_REPO, digest_of(SMALL))
        reading = asyncio.create_task(read_to_end(reader))
        await wait_until(lambda: site.upstream.bytes_sent(digest_of(SMALL)) == MIB)
        site.upstream.faults.down = error
        site.upstream.cut()
        gate.set()
        attempts = 2 if isinstance(error, TooManyRequests) else 10  # a 429 with Retry-After delays the next attempt
        await wait_until(lambda: site.upstream.calls["get blob"] >= attempts)
        site.upstream.faults.down = None  # the upstream is up again
        assert await reading == SMALL
    assert_each_byte_sent_once(site, digest_of(SMALL), len(SMALL))


async def test_a_worker_that_takes_over_waits_for_the_whole_stall_timeout(
    site: MirrorSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that takes over a fill while the upstream is away waits for the whole stall timeout before it gives
    up."""
    monkeypatch.setattr("registry.mirror.fill.retry.LONGEST_PAUSE_SECONDS", 0.05)
    leaving_source = FakeSource()
    leaving_source.blobs, leaving_source.manifests = site.upstream.blobs, site.upstream.manifests
    leaving_source.sent = site.upstream.sent
    leaving_source.faults.gates[MIB] = threading.Event()
    site.upstream.faults.down = UpstreamUnavailable()
    async with site.worker() as staying:
        async with site.worker(leaving_source) as leaving:
            site.upstream.add_image(UPSTREAM_REPO, SMALL)
            await leaving.mirror.get_manifest(MIRRORED_REPO, Tag("1"))
            first = await leaving.mirror.open_blob(MIRRORED_REPO, digest_of(SMALL))
            await wait_until(lambda: leaving_source.bytes_sent(digest_of(SMALL)) == MIB)
            second = await staying.mirror.open_blob(MIRRORED_REPO, digest_of(SMALL))
            reading = asyncio.create_task(read_to_end(second))
            await leaving.mirror.aclose()
            await first.aclose()
        await wait_until(lambda: site.upstream.calls["get blob"] >= 6)
        site.upstream.faults.down = None
        assert await reading == SMALL
    assert_each_byte_sent_once(site, digest_of(SMALL), len(SMALL))


@pytest.mark.parametrize(
    ("error", "remembered_seconds"),
    [(UpstreamUnavailable(), 0), (Denied(), 0), (TooManyRequests(retry_after=60), 0), (BlobUnknown(), 60)],
    ids=["unavailable", "denied", "rate limited", "unknown"],
)
async def test_upstream_error_is_raised_before_any_header(
    site: MirrorSite, worker: MirrorWorker, error: RegistryError, remembered_seconds: int
) -> None:
    """An upstream error in place of a blob is raised before any header is sent. Then the blob can be read, if the
    upstream sends it. Only the answer that the upstream does not have the blob is remembered, for a minute."""
    await pull_manifest_of_new_image(site, worker, SMALL)
    site.upstream.faults.down = error
    with pytest.raises(type(error)):
        await worker.mirror.open_blob(MIRRORED_REPO, digest_of(SMALL))
    requests = site.upstream.calls["get blob"]
    assert 1 <= requests <= 2
    site.upstream.faults.down = None
    if remembered_seconds:
        site.clock.now += remembered_seconds - 1
        with pytest.raises(type(error)):
            await worker.mirror.open_blob(MIRRORED_REPO, digest_of(SMALL))
        assert site.upstream.calls["get blob"] == requests
        site.clock.now += 2
    assert await read_blob(worker.mirror, MIRRORED_REPO, digest_of(SMALL)) == SMALL


async def test_corrupt_blob_is_not_stored(site: MirrorSite, worker: MirrorWorker) -> None:
    """Readers of a corrupt blob get an error instead of its last byte, and the blob is not stored. The next attempt
    downloads the blob from another endpoint of the upstream."""
    site.upstream.endpoints = ("https://one", "https://two")
    site.upstream.faults.corrupt = {"https://one"}
    await pull_manifest_of_new_image(site, worker, SMALL)
    digest = digest_of(SMALL)
    gate = site.upstream.faults.gates[MIB] = threading.Event()
    readers = [await worker.mirror.open_blob(MIRRORED_REPO, digest, span) for span in (None, Span(10), Span(-1))]
    reading = [asyncio.create_task(read_to_end(reader)) for reader in readers]
    gate.set()
    outcomes = await asyncio.gather(*reading, return_exceptions=True)
    assert all(isinstance(outcome, DigestInvalid) for outcome in outcomes)
    with pytest.raises(BlobUnknown):
        await worker.store.open_blob(MIRRORED_REPO, digest)
    assert await read_blob(worker.mirror, MIRRORED_REPO, digest) == SMALL


async def test_corrupt_small_blob_is_fetched_again_before_it_is_served(site: MirrorSite, worker: MirrorWorker) -> None:
    """The digest of a small blob is checked before the blob is served. If its bytes are corrupt, they are fetched from
    another endpoint, and the client gets no error."""
    site.upstream.endpoints = ("https://one", "https://two")
    site.upstream.faults.corrupt = {"https://one"}
    await pull_manifest_of_new_image(site, worker, b"a small layer")
    assert await read_blob(worker.mirror, MIRRORED_REPO, digest_of(b"a small layer")) == b"a small layer"


async def test_pause_grows_while_an_upstream_sends_only_corrupt_bytes(site: MirrorSite) -> None:
    """If an upstream sends only corrupt bytes, the fill is repeated once. After that, no worker requests the blob from
    the upstream until a pause has ended. Each fetch with corrupt bytes makes the next pause longer, up to 30 seconds.
    The error names the endpoint and the blob, and says when to retry."""
    site.upstream.faults.corrupt = {"https://one"}
    digest = digest_of(b"a small layer")
    async with site.worker() as worker, site.worker() as other:
        await pull_manifest_of_new_image(site, worker, b"a small layer")
        for fetches, pause in ((2, 2), (3, 4), (4, 8), (5, 16), (6, 30), (7, 30)):
            for mirror in (worker.mirror, other.mirror, worker.mirror):
                with pytest.raises(UpstreamUnavailable, match=rf"docker\.io \(https://one\).*{digest}") as raised:
                    await mirror.open_blob(MIRRORED_REPO, digest)
                assert raised.value.retry_after == pause
            assert site.upstream.calls["get blob"] == fetches
            site.clock.now += pause
        site.upstream.faults.corrupt = set()
        assert await read_blob(worker.mirror, MIRRORED_REPO, digest) == b"a small layer"


async def test_paused_endpoint_is_not_used_even_if_the_other_one_is_down(
    site: MirrorSite, worker: MirrorWorker
) -> None:
    """An endpoint that sent corrupt bytes is paused. Until the pause is over, no bytes are requested from this
    endpoint, even if the upstream's other endpoint is down."""
    site.upstream.endpoints, site.upstream.faults.unreachable = ("https://one", "https://two"), {"https://two"}
    site.upstream.faults.corrupt = {"https://one"}
    await pull_manifest_of_new_image(site, worker, SMALL)
    for _ in range(2):
        with pytest.raises(DigestInvalid):
            await read_blob(worker.mirror, MIRRORED_REPO, digest_of(SMALL))
    site.upstream.sent.clear()
    for _ in range(3):
        with pytest.raises(UpstreamUnavailable, match=r"docker\.io \(https://one\) sent wrong bytes") as raised:
            await worker.mirror.open_blob(MIRRORED_REPO, digest_of(SMALL))
        assert raised.value.retry_after == 2
    assert site.upstream.sent == {}
    site.upstream.faults.unreachable = set()
    assert await read_blob(worker.mirror, MIRRORED_REPO, digest_of(SMALL)) == SMALL


async def record_corrupt_senders(site: MirrorSite, worker: MirrorWorker, *endpoints: str) -> None:
    """Records that the endpoints sent corrupt bytes for `SMALL`, each one second after the one before."""
    for endpoint in endpoints:
        await worker.store.records.save_bad_senders("docker.io", digest_of(SMALL), [endpoint], 600)
        site.clock.now += 1


async def test_endpoint_without_a_pause_is_asked_before_a_paused_one(site: MirrorSite, worker: MirrorWorker) -> None:
    """An endpoint whose pause after corrupt bytes is over is asked before an endpoint that is still paused, even if the
    former sent corrupt bytes more often and comes later in the settings."""
    site.upstream.endpoints = ("https://two", "https://one")
    await pull_manifest_of_new_image(site, worker, SMALL)
    await record_corrupt_senders(site, worker, "https://one", "https://one", "https://one")
    site.clock.now += 10
    await record_corrupt_senders(site, worker, "https://two", "https://two")
    assert await read_blob(worker.mirror, MIRRORED_REPO, digest_of(SMALL)) == SMALL
    assert_each_byte_sent_once(site, digest_of(SMALL), len(SMALL))


async def test_download_continues_at_the_endpoint_whose_connection_broke(
    site: MirrorSite, worker: MirrorWorker
) -> None:
    """After the connection to the only endpoint without a pause broke, the download continues at this endpoint, and
    not at the paused one."""
    site.upstream.endpoints = ("https://two", "https://one")
    await pull_manifest_of_new_image(site, worker, SMALL)
    await record_corrupt_senders(site, worker, "https://two", "https://two")
    site.upstream.faults.drops = [MIB]
    assert await read_blob(worker.mirror, MIRRORED_REPO, digest_of(SMALL)) == SMALL
    assert_each_byte_sent_once(site, digest_of(SMALL), len(SMALL))


async def test_record_of_corrupt_bytes_expires_or_can_be_deleted(site: MirrorSite, worker: MirrorWorker) -> None:
    """The record that an endpoint sent corrupt bytes is deleted after some time, or on request."""
    site.upstream.faults.corrupt = {"https://one"}
    layers = [b"a small layer", b"another"]
    site.upstream.add_image(UPSTREAM_REPO, *layers)
    await worker.mirror.get_manifest(MIRRORED_REPO, Tag("1"))
    for layer in layers:
        with pytest.raises(UpstreamUnavailable, match="wrong bytes"):
            await worker.mirror.open_blob(MIRRORED_REPO, digest_of(layer))
    site.upstream.faults.corrupt = set()
    forgotten = [digest_of(layers[0]), digest_of(b"something else")]
    assert await worker.store.records.forget_bad_senders("docker.io", forgotten) == 1
    assert await read_blob(worker.mirror, MIRRORED_REPO, forgotten[0]) == layers[0]
    with pytest.raises(UpstreamUnavailable, match="wrong bytes"):
        await worker.mirror.open_blob(MIRRORED_REPO, digest_of(layers[1]))
    site.clock.now += 601
    assert await read_blob(worker.mirror, MIRRORED_REPO, digest_of(layers[1])) == layers[1]


@pytest.mark.parametrize("follows", [False, True])
async def test_client_can_retry_at_once_after_corrupt_bytes(
    site: MirrorSite, worker: MirrorWorker, follows: bool
) -> None:
    """When a reader gets the error for corrupt bytes, the fill has ended in the reader's worker. If the client opens
    the blob again, a new fill starts. `follows`: the reader is in a worker that follows the fill of another worker."""
    await pull_manifest_of_new_image(site, worker, SMALL)
    site.upstream.faults.corrupt = {"https://one"}
    gate = site.upstream.faults.gates[len(SMALL) - 1] = threading.Event()
    async with site.worker(source_of_another_worker(site)) as other:
        readers = [await each.mirror.open_blob(MIRRORED_REPO, digest_of(SMALL)) for each in (worker, other)]
        await wait_until(lambda: site.upstream.bytes_sent(digest_of(SMALL)) > 2 * MIB)
        site.disk.pause = 0.05  # commits are slow, so the error comes some time after the last byte

        async def retry_after_error() -> bytes:
            with pytest.raises(DigestInvalid):
                await readers[follows].readable_until(len(SMALL) - 1)
            site.upstream.faults.corrupt = set()
            return await read_blob((worker, other)[follows].mirror, MIRRORED_REPO, digest_of(SMALL))

        retrying = asyncio.create_task(retry_after_error())
        await asyncio.sleep(0)
        gate.set()
        assert await retrying == SMALL
        for reader in readers:
            await reader.aclose()


@pytest.mark.parametrize("follows", [False, True])
async def test_request_that_arrives_while_corrupt_bytes_are_deleted(
    site: MirrorSite, worker: MirrorWorker, follows: bool
) -> None:
    """A request that arrives while the corrupt bytes of a failed fill are being deleted gets the right bytes of the
    next fill. `follows`: the request arrives in a worker that follows the fill of another worker."""
    await pull_manifest_of_new_image(site, worker, SMALL)
    site.upstream.faults.corrupt = {"https://one"}
    gate = site.upstream.faults.gates[MIB] = threading.Event()
    async with site.worker(source_of_another_worker(site)) as other:
        readers = [await each.mirror.open_blob(MIRRORED_REPO, digest_of(SMALL)) for each in (worker, other)]
        site.disk.unlink_pause = 0.2
        gate.set()
        partials = site.data / "partials"
        await wait_until(lambda: not any(path.is_file() for path in partials.rglob("*")))
        site.upstream.faults.corrupt = set()
        mirror = (worker, other)[follows].mirror
        assert await read_blob(mirror, MIRRORED_REPO, digest_of(SMALL), Span(0, 10)) == SMALL[:10]
        for reader in readers:
            await reader.aclose()


async def test_a_wrong_size_does_not_delay_other_readers(site: MirrorSite, worker: MirrorWorker) -> None:
    """If an image states a wrong size for a blob, the stored part of the blob is not deleted. Readers that use the
    right size are not delayed, even while the request with the wrong size waits for the upstream. The reader that
    waits for that request gets the right bytes, which are not fetched again."""
    await pull_manifest_of_new_image(site, worker, BIG)
    gate = site.upstream.faults.gates[5 * MIB] = threading.Event()
    async with site.worker() as other:
        reader = await other.mirror.open_blob(MIRRORED_REPO, DIGEST)
        await wait_until(lambda: site.upstream.bytes_sent(DIGEST) >= 5 * MIB)
        await other.mirror.aclose()
        await reader.aclose()
    site.upstream.closed = False  # the other mirror has closed the upstream that both use
    gate.set()
    wrong_manifest = image_of(
        site.upstream.add_blob(OTHER_UPSTREAM_REPO, b"{}"),
        [replace(site.upstream.add_blob(OTHER_UPSTREAM_REPO, BIG), size=9 * MIB)],
    )
    site.upstream.add_manifest(OTHER_UPSTREAM_REPO, wrong_manifest, "1")
    await worker.mirror.get_manifest(OTHER, Tag("1"))
    stall = site.upstream.faults.stall = asyncio.Event()
    requests = site.upstream.calls["get blob"]
    waiting = asyncio.create_task(worker.mirror.open_blob(OTHER, DIGEST))
    await wait_until(lambda: site.upstream.calls["get blob"] > requests)
    site.upstream.faults.stall = None
    assert await read_blob(worker.mirror, MIRRORED_REPO, DIGEST) == BIG
    assert_each_byte_sent_once(site, DIGEST, len(BIG))
    stall.set()
    assert await read_to_end(await waiting) == BIG
    assert_each_byte_sent_once(site, DIGEST, len(BIG))


async def test_another_worker_takes_over_a_fill(site: MirrorSite) -> None:
    """When the worker that owns a fill stops, another worker that has a reader continues the fill. No stored byte is
    fetched again."""
    leaving_source = FakeSource()
    leaving_source.blobs, leaving_source.manifests = site.upstream.blobs, site.upstream.manifests
    leaving_source.sent = site.upstream.sent
    gate = leaving_source.faults.gates[5 * MIB] = threading.Event()
    async with site.worker() as staying:
        await pull_manifest_of_new_image(site, staying, BIG)
        async with open_registry(site.data, clock=site.clock) as store:
            leaving = Mirror(
                *(store, leaving_source, store.partials, store.records, store.leases, Upstream(name="docker.io")),
                tags=store.upstream_tags,
            )
            first = await leaving.open_blob(MIRRORED_REPO, DIGEST)
            at = 0
            while at < 5 * MIB:
                at = await first.readable_until(at)
            second = await staying.mirror.open_blob(MIRRORED_REPO, DIGEST)
            assert await second.readable_until(0) >= 5 * MIB
            reading = asyncio.create_task(read_to_end(second))
            await leaving.aclose()
            await first.aclose()
        gate.set()
        assert await reading == BIG
    assert_each_byte_sent_once(site, DIGEST, len(BIG))
