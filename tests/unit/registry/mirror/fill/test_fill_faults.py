"""Fills when upstreams break connections, send corrupt bytes or are away, and when processes die."""

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
    MirrorStore,
    MirrorWorker,
    read,
    sent_once,
    source_of_another_worker,
)

pytestmark = pytest.mark.slow

OTHER_FAR = "library/other"
SMALL = random.Random(5).randbytes(3 * MIB)


async def pull_manifest_of_new_image(site: MirrorStore, worker: MirrorWorker, layer: bytes) -> None:
    """Adds an image with this layer to the upstream, and pulls its manifest."""
    site.far.add_image(UPSTREAM_REPO, layer)
    await worker.mirror.get_manifest(MIRRORED_REPO, Tag("1"))


@pytest.mark.parametrize("data", [SMALL, BIG])
async def test_broken_connections_resume(site: MirrorStore, worker: MirrorWorker, data: bytes) -> None:
    """A broken connection is resumed where it stopped: no byte is requested twice, and readers notice nothing."""
    site.far.faults.drops = [MIB, 100_000, 70_000, 500_000]
    await pull_manifest_of_new_image(site, worker, data)
    assert await read_blob(worker.mirror, MIRRORED_REPO, digest_of(data)) == data
    sent_once(site, digest_of(data), len(data))
    assert not site.far.faults.drops


async def test_an_upstream_that_keeps_breaking(site: MirrorStore) -> None:
    """A fill without new bytes is given up after the stall timeout: its readers get an error, and the stored bytes
    are kept."""
    site.stall_timeout = 0.5
    async with site.worker() as worker:
        await pull_manifest_of_new_image(site, worker, SMALL)
        site.far.faults.drops = [MIB, *[0] * 1000]
        reader = await worker.mirror.open_blob(MIRRORED_REPO, digest_of(SMALL))
        with pytest.raises(UpstreamUnavailable):
            await read(reader)
        assert 2 < site.far.calls["get blob"] < 10
        site.far.faults.drops = []
        assert await read_blob(worker.mirror, MIRRORED_REPO, digest_of(SMALL)) == SMALL
        sent_once(site, digest_of(SMALL), len(SMALL))


@pytest.mark.parametrize("error", [UpstreamUnavailable(), TooManyRequests(retry_after=1)], ids=lambda e: e.code)
async def test_an_upstream_that_is_started_anew(site: MirrorStore, error: RegistryError) -> None:
    """The fill of a blob that has readers continues when the upstream is back after a restart, however many attempts
    fail meanwhile."""
    site.stall_timeout = 2.0  # a tenth of a second between two attempts
    async with site.worker() as worker:
        await pull_manifest_of_new_image(site, worker, SMALL)
        gate = site.far.faults.gates[MIB] = threading.Event()
        reader = await worker.mirror.open_blob(MIRRORED_REPO, digest_of(SMALL))
        reading = asyncio.create_task(read(reader))
        await wait_until(lambda: site.far.bytes_sent(digest_of(SMALL)) == MIB)
        site.far.faults.down = error
        site.far.cut()
        gate.set()
        attempts = 2 if isinstance(error, TooManyRequests) else 10
        await wait_until(lambda: site.far.calls["get blob"] >= attempts)
        site.far.faults.down = None
        assert await reading == SMALL
    sent_once(site, digest_of(SMALL), len(SMALL))


async def test_a_worker_that_takes_over_waits_for_the_whole_stall_timeout(site: MirrorStore) -> None:
    """A worker that takes over a fill while the upstream is away waits for the whole stall timeout before it gives
    up."""
    site.stall_timeout = 2.0
    leaving_source = FakeSource()
    leaving_source.blobs, leaving_source.manifests = site.far.blobs, site.far.manifests
    leaving_source.sent = site.far.sent
    leaving_source.faults.gates[MIB] = threading.Event()
    site.far.faults.down = UpstreamUnavailable()
    async with site.worker() as staying:
        async with site.worker(leaving_source) as leaving:
            site.far.add_image(UPSTREAM_REPO, SMALL)
            await leaving.mirror.get_manifest(MIRRORED_REPO, Tag("1"))
            first = await leaving.mirror.open_blob(MIRRORED_REPO, digest_of(SMALL))
            await wait_until(lambda: leaving_source.bytes_sent(digest_of(SMALL)) == MIB)
            second = await staying.mirror.open_blob(MIRRORED_REPO, digest_of(SMALL))
            reading = asyncio.create_task(read(second))
            await leaving.mirror.aclose()
            await first.aclose()
        await wait_until(lambda: site.far.calls["get blob"] >= 6)
        site.far.faults.down = None
        assert await reading == SMALL
    sent_once(site, digest_of(SMALL), len(SMALL))


