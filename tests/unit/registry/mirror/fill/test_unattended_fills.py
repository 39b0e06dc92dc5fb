"""Unattended fills: downloads into the cache whose clients have all left. They let the fills of other clients have the
connections to the upstream."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from registry.mirror.fill import slot_holders, slots
from registry.mirror.fill.fill_context import MAX_CLAIMS
from storage.content import digest_of
from storage.names import Digest, Tag
from tests.fakes.mirror_source import CHUNK
from tests.fakes.open_files import open_files_below
from tests.fakes.registry_content import read_blob
from tests.unit.registry.conftest import wait_until
from tests.unit.registry.mirror.conftest import (
    BIG,
    MIB,
    MIRRORED_REPO,
    UPSTREAM_REPO,
    MirrorSite,
    MirrorWorker,
    assert_each_byte_sent_once,
    open_in_time,
    read_to_end,
    source_of_another_worker,
    wait_until_stored,
)

pytestmark = pytest.mark.slow

CONNECTIONS = 4
LAYERS = [BIG[start : start + MIB] for start in range(6)]
DIGESTS = [digest_of(layer) for layer in LAYERS]
TAG = Tag("1")


async def take_connections(worker: MirrorWorker, stack: AsyncExitStack, count: int) -> None:
    """Takes `count` connections to the upstream until `stack` ends, as fills of other clients would."""
    for _ in range(count):
        assert await stack.enter_async_context(worker.store.leases.try_slot("upstream-docker.io", CONNECTIONS))


@asynccontextmanager
async def all_connections_taken(worker: MirrorWorker) -> AsyncIterator[AsyncExitStack]:
    """Takes all connections inside the `async with` block. Yields a stack that gives one of them back when it ends."""
    async with AsyncExitStack() as one, AsyncExitStack() as others:
        await take_connections(worker, one, 1)
        await take_connections(worker, others, CONNECTIONS - 1)
        yield one


@pytest.fixture
def fetched(site: MirrorSite) -> list[Digest]:
    """The digests of the blobs that the upstream was asked for, in the order of the requests. The upstream has an image
    with `LAYERS`."""
    site.upstream.add_image(UPSTREAM_REPO, *LAYERS)
    digests: list[Digest] = []
    site.upstream.on_fetch = digests.append
    return digests


async def request(worker: MirrorWorker, digest: Digest) -> asyncio.Task[bytes]:
    """Starts a client that reads the blob, and waits until the blob's fill waits for a connection."""
    reading = asyncio.create_task(read_blob(worker.mirror, MIRRORED_REPO, digest))
    await wait_until(lambda: any(fill.digest == digest and fill.is_queued for fill in worker.mirror.running_fills))
    return reading


async def request_and_leave(worker: MirrorWorker, digest: Digest) -> None:
    """A client requests the blob, and leaves when the blob's fill waits for a connection. Returns when the fill waits
    behind those of other clients, or has been given up."""
    reading = await request(worker, digest)
    (fill,) = (fill for fill in worker.mirror.running_fills if fill.digest == digest)
    reading.cancel()
    await asyncio.wait([reading])
    slots = worker.mirror._fills._context.slots
    await wait_until(lambda: fill.demand in slots._unattended or fill.has_ended)


def is_unattended(worker: MirrorWorker, digest: Digest) -> bool:
    """Returns whether the blob's fill is running without clients."""
    return any(fill.digest == digest and fill.demand.is_unattended for fill in worker.mirror.running_fills)


async def test_unattended_fills_wait_behind_those_of_other_clients(
    site: MirrorSite, worker: MirrorWorker, fetched: list[Digest]
) -> None:
    """Three clients request blobs while all connections are busy, and leave. A fourth one stays. It gets the first
    connection that becomes free, although it came last. The other three blobs are fetched when all connections are
    free."""
    await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
    async with all_connections_taken(worker) as one_connection:
        for digest in DIGESTS[:3]:
            await request_and_leave(worker, digest)
        reading = await request(worker, DIGESTS[3])
        await one_connection.aclose()
        assert await reading == LAYERS[3]
        assert fetched == [DIGESTS[3]]
    for digest in DIGESTS[:3]:
        await wait_until_stored(worker, digest)


@pytest.mark.parametrize("returns_to", ["the same worker", "another worker"])
async def test_a_client_that_returns_is_served_as_others(
    site: MirrorSite, worker: MirrorWorker, fetched: list[Digest], returns_to: str
) -> None:
    """A client leaves while the fill of its blob waits for a connection, and requests the blob again, from the same
    worker or another one. It gets the only free connection."""
    await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
    async with site.worker(source_of_another_worker(site)) as other, all_connections_taken(worker) as one_connection:
        await request_and_leave(worker, DIGESTS[0])
        await one_connection.aclose()
        reading = await request(worker if returns_to == "the same worker" else other, DIGESTS[0])
        assert await reading == LAYERS[0]


