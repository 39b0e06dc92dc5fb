"""Connections to an upstream during fills (downloads of blobs into the cache). All workers share a limited number of
connections, and one slow connection does not delay a blob."""

from __future__ import annotations

import asyncio
import threading

import pytest

from registry.mirror.fill import pieces, running_request, slot_holders
from registry.single_flight import cancel_and_wait
from storage.content import digest_of
from storage.data_dir.file_leases import FileLeases
from storage.errors import UpstreamTimeout
from storage.names import Digest, Tag
from tests.fakes.registry_content import read_blob
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
    begin_pull,
    open_in_time,
    read_to_end,
    source_of_another_worker,
)

pytestmark = pytest.mark.slow


async def test_one_slow_connection_does_not_delay_a_blob(
    site: MirrorSite, worker: MirrorWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection stalls in the middle of a piece. When all other bytes of the blob are stored, the rest of this piece
    is fetched over another connection. No stored byte is fetched again."""
    monkeypatch.setattr(pieces, "STRAGGLER_WINDOW_SECONDS", 0.2)
    await begin_pull(site, worker)
    gate = site.upstream.faults.gates[MIB] = threading.Event()

    def open_gate_on_second_request(digest: Digest) -> None:
        if any(span.start == MIB for span in site.upstream.requested_spans[digest]):
            gate.set()

    site.upstream.on_fetch = open_gate_on_second_request
    async with asyncio.timeout(60):
        assert await read_blob(worker.mirror, MIRRORED_REPO, DIGEST) == BIG
    assert_each_byte_sent_once(site, DIGEST, len(BIG))


async def test_fills_share_a_limited_number_of_connections(site: MirrorSite, worker: MirrorWorker) -> None:
    """Six blobs that are fetched at the same time share the three connections that the settings allow. All six blobs
    arrive complete."""
    site.upstream.connections = 3
    layers = [BIG[start : start + 9 * MIB] for start in range(0, 6000, 1000)]
    await begin_pull(site, worker, *layers)
    received_layers = await asyncio.gather(
        *(read_blob(worker.mirror, MIRRORED_REPO, digest_of(layer)) for layer in layers)
    )
    assert received_layers == layers
    assert site.upstream.most_at_once <= 3


async def test_a_second_blob_gets_a_connection_of_a_large_blob(site: MirrorSite, worker: MirrorWorker) -> None:
    """A large blob may use all connections. When a client requests a second blob, the first connection that has
    completed its piece of the large blob is released, and the second blob is fetched over this connection."""
    site.upstream.connections = 2
    small = BIG[1 : 3 * MIB]
    await begin_pull(site, worker, BIG, small)
    first_gate, second_gate = (site.upstream.faults.gates.setdefault(at * MIB, threading.Event()) for at in (3, 5))
    reader = await worker.mirror.open_blob(MIRRORED_REPO, DIGEST)
    await wait_until(lambda: site.upstream.at_once == 2)
    reading_small_blob = asyncio.create_task(read_blob(worker.mirror, MIRRORED_REPO, digest_of(small)))
    second_gate.set()
    assert await reading_small_blob == small
    first_gate.set()
    assert await read_to_end(reader) == BIG
    assert site.upstream.most_at_once == 2


async def test_a_large_fill_lets_another_worker_use_the_connection(site: MirrorSite) -> None:
    """There is only one connection. A fill of many pieces releases it after each piece, so that another worker can use
    it."""
    site.upstream.connections = 1
    small = BIG[: 3 * MIB]
    site.upstream.add_image(UPSTREAM_REPO, BIG, small)
    gate = site.upstream.faults.gates[5 * MIB] = threading.Event()
    fetched_digests: list[Digest] = []
    site.upstream.on_fetch = fetched_digests.append
    async with site.worker() as worker_1, site.worker() as worker_2:
        await worker_1.mirror.get_manifest(MIRRORED_REPO, Tag("1"))
        reader = await worker_1.mirror.open_blob(MIRRORED_REPO, DIGEST)
        reading_large_blob = asyncio.create_task(read_to_end(reader))
        await wait_until(lambda: fetched_digests.count(DIGEST) > 1)
        reading_small_blob = asyncio.create_task(read_blob(worker_2.mirror, MIRRORED_REPO, digest_of(small)))
        leases = worker_2.store.leases
        assert isinstance(leases, FileLeases)
        # The fill of the small blob waits for the connection, or has got it before the large blob stops at the gate.
        await wait_until(lambda: leases._queues._locks or reading_small_blob.done())
        gate.set()
        assert (await reading_large_blob, await reading_small_blob) == (BIG, small)
    assert fetched_digests[-1] == DIGEST  # so the small blob was fetched between two pieces of the large one


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_small_blob_gets_a_connection_before_large_ones(site: MirrorSite, workers: int) -> None:
    """Clients wait for one connection: some for layers, and one, which came last, for a config. The config is fetched
    first, also if the clients of the layers use another worker."""
    site.upstream.connections = 1
    config = b'{"architecture": "amd64"}'
    layers = [BIG[start : start + 3 * MIB] for start in range(4)]
    site.upstream.add_image(UPSTREAM_REPO, *layers, config=config)
    gate = site.upstream.faults.gates[0] = threading.Event()
    fetched_digests: list[Digest] = []
    site.upstream.on_fetch = fetched_digests.append
    async with site.worker() as worker_1, site.worker() as worker_2:
        await worker_1.mirror.get_manifest(MIRRORED_REPO, Tag("1"))
        reading_layers = [asyncio.create_task(read_blob(worker_1.mirror, MIRRORED_REPO, digest_of(d))) for d in layers]
        await wait_until(lambda: len(worker_1.mirror.running_fills) == len(layers) and site.upstream.at_once == 1)
        other = worker_1 if workers == 1 else worker_2
        leases = other.store.leases
        assert isinstance(leases, FileLeases)
        reading_config = asyncio.create_task(read_blob(other.mirror, MIRRORED_REPO, digest_of(config)))
        await wait_until(lambda: leases._urgent_waits)
        gate.set()
        assert await asyncio.gather(reading_config, *reading_layers) == [config, *layers]
    assert fetched_digests[1] == digest_of(config)


@pytest.mark.parametrize("size", [1, 1000, 3 * MIB])
async def test_headers_in_time_when_all_connections_are_busy(site: MirrorSite, size: int) -> None:
    """If all connections are busy, a client that requests a blob, such as a config, gets the headers of the response
    before the start timeout. The bytes follow as soon as a connection is free."""
    site.upstream.connections, site.start_timeout = 1, 1.0
    small = BIG[:size]
    site.upstream.add_image(UPSTREAM_REPO, BIG, small)
    gate = site.upstream.faults.gates[0] = threading.Event()
    async with site.worker() as worker:
        await worker.mirror.get_manifest(MIRRORED_REPO, Tag("1"))
        readers = [await open_in_time(worker, MIRRORED_REPO, digest) for digest in (DIGEST, digest_of(small))]
        gate.set()
        assert await asyncio.gather(*map(read_to_end, readers)) == [BIG, small]


async def test_slow_blobs_of_one_repository_leave_connections_to_others(
    site: MirrorSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The upstream sends the blobs of one repository slowly, and their clients stay. These blobs have all three
    connections. When a client of another repository needs one, the slow blobs keep one connection, and the request for
    another slow blob is cut off. Later, the rest of this blob is requested, and no byte twice."""
    monkeypatch.setattr(running_request, "SLOW_SLOT_SECONDS", 0.0)
    monkeypatch.setattr(slot_holders, "SLOW_SLOT_SECONDS", 0.0)
    monkeypatch.setattr(slot_holders, "SLOW_POLL_SECONDS", 0.01)
    site.upstream.connections = 3
    layers = [BIG[start : start + MIB] for start in range(3)]
    digests = [digest_of(layer) for layer in layers]
    site.upstream.add_image(UPSTREAM_REPO, *layers)
    config = site.upstream.add_image("library/other", b"layer", config=b'{"other": 1}').config
    assert config is not None
    gate = site.upstream.faults.gates[MIB // 2] = threading.Event()
    async with site.worker() as worker, site.worker(source_of_another_worker(site)) as other:
        await worker.mirror.get_manifest(MIRRORED_REPO, Tag("1"))
        await other.mirror.get_manifest(OTHER, Tag("1"))
        readers = [await worker.mirror.open_blob(MIRRORED_REPO, digest) for digest in digests]
        async with asyncio.timeout(60):
            assert await read_blob(other.mirror, OTHER, config.digest) == b'{"other": 1}'
        gate.set()
        assert await asyncio.gather(*map(read_to_end, readers)) == layers
    assert len(site.upstream.requested_spans[digests[0]]) == 1
    for digest in digests:
        assert_each_byte_sent_once(site, digest, MIB)


async def test_an_upstream_that_does_not_answer_a_head_request(site: MirrorSite) -> None:
    """If the upstream does not answer the HEAD request for a blob's size, the client gets an error after the start
    timeout."""
    site.start_timeout = 1.0
    unnamed_blob = site.upstream.add_blob(UPSTREAM_REPO, b"named by no manifest here")
    hold = site.upstream.faults.hold = asyncio.Event()
    async with site.worker() as worker:
        with pytest.raises(UpstreamTimeout):
            await worker.mirror.open_blob(MIRRORED_REPO, unnamed_blob.digest)
        with pytest.raises(UpstreamTimeout):
            await worker.mirror.resolve_blob(MIRRORED_REPO, unnamed_blob.digest)
        hold.set()
        worker.set_start_timeout(60)
        assert await read_blob(worker.mirror, MIRRORED_REPO, unnamed_blob.digest) == b"named by no manifest here"


@pytest.mark.parametrize("size", [1000, 12 * MIB])
async def test_an_upstream_that_does_not_answer(site: MirrorSite, size: int) -> None:
    """If the upstream does not answer the request for a blob, the client gets an error after the start timeout. The
    fill continues: bytes that arrive later are stored."""
    data = BIG[:size]
    stall = site.upstream.faults.stall = asyncio.Event()
    async with site.worker() as worker:
        await begin_pull(site, worker, data)
        first = asyncio.create_task(worker.mirror.open_blob(MIRRORED_REPO, digest_of(data)))
        await wait_until(lambda: site.upstream.calls["get blob"] == 1)
        worker.set_start_timeout(0.2)
        with pytest.raises(UpstreamTimeout):
            await worker.mirror.open_blob(MIRRORED_REPO, digest_of(data))
        await cancel_and_wait([first])
        stall.set()
        await wait_until(lambda: not worker.mirror.running_fills)
        assert await read_blob(worker.mirror, MIRRORED_REPO, digest_of(data)) == data
    assert_each_byte_sent_once(site, digest_of(data), size)
