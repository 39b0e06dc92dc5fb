"""Upstreams that break off, lie, or are not there; and processes that die in the middle."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from registry.config import Upstream
from registry.mirror.mirror import Mirror
from storage.content import Span, digest_of
from storage.errors import BlobUnknown, Denied, DigestInvalid, RegistryError, TooManyRequests, UpstreamUnavailable
from storage.names import Tag
from storage.opening import open_registry
from tests.contract.making import image_of, read_blob
from tests.mirror.conftest import FAR, HERE, Site, Worker
from tests.mirror.far import FarRegistry
from tests.mirror.test_blobs import BIG, DIGEST, MIB, read, sent_once

SMALL = random.Random(5).randbytes(3 * MIB)


@pytest.fixture
async def worker(site: Site) -> AsyncIterator[Worker]:
    async with site.worker() as opened:
        yield opened


async def begun(site: Site, worker: Worker, layer: bytes) -> None:
    site.far.add_image(FAR, layer)
    await worker.mirror.get_manifest(HERE, Tag("1"))


@pytest.mark.parametrize("data", [SMALL, BIG])
async def test_broken_connections_resume(site: Site, worker: Worker, data: bytes) -> None:
    """Connections that break are resumed where they broke: no byte is asked for twice, and the reader sees nothing."""
    site.far.faults.drops = [MIB, 100_000, 70_000, 500_000]
    await begun(site, worker, data)
    assert await read_blob(worker.mirror, HERE, digest_of(data)) == data
    sent_once(site, digest_of(data), len(data))
    assert not site.far.faults.drops


async def test_an_upstream_that_keeps_breaking(site: Site, worker: Worker) -> None:
    """An upstream that brings nothing any more is given up after some attempts: readers are cut, and what came is kept
    for the next try."""
    await begun(site, worker, SMALL)
    site.far.faults.drops = [MIB, *[0] * 20]
    reader = await worker.mirror.open_blob(HERE, digest_of(SMALL))
    with pytest.raises(UpstreamUnavailable):
        await read(reader)
    site.far.faults.drops = []
    assert await read_blob(worker.mirror, HERE, digest_of(SMALL)) == SMALL
    sent_once(site, digest_of(SMALL), len(SMALL))


@pytest.mark.parametrize(
    "error", [UpstreamUnavailable(), Denied(), TooManyRequests(retry_after=60), BlobUnknown()], ids=lambda e: e.code
)
async def test_errors_before_headers(site: Site, worker: Worker, error: RegistryError) -> None:
    """What upstream answers instead of a blob is told before any header; it is not remembered unless it is
    "unknown"."""
    await begun(site, worker, SMALL)
    site.far.faults.down = error
    with pytest.raises(type(error)):
        await worker.mirror.open_blob(HERE, digest_of(SMALL))
    assert site.far.calls["get blob"] <= 2
    site.far.faults.down = None
    site.clock.now += 61
    assert await read_blob(worker.mirror, HERE, digest_of(SMALL)) == SMALL


async def test_wrong_bytes_are_kept_nowhere(site: Site, worker: Worker) -> None:
    """A blob whose bytes are wrong never ends for its readers and is not kept; the next try asks another endpoint."""
    site.far.endpoints = ("https://one", "https://two")
    site.far.faults.corrupt = {"https://one"}
    await begun(site, worker, SMALL)
    digest = digest_of(SMALL)
    gate = site.far.faults.gates[MIB] = threading.Event()
    readers = [await worker.mirror.open_blob(HERE, digest, span) for span in (None, Span(10), Span(-1))]
    reading = [asyncio.create_task(read(reader)) for reader in readers]
    gate.set()
    ends = await asyncio.gather(*reading, return_exceptions=True)
    assert all(isinstance(end, DigestInvalid) for end in ends)
    with pytest.raises(BlobUnknown):
        await worker.store.open_blob(HERE, digest)
    assert await read_blob(worker.mirror, HERE, digest) == SMALL


async def test_wrong_bytes_of_a_small_blob(site: Site, worker: Worker) -> None:
    """A small blob is checked before anybody gets it, so the client does not even notice the endpoint that lies."""
    site.far.endpoints = ("https://one", "https://two")
    site.far.faults.corrupt = {"https://one"}
    await begun(site, worker, b"a small layer")
    assert await read_blob(worker.mirror, HERE, digest_of(b"a small layer")) == b"a small layer"


async def test_only_wrong_bytes(site: Site, worker: Worker) -> None:
    """An upstream that has only wrong bytes is asked a few times and then left alone for a while."""
    site.far.faults.corrupt = {"https://one"}
    await begun(site, worker, b"a small layer")
    digest = digest_of(b"a small layer")
    for _ in range(3):
        with pytest.raises(UpstreamUnavailable, match="wrong bytes"):
            await worker.mirror.open_blob(HERE, digest)
    assert site.far.calls["get blob"] == 3
    site.steady.now += 61
    site.far.faults.corrupt = set()
    assert await read_blob(worker.mirror, HERE, digest) == b"a small layer"


async def test_a_manifest_that_names_another_size(site: Site, worker: Worker) -> None:
    """A manifest with a wrong size for a blob gets an error, and spoils it for nobody else."""
    real = site.far.add_blob(FAR, BIG)
    for size in (9 * MIB, len(BIG) + 1, 100):
        wrong = image_of(site.far.add_blob(FAR, b"{}"), [replace(real, size=size)])
        site.far.add_manifest(FAR, wrong, "wrong")
        site.clock.now += 3600
        await worker.mirror.get_manifest(HERE, Tag("wrong"))
        with pytest.raises(UpstreamUnavailable, match="where the manifest says"):
            await worker.mirror.open_blob(HERE, DIGEST)
    site.clock.now += 1
    await begun(site, worker, BIG)
    assert await read_blob(worker.mirror, HERE, DIGEST) == BIG


async def test_another_worker_takes_over(site: Site) -> None:
    """When the worker that fetches a blob goes, a reader of another goes on without noticing, and no byte that came is
    fetched again."""
    gone = FarRegistry()
    gone.blobs, gone.manifests = site.far.blobs, site.far.manifests
    gone.sent = site.far.sent
    gate = gone.faults.gates[5 * MIB] = threading.Event()
    async with site.worker() as stays:
        await begun(site, stays, BIG)
        async with open_registry(site.data, clock=site.clock) as store:
            goes = Mirror(store, gone, store.partials, store.records, store.turns, Upstream(name="docker.io"))
            first = await goes.open_blob(HERE, DIGEST)
            at = 0
            while at < 5 * MIB:
                at = await first.ready(at)
            second = await stays.mirror.open_blob(HERE, DIGEST)
            assert await second.ready(0) >= 5 * MIB
            reading = asyncio.create_task(read(second))
            await goes.aclose()
            await first.aclose()
        gate.set()
        assert await reading == BIG
    sent_once(site, DIGEST, len(BIG))