async def test_a_fill_is_attended_until_its_last_client_leaves(
    site: MirrorSite, worker: MirrorWorker, fetched: list[Digest]
) -> None:
    """Of four clients of a queued fill, two use another worker, and one has got the headers. The fill is attended until
    all of them have left."""
    site.start_timeout = 1.0
    async with site.worker(source_of_another_worker(site)) as other, site.worker() as first:
        await first.mirror.get_manifest(MIRRORED_REPO, TAG)
        async with all_connections_taken(first):
            readers = [await open_in_time(first, MIRRORED_REPO, DIGESTS[0])]
            readers += await asyncio.gather(
                *(open_in_time(worker, MIRRORED_REPO, DIGESTS[0]) for worker in (first, other, other))
            )
            for reader in readers[:3]:
                await reader.aclose()
            await wait_until(lambda: not first.mirror.running_fills[0].demand.has_clients_here)
            await asyncio.sleep(0.3)  # several checks whether another worker has clients
            assert not is_unattended(first, DIGESTS[0])
            await readers[3].aclose()
            await wait_until(lambda: is_unattended(first, DIGESTS[0]))
            await wait_until(lambda: not other.mirror.running_fills)


async def test_a_fill_is_unattended_after_clients_of_two_workers_have_left(
    site: MirrorSite, worker: MirrorWorker, fetched: list[Digest]
) -> None:
    """A client of a queued fill leaves while a client of another worker waits, and comes back. When both have left, the
    fill is unattended."""
    site.start_timeout = 1.0
    async with site.worker(source_of_another_worker(site)) as other, site.worker() as first:
        await first.mirror.get_manifest(MIRRORED_REPO, TAG)
        async with all_connections_taken(first):
            reader = await open_in_time(first, MIRRORED_REPO, DIGESTS[0])
            other_reader = await open_in_time(other, MIRRORED_REPO, DIGESTS[0])
            demand = first.mirror.running_fills[0].demand
            await reader.aclose()
            await wait_until(lambda: demand.has_clients)
            reader = await open_in_time(first, MIRRORED_REPO, DIGESTS[0])
            await reader.aclose()
            await other_reader.aclose()
            await wait_until(lambda: demand.is_unattended)


