"""How clients read blobs through a mirror. A blob that is not cached is fetched by one fill (download from the upstream
into the cache), which serves all readers in all workers."""

from __future__ import annotations

import asyncio
import threading

import pytest

from storage.content import Span, digest_of
from storage.errors import RangeInvalid, UpstreamUnavailable
from storage.names import Tag
from tests.fakes.registry_content import read_blob
from tests.unit.registry.mirror.conftest import (
    BIG,
    DIGEST,
    MIB,
    MIRRORED_REPO,
    UPSTREAM_REPO,
    MirrorSite,
    MirrorWorker,
    assert_each_byte_sent_once,
    begin_pull,
    read_to_end,
    wait_until_stored,
)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("size", [0, 1, 2, 1000, 65536, 65537, 3 * MIB, 12 * MIB])
async def test_blobs_of_any_size_arrive_intact(site: MirrorSite, worker: MirrorWorker, size: int) -> None:
    """A blob of any size arrives intact and is stored. The upstream sends it once."""
    data = BIG[:size]
    await begin_pull(site, worker, data)
    digest = digest_of(data)
    for _ in range(2):
        assert await read_blob(worker.mirror, MIRRORED_REPO, digest) == data
    assert await read_blob(worker.store, MIRRORED_REPO, digest) == data
    assert site.upstream.bytes_sent(digest) == size


async def test_many_readers_of_two_workers(site: MirrorSite) -> None:
    """32 clients of two workers read the same blob, which is not cached. All clients get the right bytes, and the
    upstream sends each byte once."""
    site.upstream.add_image(UPSTREAM_REPO, BIG)
    async with site.worker() as worker_1, site.worker() as worker_2:
        await worker_1.mirror.get_manifest(MIRRORED_REPO, Tag("1"))
        received = await asyncio.gather(
            *(read_blob(w.mirror, MIRRORED_REPO, DIGEST) for w in (worker_1, worker_2) for _ in range(16))
        )
        assert all(data == BIG for data in received)
    assert_each_byte_sent_once(site, DIGEST, len(BIG))


async def test_ranges_of_a_blob_that_is_being_fetched(site: MirrorSite, worker: MirrorWorker) -> None:
    """Any range of a blob can be read while the blob is being fetched. If clients read several ranges at the same time,
    each byte is fetched once."""
    await begin_pull(site, worker)
    size = len(BIG)
    spans = [Span(0, 10), Span(-5), Span(size - 1), Span(7 * MIB, 7 * MIB + 100), Span(MIB, 9 * MIB), Span(11 * MIB)]
    bodies = await asyncio.gather(*(read_blob(worker.mirror, MIRRORED_REPO, DIGEST, span) for span in spans))
    for span, data in zip(spans, bodies, strict=True):
        start, stop = span.to_offsets(size)
        assert data == BIG[start:stop]
    with pytest.raises(RangeInvalid):
        await worker.mirror.open_blob(MIRRORED_REPO, DIGEST, Span(size))
    assert_each_byte_sent_once(site, DIGEST, size)


async def test_a_range_ahead_is_fetched_early(site: MirrorSite, worker: MirrorWorker) -> None:
    """A client that requests the end of a large blob does not wait until all bytes before this range are fetched."""
    await begin_pull(site, worker)
    gate = site.upstream.faults.gates[0] = threading.Event()  # the first connection delivers no bytes
    first_bytes = asyncio.create_task(read_blob(worker.mirror, MIRRORED_REPO, DIGEST, Span(0, 10)))
    async with asyncio.timeout(60):
        last_bytes = asyncio.create_task(read_blob(worker.mirror, MIRRORED_REPO, DIGEST, Span(11 * MIB, 11 * MIB + 5)))
        assert await last_bytes == BIG[11 * MIB : 11 * MIB + 5]
    gate.set()
    await first_bytes


async def test_headers_do_not_wait_for_the_body(site: MirrorSite, worker: MirrorWorker) -> None:
    """A blob that is not cached is opened as soon as the upstream starts to send it. The stored bytes can be read while
    the rest is fetched."""
    await begin_pull(site, worker)
    gate = site.upstream.faults.gates[MIB] = threading.Event()
    reader = await worker.mirror.open_blob(MIRRORED_REPO, DIGEST)
    assert reader.descriptor.size == len(BIG)
    assert reader.file is not None
    at = 0
    while at < MIB:
        at = await reader.readable_until(at)
    assert at == MIB
    gate.set()
    assert await read_to_end(reader) == BIG