@pytest.mark.parametrize(
    "error", [UpstreamUnavailable(), Denied(), TooManyRequests(retry_after=60), BlobUnknown()], ids=lambda e: e.code
)
async def test_errors_before_headers(site: MirrorStore, worker: MirrorWorker, error: RegistryError) -> None:
    """An upstream error in place of a blob is raised before any header is sent. Of these errors, only BlobUnknown
    is cached."""
    await pull_manifest_of_new_image(site, worker, SMALL)
    site.far.faults.down = error
    with pytest.raises(type(error)):
        await worker.mirror.open_blob(MIRRORED_REPO, digest_of(SMALL))
    assert site.far.calls["get blob"] <= 2
    site.far.faults.down = None
    site.clock.now += 61
    assert await read_blob(worker.mirror, MIRRORED_REPO, digest_of(SMALL)) == SMALL


async def test_wrong_bytes_are_kept_nowhere(site: MirrorStore, worker: MirrorWorker) -> None:
    """Readers of a corrupt blob get an error before its last byte. The blob is not stored. The next attempt asks
    another endpoint."""
    site.far.endpoints = ("https://one", "https://two")
    site.far.faults.corrupt = {"https://one"}
    await pull_manifest_of_new_image(site, worker, SMALL)
    digest = digest_of(SMALL)
    gate = site.far.faults.gates[MIB] = threading.Event()
    readers = [await worker.mirror.open_blob(MIRRORED_REPO, digest, span) for span in (None, Span(10), Span(-1))]
    reading = [asyncio.create_task(read(reader)) for reader in readers]
    gate.set()
    ends = await asyncio.gather(*reading, return_exceptions=True)
    assert all(isinstance(end, DigestInvalid) for end in ends)
    with pytest.raises(BlobUnknown):
        await worker.store.open_blob(MIRRORED_REPO, digest)
    assert await read_blob(worker.mirror, MIRRORED_REPO, digest) == SMALL


async def test_wrong_bytes_of_a_small_blob(site: MirrorStore, worker: MirrorWorker) -> None:
    """A small blob is verified before it is served, so the client does not notice corrupt bytes."""
    site.far.endpoints = ("https://one", "https://two")
    site.far.faults.corrupt = {"https://one"}
    await pull_manifest_of_new_image(site, worker, b"a small layer")
    assert await read_blob(worker.mirror, MIRRORED_REPO, digest_of(b"a small layer")) == b"a small layer"


async def test_only_wrong_bytes(site: MirrorStore) -> None:
    """If an upstream sends only corrupt bytes, the fill is repeated once. After that, no worker requests the blob from
    the upstream until a pause has ended. Each fetch with corrupt bytes makes the next pause longer, up to 30 seconds.
    The error names the endpoint and the blob, and says when to retry."""
    site.far.faults.corrupt = {"https://one"}
    digest = digest_of(b"a small layer")
    async with site.worker() as worker, site.worker() as other:
        await pull_manifest_of_new_image(site, worker, b"a small layer")
        for fetches, pause in ((2, 2), (3, 4), (4, 8), (5, 16), (6, 30), (7, 30)):
            for mirror in (worker.mirror, other.mirror, worker.mirror):
                with pytest.raises(UpstreamUnavailable, match=rf"docker\.io \(https://one\).*{digest}") as raised:
                    await mirror.open_blob(MIRRORED_REPO, digest)
                assert raised.value.retry_after == pause
            assert site.far.calls["get blob"] == fetches
            site.clock.now += pause
        site.far.faults.corrupt = set()
        assert await read_blob(worker.mirror, MIRRORED_REPO, digest) == b"a small layer"


async def test_only_wrong_bytes_while_the_other_endpoint_is_away(site: MirrorStore, worker: MirrorWorker) -> None:
    """No bytes are requested from a paused endpoint before its pause is over, even if the other endpoint is down."""
    site.far.endpoints, site.far.faults.away = ("https://one", "https://two"), {"https://two"}
    site.far.faults.corrupt = {"https://one"}
    await pull_manifest_of_new_image(site, worker, SMALL)
    for _ in range(2):
        with pytest.raises(DigestInvalid):
            await read_blob(worker.mirror, MIRRORED_REPO, digest_of(SMALL))
    site.far.sent.clear()
    for _ in range(3):
        with pytest.raises(UpstreamUnavailable, match=r"docker\.io \(https://one\) sent wrong bytes") as raised:
            await worker.mirror.open_blob(MIRRORED_REPO, digest_of(SMALL))
        assert raised.value.retry_after == 2
    assert site.far.sent == {}
    site.far.faults.away = set()
    assert await read_blob(worker.mirror, MIRRORED_REPO, digest_of(SMALL)) == SMALL


async def test_wrong_bytes_are_forgotten(site: MirrorStore, worker: MirrorWorker) -> None:
    """The record that an endpoint sent corrupt bytes is deleted after some time, or on request."""
    site.far.faults.corrupt = {"https://one"}
    layers = [b"a small layer", b"another"]
    site.far.add_image(UPSTREAM_REPO, *layers)
    await worker.mirror.get_manifest(MIRRORED_REPO, Tag("1"))
    for layer in layers:
        with pytest.raises(UpstreamUnavailable, match="wrong bytes"):
            await worker.mirror.open_blob(MIRRORED_REPO, digest_of(layer))
    site.far.faults.corrupt = set()
    found = [digest_of(layers[0]), digest_of(b"something else")]
    assert await worker.store.records.forget_bad_senders("docker.io", found) == 1
    assert await read_blob(worker.mirror, MIRRORED_REPO, found[0]) == layers[0]
    with pytest.raises(UpstreamUnavailable, match="wrong bytes"):
        await worker.mirror.open_blob(MIRRORED_REPO, digest_of(layers[1]))
    site.clock.now += 601
    assert await read_blob(worker.mirror, MIRRORED_REPO, digest_of(layers[1])) == layers[1]