async def test_a_limited_number_of_unattended_fills_wait(
    site: MirrorSite, worker: MirrorWorker, fetched: list[Digest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five clients request blobs and leave, but at most two unattended fills wait for a connection. The oldest ones are
    given up, and leave no files. A client that requests such a blob again gets it."""
    monkeypatch.setattr(slots, "MAX_UNATTENDED", 2)
    await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
    async with all_connections_taken(worker) as one_connection:
        for digest in DIGESTS[:5]:
            await request_and_leave(worker, digest)
        await wait_until(lambda: {fill.digest for fill in worker.mirror.running_fills} == set(DIGESTS[3:5]))
        await wait_until(lambda: len(open_files_below(site.data / "partials")) == 4)  # a thread closes the others
        reading = await request(worker, DIGESTS[0])
        await one_connection.aclose()
        assert await reading == LAYERS[0]
        assert fetched == [DIGESTS[0]]
    for digest in DIGESTS[3:5]:
        await wait_until_stored(worker, digest)
    assert DIGESTS[1] not in fetched


async def test_a_client_that_leaves_before_the_files_are_opened(
    site: MirrorSite, worker: MirrorWorker, fetched: list[Digest]
) -> None:
    """So many fills open their files that another one waits. Its client leaves meanwhile. The fill ends without opening
    a file and without a request to the upstream. A client that requests the blob later gets it."""
    await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
    claims = worker.mirror._fills._context.claim_permits
    for _ in range(MAX_CLAIMS):
        await claims.acquire()
    reading = asyncio.create_task(read_blob(worker.mirror, MIRRORED_REPO, DIGESTS[0]))
    await wait_until(lambda: worker.mirror.running_fills)
    reading.cancel()
    await asyncio.wait([reading])
    for _ in range(MAX_CLAIMS):
        claims.release()
    await wait_until(lambda: not worker.mirror.running_fills)
    assert not any((site.data / "partials").iterdir())
    assert fetched == []
    assert await read_blob(worker.mirror, MIRRORED_REPO, DIGESTS[0]) == LAYERS[0]


async def test_fills_that_have_bytes_are_given_up_last(
    site: MirrorSite, worker: MirrorWorker, fetched: list[Digest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client leaves in the middle of a blob, and the fill waits for its next connection. Among too many unattended
    fills, it is given up last, although it is the oldest one."""
    monkeypatch.setattr(slots, "MAX_UNATTENDED", 1)
    site.upstream.add_image(UPSTREAM_REPO, BIG, *LAYERS)
    await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
    gate = site.upstream.faults.gates[MIB] = threading.Event()
    reader = await worker.mirror.open_blob(MIRRORED_REPO, digest_of(BIG))
    async with AsyncExitStack() as stack:
        await take_connections(worker, stack, CONNECTIONS - 1)
        await reader.aclose()
        gate.set()
        await wait_until(lambda: site.upstream.at_once == 0)
        await take_connections(worker, stack, 1)
        for digest in DIGESTS[:2]:
            await request_and_leave(worker, digest)
        await wait_until(lambda: [fill.digest for fill in worker.mirror.running_fills] == [digest_of(BIG)])
    await wait_until_stored(worker, digest_of(BIG))


async def test_a_slow_unattended_request_is_cut_off_when_a_client_waits(
    site: MirrorSite, fetched: list[Digest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The upstream sends two blobs slowly, over all connections. The client of one of them has left. When a client of
    another worker needs a connection, the request for this blob is cut off, and not the other one. Later, the rest of
    the blob is requested, and no byte twice."""
    monkeypatch.setattr(slot_holders, "SLOW_SLOT_SECONDS", 0.0)
    monkeypatch.setattr(slot_holders, "SLOW_POLL_SECONDS", 0.01)
    site.upstream.connections = 2
    gate = site.upstream.faults.gates[MIB // 2] = threading.Event()
    async with site.worker() as worker, site.worker(source_of_another_worker(site)) as other:
        await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
        attended, unattended = [await worker.mirror.open_blob(MIRRORED_REPO, digest) for digest in DIGESTS[:2]]
        await wait_until(lambda: len(site.upstream.sent.get(DIGESTS[1], ())) == MIB // 2 // CHUNK)
        await unattended.aclose()
        async with asyncio.timeout(60):
            assert await read_blob(other.mirror, MIRRORED_REPO, digest_of(b"{}")) == b"{}"
        assert fetched == DIGESTS[:2]
        gate.set()
        assert await read_to_end(attended) == LAYERS[0]
        await wait_until_stored(worker, DIGESTS[1])
    assert fetched == [*DIGESTS[:2], DIGESTS[1]]
    for digest in DIGESTS[:2]:
        assert_each_byte_sent_once(site, digest, MIB)


@pytest.mark.parametrize("gate_offset", [0, MIB], ids=["no byte", "no ranges"])
async def test_an_unattended_fill_is_given_up_if_it_would_begin_again(
    site: MirrorSite, fetched: list[Digest], monkeypatch: pytest.MonkeyPatch, gate_offset: int
) -> None:
    """The upstream sends no byte of a blob, or sends only whole blobs. The client has left. When another client needs
    the connection, the request is cut off, and the blob is not requested again. Otherwise each such request could be
    cut off, and the upstream would send the same bytes for ever. A client that returns gets the blob."""
    monkeypatch.setattr(slot_holders, "SLOW_SLOT_SECONDS", 0.0)
    monkeypatch.setattr(slot_holders, "SLOW_POLL_SECONDS", 0.01)
    site.upstream.connections = 1
    site.upstream.add_image(UPSTREAM_REPO, BIG)
    site.upstream.faults.ranges = gate_offset == 0
    gate = site.upstream.faults.gates[gate_offset] = threading.Event()
    async with site.worker() as worker:
        await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
        leaving = asyncio.create_task(read_blob(worker.mirror, MIRRORED_REPO, digest_of(BIG)))
        await wait_until(lambda: site.upstream.at_once == 1)
        if gate_offset:
            await wait_until(lambda: len(site.upstream.sent.get(digest_of(BIG), ())) >= gate_offset // CHUNK)
        leaving.cancel()
        await asyncio.wait([leaving])
        requests = fetched.count(digest_of(BIG))
        config = asyncio.create_task(read_blob(worker.mirror, MIRRORED_REPO, digest_of(b"{}")))
        await wait_until(lambda: digest_of(BIG) not in {fill.digest for fill in worker.mirror.running_fills})
        gate.set()
        assert await config == b"{}"
        assert fetched.count(digest_of(BIG)) == requests
        assert await read_blob(worker.mirror, MIRRORED_REPO, digest_of(BIG)) == BIG


async def test_a_worker_that_stops_leaves_nothing_of_its_unattended_fills(
    site: MirrorSite, fetched: list[Digest]
) -> None:
    """A worker stops while fills with and without clients wait for connections. It leaves no open files, and all
    connections become free."""
    async with site.worker() as other:
        async with site.worker() as stopping:
            await stopping.mirror.get_manifest(MIRRORED_REPO, TAG)
            async with all_connections_taken(other):
                await request_and_leave(stopping, DIGESTS[0])
                reading = await request(stopping, DIGESTS[1])
                await stopping.mirror.aclose()
            await asyncio.wait([reading])
            assert reading.exception() is not None
        assert open_files_below(site.data / "partials") == []
        async with all_connections_taken(other):
            pass
    assert fetched == []
