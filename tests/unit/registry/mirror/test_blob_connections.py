"""Connections to an upstream during fills: all workers share a limited number of them, and one slow connection does not
delay a blob."""

from __future__ import annotations

import asyncio
import threading

import pytest

from registry.mirror.fill import pieces
from storage.content import digest_of
from storage.errors import UpstreamTimeout
from storage.names import Digest, Tag
from tests.fakes.registry_content import read_blob
from tests.unit.registry.conftest import wait_until
from tests.unit.registry.mirror.conftest import (
    BIG,
    DIGEST,
    MIB,
    MIRRORED_REPO,
    UPSTREAM_REPO,
    MirrorStore,
    MirrorWorker,
    begin_pull,
    read,
    sent_once,
)

pytestmark = pytest.mark.slow


async def test_one_slow_connection_does_not_hold_a_blob_up(
    site: MirrorStore, worker: MirrorWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When all other bytes are stored, the rest of a piece on a nearly stalled connection is fetched over another one.
    No stored byte is fetched again."""
    monkeypatch.setattr(pieces, "STRAGGLER_WINDOW_SECONDS", 0.2)
    await begin_pull(site, worker)
    gate = site.far.faults.gates[MIB] = threading.Event()

    def open_gate_on_second_request(digest: Digest) -> None:
        if any(span.start == MIB for span in site.far.asked[digest]):
            gate.set()

    site.far.on_fetch = open_gate_on_second_request
    async with asyncio.timeout(60):
        assert await read_blob(worker.mirror, MIRRORED_REPO, DIGEST) == BIG
    sent_once(site, DIGEST, len(BIG))


async def test_connections_are_bounded(site: MirrorStore, worker: MirrorWorker) -> None:
    """Six blobs that are fetched at the same time share the three connections that the settings allow. All arrive."""
    site.far.connections = 3
    layers = [BIG[start : start + 9 * MIB] for start in range(0, 6000, 1000)]
    await begin_pull(site, worker, *layers)
    got = await asyncio.gather(*(read_blob(worker.mirror, MIRRORED_REPO, digest_of(layer)) for layer in layers))
    assert got == layers
    assert site.far.most_at_once <= 3


async def test_one_blob_does_not_keep_the_connections(site: MirrorStore, worker: MirrorWorker) -> None:
    """A large blob may use all connections. When a client requests a second blob, the second blob gets the connection
    on which the next piece of the large one ends."""
    site.far.connections = 2
    small = BIG[1 : 3 * MIB]
    await begin_pull(site, worker, BIG, small)
    first, second = (site.far.faults.gates.setdefault(at * MIB, threading.Event()) for at in (3, 5))
    reader = await worker.mirror.open_blob(MIRRORED_REPO, DIGEST)
    await wait_until(lambda: site.far.at_once == 2)
    other = asyncio.create_task(read_blob(worker.mirror, MIRRORED_REPO, digest_of(small)))
    second.set()
    assert await other == small
    first.set()
    assert await read(reader) == BIG
    assert site.far.most_at_once == 2


async def test_workers_take_turns_at_the_connections(site: MirrorStore) -> None:
    """A fill of many pieces lets a fill of another worker use the connection in between."""
    site.far.connections = 1
    small = BIG[: 3 * MIB]
    site.far.add_image(UPSTREAM_REPO, BIG, small)
    gate = site.far.faults.gates[5 * MIB] = threading.Event()
    order: list[Digest] = []
    site.far.on_fetch = order.append
    async with site.worker() as one, site.worker() as two:
        await one.mirror.get_manifest(MIRRORED_REPO, Tag("1"))
        first = await one.mirror.open_blob(MIRRORED_REPO, DIGEST)
        reading = asyncio.create_task(read(first))
        await wait_until(lambda: order.count(DIGEST) > 1)
        other = asyncio.create_task(read_blob(two.mirror, MIRRORED_REPO, digest_of(small)))
        await wait_until(lambda: bool(two.mirror.running_fills))
        gate.set()
        assert (await reading, await other) == (BIG, small)
    assert order[-1] == DIGEST


async def test_headers_in_time_when_all_connections_are_busy(site: MirrorStore) -> None:
    """If all connections are busy, a client that requests a blob gets the headers of the response in time. The bytes
    follow as soon as a connection is free."""
    site.far.connections, site.start_timeout = 1, 1.0
    small = BIG[: 3 * MIB]
    site.far.add_image(UPSTREAM_REPO, BIG, small)
    gate = site.far.faults.gates[0] = threading.Event()
    async with site.worker() as worker:
        await worker.mirror.get_manifest(MIRRORED_REPO, Tag("1"))
        readers = [await worker.mirror.open_blob(MIRRORED_REPO, digest) for digest in (DIGEST, digest_of(small))]
        gate.set()
        assert await asyncio.gather(*map(read, readers)) == [BIG, small]


async def test_an_upstream_that_does_not_tell_a_size(site: MirrorStore) -> None:
    """If the upstream does not answer the request for the blob's size, the client gets an error in time."""
    site.start_timeout = 1.0
    loose = site.far.add_blob(UPSTREAM_REPO, b"named by no manifest here")
    hold = site.far.faults.hold = asyncio.Event()
    async with site.worker() as worker:
        with pytest.raises(UpstreamTimeout):
            await worker.mirror.open_blob(MIRRORED_REPO, loose.digest)
        with pytest.raises(UpstreamTimeout):
            await worker.mirror.resolve_blob(MIRRORED_REPO, loose.digest)
        hold.set()
        assert await read_blob(worker.mirror, MIRRORED_REPO, loose.digest) == b"named by no manifest here"


@pytest.mark.parametrize("size", [1000, 12 * MIB])
async def test_an_upstream_that_says_nothing(site: MirrorStore, size: int) -> None:
    """If the upstream does not answer at all, the client gets an error before the client gives up. Bytes that arrive
    later are stored."""
    site.start_timeout = 0.5
    data = BIG[:size]
    stall = site.far.faults.stall = asyncio.Event()
    async with site.worker() as worker:
        await begin_pull(site, worker, data)
        with pytest.raises(UpstreamTimeout):
            await worker.mirror.open_blob(MIRRORED_REPO, digest_of(data))
        stall.set()
        await wait_until(lambda: not worker.mirror.running_fills)
        assert await read_blob(worker.mirror, MIRRORED_REPO, digest_of(data)) == data
    sent_once(site, digest_of(data), size)
