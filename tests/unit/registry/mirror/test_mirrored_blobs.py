"""Blobs through the mirror: one fill for all readers, over all workers."""

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
    MirrorStore,
    MirrorWorker,
    begin_pull,
    read,
    sent_once,
    stored,
)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("size", [0, 1, 2, 1000, 65536, 65537, 3 * MIB, 12 * MIB])
async def test_sizes(site: MirrorStore, worker: MirrorWorker, size: int) -> None:
    """A blob of any size arrives intact, is stored, and is sent once by the upstream."""
    data = BIG[:size]
    await begin_pull(site, worker, data)
    digest = digest_of(data)
    for _ in range(2):
        assert await read_blob(worker.mirror, MIRRORED_REPO, digest) == data
    assert await read_blob(worker.store, MIRRORED_REPO, digest) == data
    assert site.far.bytes_sent(digest) == size


async def test_many_readers_of_two_workers(site: MirrorStore) -> None:
    """32 clients of two workers read one cold blob. All get the right bytes, and the upstream sends each byte once."""
    site.far.add_image(UPSTREAM_REPO, BIG)
    async with site.worker() as one, site.worker() as two:
        await one.mirror.get_manifest(MIRRORED_REPO, Tag("1"))
        read = await asyncio.gather(
            *(read_blob(w.mirror, MIRRORED_REPO, DIGEST) for w in (one, two) for _ in range(16))
        )
        assert all(data == BIG for data in read)
    sent_once(site, DIGEST, len(BIG))


async def test_ranges_of_a_blob_on_its_way(site: MirrorStore, worker: MirrorWorker) -> None:
    """Any range of a blob that is not stored can be read at once. All ranges together fetch each byte once."""
    await begin_pull(site, worker)
    size = len(BIG)
    spans = [Span(0, 10), Span(-5), Span(size - 1), Span(7 * MIB, 7 * MIB + 100), Span(MIB, 9 * MIB), Span(11 * MIB)]
    got = await asyncio.gather(*(read_blob(worker.mirror, MIRRORED_REPO, DIGEST, span) for span in spans))
    for span, data in zip(spans, got, strict=True):
        start, stop = span.to_offsets(size)
        assert data == BIG[start:stop]
    with pytest.raises(RangeInvalid):
        await worker.mirror.open_blob(MIRRORED_REPO, DIGEST, Span(size))
    sent_once(site, DIGEST, size)


async def test_a_range_ahead_is_fetched_early(site: MirrorStore, worker: MirrorWorker) -> None:
    """A reader at the end of a large blob does not wait for all bytes before it."""
    await begin_pull(site, worker)
    gate = site.far.faults.gates[0] = threading.Event()  # the first connection brings nothing
    first = asyncio.create_task(read_blob(worker.mirror, MIRRORED_REPO, DIGEST, Span(0, 10)))
    async with asyncio.timeout(60):
        late = asyncio.create_task(read_blob(worker.mirror, MIRRORED_REPO, DIGEST, Span(11 * MIB, 11 * MIB + 5)))
        assert await late == BIG[11 * MIB : 11 * MIB + 5]
    gate.set()
    await first


async def test_headers_do_not_wait_for_the_body(site: MirrorStore, worker: MirrorWorker) -> None:
    """A cold blob is opened as soon as the upstream starts to send, and can be read up to the stored bytes."""
    await begin_pull(site, worker)
    gate = site.far.faults.gates[MIB] = threading.Event()
    reader = await worker.mirror.open_blob(MIRRORED_REPO, DIGEST)
    assert reader.descriptor.size == len(BIG)
    assert reader.file is not None
    at = 0
    while at < MIB:
        at = await reader.readable_until(at)
    assert at == MIB
    gate.set()
    assert await read(reader) == BIG


async def test_the_last_byte_waits_for_the_digest(site: MirrorStore, worker: MirrorWorker) -> None:
    """No reader gets a blob's last byte before the digest is checked, not even one that requests only that byte."""
    await begin_pull(site, worker)
    gate = site.far.faults.gates[len(BIG) - 1] = threading.Event()
    reader = await worker.mirror.open_blob(MIRRORED_REPO, DIGEST)
    tail = await worker.mirror.open_blob(MIRRORED_REPO, DIGEST, Span(-1))
    waiting = asyncio.create_task(tail.readable_until(len(BIG) - 1))
    at = 0
    while at < 12 * MIB:
        at = await reader.readable_until(at)
        assert at < len(BIG)
    assert not waiting.done()
    gate.set()
    assert await waiting == len(BIG)
    assert await worker.store.resolve_blob(MIRRORED_REPO, DIGEST)
    assert await read(reader) == BIG
    assert await read(tail) == BIG[-1:]


async def test_a_departed_client_ends_nothing(site: MirrorStore, worker: MirrorWorker) -> None:
    """A blob that a client has requested is fetched to its end, even if the client disconnects."""
    await begin_pull(site, worker)
    gate = site.far.faults.gates[MIB] = threading.Event()
    reader = await worker.mirror.open_blob(MIRRORED_REPO, DIGEST)
    await reader.aclose()
    await reader.aclose()
    gate.set()
    await stored(worker, DIGEST)
    sent_once(site, DIGEST, len(BIG))


async def test_no_ranges(site: MirrorStore, worker: MirrorWorker) -> None:
    """An upstream that ignores ranges is asked once, over one connection."""
    await begin_pull(site, worker)
    site.far.faults.ranges = False
    assert await read_blob(worker.mirror, MIRRORED_REPO, DIGEST) == BIG
    sent_once(site, DIGEST, len(BIG))
    assert site.far.most_at_once == 1


@pytest.mark.parametrize("size", [1000, 12 * MIB])
async def test_ranges_that_are_refused(site: MirrorStore, worker: MirrorWorker, size: int) -> None:
    """An upstream that answers a Range with an error is asked for the whole blob."""
    data = BIG[:size]
    await begin_pull(site, worker, data)
    site.far.faults.refuses_ranges = True
    assert await read_blob(worker.mirror, MIRRORED_REPO, digest_of(data)) == data
    sent_once(site, digest_of(data), size)


async def test_head_fetches_nothing(site: MirrorStore, worker: MirrorWorker) -> None:
    """HEAD of a blob that a manifest names sends no request upstream. For any other blob it asks whether the repository
    has it."""
    await begin_pull(site, worker)
    assert (await worker.mirror.resolve_blob(MIRRORED_REPO, DIGEST)).size == len(BIG)
    assert site.far.calls == {"get manifest": 1}
    loose = site.far.add_blob(UPSTREAM_REPO, b"named by no manifest here")
    assert (await worker.mirror.resolve_blob(MIRRORED_REPO, loose.digest)).size == loose.size
    assert site.far.calls == {"get manifest": 1, "head blob": 1}


async def test_a_stop_keeps_what_came(site: MirrorStore) -> None:
    """If a server stops during a fill, the responses to its readers are cut off. After the next start, only the missing
    bytes are fetched."""
    async with site.worker() as worker:
        await begin_pull(site, worker)
        site.far.faults.gates[MIB] = threading.Event()
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
    site.far.closed = False
    site.far.faults.gates.clear()
    async with site.worker() as worker:
        assert await read_blob(worker.mirror, MIRRORED_REPO, DIGEST) == BIG
    sent_once(site, DIGEST, len(BIG))