async def test_the_last_byte_waits_for_the_digest(site: MirrorSite, worker: MirrorWorker) -> None:
    """No reader gets the last byte of a blob before the digest is checked, not even a reader that requests only this
    byte."""
    await begin_pull(site, worker)
    gate = site.upstream.faults.gates[len(BIG) - 1] = threading.Event()
    reader = await worker.mirror.open_blob(MIRRORED_REPO, DIGEST)
    tail = await worker.mirror.open_blob(MIRRORED_REPO, DIGEST, Span(-1))
    wait_task = asyncio.create_task(tail.readable_until(len(BIG) - 1))
    at = 0
    while at < 12 * MIB:
        at = await reader.readable_until(at)
        assert at < len(BIG)
    assert not wait_task.done()
    gate.set()
    assert await wait_task == len(BIG)
    assert await worker.store.resolve_blob(MIRRORED_REPO, DIGEST)
    assert await read_to_end(reader) == BIG
    assert await read_to_end(tail) == BIG[-1:]


async def test_a_fill_continues_when_its_client_disconnects(site: MirrorSite, worker: MirrorWorker) -> None:
    """A blob that a client has requested is fetched to its end, even if the client disconnects."""
    await begin_pull(site, worker)
    gate = site.upstream.faults.gates[MIB] = threading.Event()
    reader = await worker.mirror.open_blob(MIRRORED_REPO, DIGEST)
    await reader.aclose()
    await reader.aclose()
    gate.set()
    await wait_until_stored(worker, DIGEST)
    assert_each_byte_sent_once(site, DIGEST, len(BIG))


async def test_an_upstream_that_ignores_ranges(site: MirrorSite, worker: MirrorWorker) -> None:
    """If an upstream ignores the Range header and sends the whole blob, the blob is fetched over one connection, and
    each byte is sent once."""
    await begin_pull(site, worker)
    site.upstream.faults.ranges = False
    assert await read_blob(worker.mirror, MIRRORED_REPO, DIGEST) == BIG
    assert_each_byte_sent_once(site, DIGEST, len(BIG))
    assert site.upstream.most_at_once == 1


@pytest.mark.parametrize("size", [1000, 12 * MIB])
async def test_an_upstream_that_refuses_ranges(site: MirrorSite, worker: MirrorWorker, size: int) -> None:
    """If an upstream answers a range request with an error, the whole blob is requested instead."""
    data = BIG[:size]
    await begin_pull(site, worker, data)
    site.upstream.faults.refuses_ranges = True
    assert await read_blob(worker.mirror, MIRRORED_REPO, digest_of(data)) == data
    assert_each_byte_sent_once(site, digest_of(data), size)


async def test_a_head_request_fetches_no_blob(site: MirrorSite, worker: MirrorWorker) -> None:
    """A HEAD request for a blob that a cached manifest names causes no request to the upstream. For any other blob, the
    mirror asks the upstream with HEAD whether the repository has the blob."""
    await begin_pull(site, worker)
    assert (await worker.mirror.resolve_blob(MIRRORED_REPO, DIGEST)).size == len(BIG)
    assert site.upstream.calls == {"get manifest": 1}
    unnamed_blob = site.upstream.add_blob(UPSTREAM_REPO, b"named by no manifest here")
    assert (await worker.mirror.resolve_blob(MIRRORED_REPO, unnamed_blob.digest)).size == unnamed_blob.size
    assert site.upstream.calls == {"get manifest": 1, "head blob": 1}


async def test_a_restart_fetches_only_the_missing_bytes(site: MirrorSite) -> None:
    """If a server stops during a fill, the responses to the blob's readers are cut off. After the next start, only the
    bytes that are not stored yet are fetched."""
    async with site.worker() as worker:
        await begin_pull(site, worker)
        site.upstream.faults.gates[MIB] = threading.Event()
        reader = await worker.mirror.open_blob(MIRRORED_REPO, DIGEST)
        at = 0
        while at < MIB:
            at = await reader.readable_until(at)
        waiting = asyncio.create_task(reader.readable_until(at))
        await worker.mirror.aclose()
        with pytest.raises(UpstreamUnavailable):
            await waiting
        await reader.aclose()
        with pytest.raises(UpstreamUnavailable):
            await worker.mirror.open_blob(MIRRORED_REPO, DIGEST)
    # The first worker has closed the fake upstream. The second worker uses the same object.
    site.upstream.closed = False
    site.upstream.faults.gates.clear()
    async with site.worker() as worker:
        assert await read_blob(worker.mirror, MIRRORED_REPO, DIGEST) == BIG
    assert_each_byte_sent_once(site, DIGEST, len(BIG))