@pytest.mark.parametrize("follows", [False, True])
async def test_a_reader_can_ask_again_after_wrong_bytes(site: MirrorStore, worker: MirrorWorker, follows: bool) -> None:
    """When a reader of any worker gets the error for corrupt bytes, the fill has ended in that worker, and the next
    open starts a new one."""
    await pull_manifest_of_new_image(site, worker, SMALL)
    site.far.faults.corrupt = {"https://one"}
    gate = site.far.faults.gates[len(SMALL) - 1] = threading.Event()
    async with site.worker(source_of_another_worker(site)) as other:
        readers = [await each.mirror.open_blob(MIRRORED_REPO, digest_of(SMALL)) for each in (worker, other)]
        await wait_until(lambda: site.far.bytes_sent(digest_of(SMALL)) > 2 * MIB)
        site.disk.pause = 0.05  # commits are slow, so the error comes some time after the last byte

        async def ask_again() -> bytes:
            with pytest.raises(DigestInvalid):
                await readers[follows].readable_until(len(SMALL) - 1)
            site.far.faults.corrupt = set()
            return await read_blob((worker, other)[follows].mirror, MIRRORED_REPO, digest_of(SMALL))

        asking = asyncio.create_task(ask_again())
        await asyncio.sleep(0)
        gate.set()
        assert await asking == SMALL
        for reader in readers:
            await reader.aclose()


async def test_a_manifest_that_names_another_size(site: MirrorStore, worker: MirrorWorker) -> None:
    """While a manifest states a wrong size for a blob, opening the blob raises an error. After the pull of a manifest
    with the right size, the blob can be read."""
    real = site.far.add_blob(UPSTREAM_REPO, BIG)
    for size in (9 * MIB, len(BIG) + 1, 100):
        wrong = image_of(site.far.add_blob(UPSTREAM_REPO, b"{}"), [replace(real, size=size)])
        site.far.add_manifest(UPSTREAM_REPO, wrong, "wrong")
        site.clock.now += 3600
        await worker.mirror.get_manifest(MIRRORED_REPO, Tag("wrong"))
        with pytest.raises(UpstreamUnavailable, match="bytes were expected"):
            await worker.mirror.open_blob(MIRRORED_REPO, DIGEST)
    site.clock.now += 1
    await pull_manifest_of_new_image(site, worker, BIG)
    assert await read_blob(worker.mirror, MIRRORED_REPO, DIGEST) == BIG


async def test_a_wrong_size_does_not_delay_other_readers(site: MirrorStore, worker: MirrorWorker) -> None:
    """If an image states a wrong size for a blob, no stored bytes are deleted and no other reader is delayed, also
    while the upstream does not answer."""
    await pull_manifest_of_new_image(site, worker, BIG)
    gate = site.far.faults.gates[5 * MIB] = threading.Event()
    async with site.worker() as other:
        reader = await other.mirror.open_blob(MIRRORED_REPO, DIGEST)
        await wait_until(lambda: site.far.bytes_sent(DIGEST) >= 5 * MIB)
        await other.mirror.aclose()
        await reader.aclose()
    site.far.closed = False
    gate.set()
    wrong = image_of(site.far.add_blob(OTHER_FAR, b"{}"), [replace(site.far.add_blob(OTHER_FAR, BIG), size=9 * MIB)])
    site.far.add_manifest(OTHER_FAR, wrong, "1")
    await worker.mirror.get_manifest(OTHER, Tag("1"))
    stall = site.far.faults.stall = asyncio.Event()
    waiting = asyncio.create_task(worker.mirror.open_blob(OTHER, DIGEST))
    await wait_until(lambda: site.far.calls["get blob"] > 0 and bool(worker.mirror.running_fills))
    site.far.faults.stall = None
    assert await read_blob(worker.mirror, MIRRORED_REPO, DIGEST) == BIG
    sent_once(site, DIGEST, len(BIG))
    stall.set()
    with pytest.raises(UpstreamUnavailable, match="bytes were expected"):
        await waiting


async def test_another_worker_takes_over(site: MirrorStore) -> None:
    """When the worker that owns a fill ends, a reader of another worker continues, and no stored byte is fetched
    again."""
    leaving_source = FakeSource()
    leaving_source.blobs, leaving_source.manifests = site.far.blobs, site.far.manifests
    leaving_source.sent = site.far.sent
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
            reading = asyncio.create_task(read(second))
            await leaving.aclose()
            await first.aclose()
        gate.set()
        assert await reading == BIG
    sent_once(site, DIGEST, len(BIG))
