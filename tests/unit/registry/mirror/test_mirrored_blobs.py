"""Blobs through the mirror: one fill for all readers, over all workers."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator
from itertools import pairwise

import pytest

from registry.mirror.fill import pieces
from registry.mirror.upstream_client import UnconfirmedBlobUnknown
from storage.content import Span, digest_of
from storage.errors import (
    BlobUnknown,
    ManifestUnknown,
    RangeInvalid,
    RegistryError,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from storage.interface import BlobReader
from storage.names import Digest, Reference, RepositoryName, Tag
from tests.fakes.mirror_source import missing_digest
from tests.fakes.registry_content import descriptor_of, image_of, push_blob, read_blob
from tests.unit.registry.mirror.conftest import (
    MIRRORED_REPO,
    UPSTREAM_REPO,
    MirrorStore,
    MirrorWorker,
    source_of_another_worker,
    wait_until,
)

pytestmark = pytest.mark.slow

MIB = 1 << 20
BIG = random.Random(4).randbytes(12 * MIB + 12345)
DIGEST = digest_of(BIG)
OTHER = RepositoryName("docker.io/library/other")


@pytest.fixture
async def worker(site: MirrorStore) -> AsyncIterator[MirrorWorker]:
    async with site.worker() as opened:
        yield opened


async def begun(site: MirrorStore, worker: MirrorWorker, *layers: bytes) -> None:
    """An image whose manifest was pulled."""
    site.far.add_image(UPSTREAM_REPO, *(layers or (BIG,)))
    await worker.mirror.get_manifest(MIRRORED_REPO, Tag("1"))


async def read(reader: BlobReader) -> bytes:
    try:
        return b"".join([chunk async for chunk in reader])
    finally:
        await reader.aclose()


def sent_once(site: MirrorStore, digest: Digest, size: int) -> None:
    """Checks that the upstream sent every byte once."""
    spans = sorted(site.far.sent[digest])
    assert spans[0][0] == 0
    assert spans[-1][1] == size
    assert all(one[1] == two[0] for one, two in pairwise(spans))


@pytest.mark.parametrize("size", [0, 1, 2, 1000, 65536, 65537, 3 * MIB, 12 * MIB])
async def test_sizes(site: MirrorStore, worker: MirrorWorker, size: int) -> None:
    """A blob of any size arrives intact, is stored, and is sent once by the upstream."""
    data = BIG[:size]
    await begun(site, worker, data)
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
    """Any range of a cold blob can be read at once. Together the ranges cost each byte once."""
    await begun(site, worker)
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
    await begun(site, worker)
    gate = site.far.faults.gates[0] = threading.Event()  # the first connection brings nothing
    first = asyncio.create_task(read_blob(worker.mirror, MIRRORED_REPO, DIGEST, Span(0, 10)))
    async with asyncio.timeout(60):
        late = asyncio.create_task(read_blob(worker.mirror, MIRRORED_REPO, DIGEST, Span(11 * MIB, 11 * MIB + 5)))
        assert await late == BIG[11 * MIB : 11 * MIB + 5]
    gate.set()
    await first


async def test_headers_do_not_wait_for_the_body(site: MirrorStore, worker: MirrorWorker) -> None:
    """A cold blob is opened as soon as the upstream starts to send, and can be read up to the stored bytes."""
    await begun(site, worker)
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
    await begun(site, worker)
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
    """A blob that a client requested is fetched to its end, also after the client has disconnected."""
    await begun(site, worker)
    gate = site.far.faults.gates[MIB] = threading.Event()
    reader = await worker.mirror.open_blob(MIRRORED_REPO, DIGEST)
    await reader.aclose()
    await reader.aclose()
    gate.set()
    await stored(worker, DIGEST)
    sent_once(site, DIGEST, len(BIG))


async def stored(worker: MirrorWorker, digest: Digest, repo: RepositoryName = MIRRORED_REPO) -> None:
    """Waits until the blob is in the store."""
    async with asyncio.timeout(60):
        while True:
            try:
                await worker.store.resolve_blob(repo, digest)
            except BlobUnknown:
                await asyncio.sleep(0.001)
            else:
                return


async def test_no_ranges(site: MirrorStore, worker: MirrorWorker) -> None:
    """An upstream that ignores ranges is asked once, over one connection."""
    await begun(site, worker)
    site.far.faults.ranges = False
    assert await read_blob(worker.mirror, MIRRORED_REPO, DIGEST) == BIG
    sent_once(site, DIGEST, len(BIG))
    assert site.far.most_at_once == 1


@pytest.mark.parametrize("size", [1000, 12 * MIB])
async def test_ranges_that_are_refused(site: MirrorStore, worker: MirrorWorker, size: int) -> None:
    """An upstream that answers a Range with an error is asked for the whole blob."""
    data = BIG[:size]
    await begun(site, worker, data)
    site.far.faults.refuses_ranges = True
    assert await read_blob(worker.mirror, MIRRORED_REPO, digest_of(data)) == data
    sent_once(site, digest_of(data), size)


async def test_one_slow_connection_does_not_hold_a_blob_up(
    site: MirrorStore, worker: MirrorWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When all other bytes are stored, the rest of a piece on a nearly stalled connection is fetched over another one.
    No stored byte is fetched again."""
    monkeypatch.setattr(pieces, "STRAGGLER_WINDOW_SECONDS", 0.2)
    await begun(site, worker)
    gate = site.far.faults.gates[MIB] = threading.Event()

    def again(digest: Digest) -> None:
        if any(span.start == MIB for span in site.far.asked[digest]):
            gate.set()

    site.far.on_fetch = again
    async with asyncio.timeout(60):
        assert await read_blob(worker.mirror, MIRRORED_REPO, DIGEST) == BIG
    sent_once(site, DIGEST, len(BIG))


async def test_connections_are_bounded(site: MirrorStore, worker: MirrorWorker) -> None:
    """Any number of blobs at a time use no more connections than the settings allow, and all of them arrive."""
    site.far.connections = 3
    layers = [BIG[start : start + 9 * MIB] for start in range(0, 6000, 1000)]
    await begun(site, worker, *layers)
    got = await asyncio.gather(*(read_blob(worker.mirror, MIRRORED_REPO, digest_of(layer)) for layer in layers))
    assert got == layers
    assert site.far.most_at_once <= 3


async def test_one_blob_does_not_keep_the_connections(site: MirrorStore, worker: MirrorWorker) -> None:
    """A large blob may use all connections. A second blob that a client requests gets one after the next piece."""
    site.far.connections = 2
    small = BIG[1 : 3 * MIB]
    await begun(site, worker, BIG, small)
    first, second = (site.far.faults.gates.setdefault(at * MIB, threading.Event()) for at in (3, 5))
    reader = await worker.mirror.open_blob(MIRRORED_REPO, DIGEST)
    await wait_until(lambda: site.far.at_once == 2)
    other = asyncio.create_task(read_blob(worker.mirror, MIRRORED_REPO, digest_of(small)))
    second.set()
    assert await other == small
    first.set()
    assert await read(reader) == BIG
    assert site.far.most_at_once == 2


async def test_head_fetches_nothing(site: MirrorStore, worker: MirrorWorker) -> None:
    """HEAD of a blob that a manifest names sends no request upstream. For any other blob it asks whether the repository
    has it."""
    await begun(site, worker)
    assert (await worker.mirror.resolve_blob(MIRRORED_REPO, DIGEST)).size == len(BIG)
    assert site.far.calls == {"get manifest": 1}
    loose = site.far.add_blob(UPSTREAM_REPO, b"named by no manifest here")
    assert (await worker.mirror.resolve_blob(MIRRORED_REPO, loose.digest)).size == loose.size
    assert site.far.calls == {"get manifest": 1, "head blob": 1}


async def test_unknown_blobs(site: MirrorStore, worker: MirrorWorker) -> None:
    """A blob that the upstream does not have is unknown. No worker asks for it again for a short time."""
    async with site.worker() as other:
        for _ in range(2):
            for mirror in (worker.mirror, other.mirror):
                with pytest.raises(BlobUnknown):
                    await mirror.open_blob(MIRRORED_REPO, missing_digest())
                with pytest.raises(BlobUnknown):
                    await mirror.resolve_blob(MIRRORED_REPO, missing_digest())
        assert site.far.calls == {"head blob": 1}
        site.clock.now += 61
        with pytest.raises(BlobUnknown):
            await worker.mirror.open_blob(MIRRORED_REPO, missing_digest())
        assert site.far.calls == {"head blob": 2}


async def test_a_manifest_names_what_is_not_there(site: MirrorStore, worker: MirrorWorker) -> None:
    """A blob that a manifest names and the upstream does not have is reported as unknown before any header is sent."""
    await begun(site, worker)
    del site.far.blobs[UPSTREAM_REPO, DIGEST]
    for _ in range(2):
        with pytest.raises(BlobUnknown):
            await worker.mirror.open_blob(MIRRORED_REPO, DIGEST)
    assert site.far.calls["get blob"] == 1


async def test_no_manifest_hides_a_blob(site: MirrorStore, worker: MirrorWorker) -> None:
    """Unknown manifests, by tag or digest, never make a blob of the repository unknown."""
    await begun(site, worker)
    names = [Tag(f"{before}{DIGEST.algorithm}{dot}{DIGEST.encoded}") for before in ("_blob.", "blob.") for dot in ".-_"]
    references: list[Reference] = [DIGEST, *names]
    for reference in references:
        with pytest.raises(ManifestUnknown):
            await worker.mirror.get_manifest(MIRRORED_REPO, reference)
    assert await read_blob(worker.mirror, MIRRORED_REPO, DIGEST) == BIG


async def test_what_is_hosted_here_is_not_given_out(site: MirrorStore, worker: MirrorWorker) -> None:
    """A blob of a hosted repository or of another upstream cannot be read through a mirrored repository, even if a
    manifest there names its digest. If the upstream has the blob, it sends it itself."""
    await push_blob(worker.store, RepositoryName("team/secret"), BIG)
    await push_blob(worker.store, RepositoryName("docker.io.example/secret"), BIG)
    with pytest.raises(BlobUnknown):
        await worker.mirror.open_blob(MIRRORED_REPO, DIGEST)
    await begun(site, worker)
    del site.far.blobs[UPSTREAM_REPO, DIGEST]
    site.clock.now += 61
    with pytest.raises(BlobUnknown):
        await worker.mirror.open_blob(MIRRORED_REPO, DIGEST)
    site.clock.now += 61
    site.far.add_blob(UPSTREAM_REPO, BIG)
    assert await read_blob(worker.mirror, MIRRORED_REPO, DIGEST) == BIG
    sent_once(site, DIGEST, len(BIG))
    await stored(worker, DIGEST, MIRRORED_REPO)


async def test_repositories_of_one_upstream_share_what_is_stored(site: MirrorStore, worker: MirrorWorker) -> None:
    """A stored blob is served from another repository of the upstream whose manifest names it, without fetching it
    again; but not from one that does not have it, as the upstream says."""
    await begun(site, worker)
    assert await read_blob(worker.mirror, MIRRORED_REPO, DIGEST) == BIG
    await stored(worker, DIGEST, MIRRORED_REPO)
    with pytest.raises(BlobUnknown):
        await worker.mirror.open_blob(RepositoryName("docker.io/library/third"), DIGEST)
    site.far.add_image("library/other", BIG)
    await worker.mirror.get_manifest(OTHER, Tag("1"))
    assert await read_blob(worker.mirror, OTHER, DIGEST) == BIG
    sent_once(site, DIGEST, len(BIG))


@pytest.mark.parametrize("private", [False, True])
async def test_what_is_stored_is_shared_on_a_full_disk(site: MirrorStore, private: bool) -> None:
    """A repository can read a stored blob it is entitled to although the link cannot be recorded."""
    site.configure(require_grant=private)
    site.far.add_image(UPSTREAM_REPO, BIG)
    site.far.add_image("library/other", BIG)
    async with site.worker() as worker:
        for repo in (MIRRORED_REPO, OTHER):
            await worker.mirror.get_manifest(repo, Tag("1"))
        assert await read_blob(worker.mirror, MIRRORED_REPO, DIGEST) == BIG
        site.disk.full = True
        assert await read_blob(worker.mirror, OTHER, DIGEST) == BIG
        site.disk.full = False
    sent_once(site, DIGEST, len(BIG))


async def test_a_private_upstream_is_asked_for_each_repository(site: MirrorStore) -> None:
    """The upstream is asked once for each repository, over all readers and workers, before a reader joins a fill of
    another repository."""
    site.configure(require_grant=True)
    site.far.add_image(UPSTREAM_REPO, BIG)
    site.far.add_image("library/other", BIG)
    third = RepositoryName("docker.io/library/third")
    site.far.add_manifest(
        "library/third", image_of(site.far.add_blob("library/third", b"{}"), [descriptor_of(BIG)]), "1"
    )
    gate = site.far.faults.gates[MIB] = threading.Event()
    async with site.worker() as one, site.worker(source_of_another_worker(site)) as two:
        for repo in (MIRRORED_REPO, OTHER, third):
            await one.mirror.get_manifest(repo, Tag("1"))
        first = await one.mirror.open_blob(MIRRORED_REPO, DIGEST)
        for worker in (one, two):
            with pytest.raises(BlobUnknown):
                await worker.mirror.open_blob(third, DIGEST)
            with pytest.raises(BlobUnknown):
                await worker.mirror.resolve_blob(third, DIGEST)
        reading = [
            asyncio.create_task(read_blob(one.mirror, repo, DIGEST))
            for repo in (MIRRORED_REPO, OTHER, OTHER, MIRRORED_REPO)
        ]
        await wait_until(lambda: site.far.calls["head blob"] == 3)
        gate.set()
        assert await asyncio.gather(read(first), *reading) == [BIG] * 5
        site.far.faults.down = UpstreamUnavailable()
        for worker in (one, two):
            for repo in (MIRRORED_REPO, OTHER):
                assert await read_blob(worker.mirror, repo, DIGEST) == BIG
        assert site.far.calls["head blob"] == 3
    sent_once(site, DIGEST, len(BIG))


@pytest.mark.parametrize("stored", [True, False])
async def test_a_size_that_is_not_the_blob_s_entitles_nobody(site: MirrorStore, stored: bool) -> None:
    """For a repository that may not have the blob, the upstream redirects to a login page: 200, with that page's
    length. This opens neither the stored blob nor a running fill of another repository."""
    site.configure(require_grant=True)
    site.far.add_image(UPSTREAM_REPO, BIG)
    page = b"<html>log in</html>"
    site.far.add_manifest(
        "library/other", image_of(site.far.add_blob("library/other", b"{}"), [descriptor_of(BIG)]), "1"
    )
    site.far.blobs["library/other", DIGEST] = page
    gate = threading.Event()
    async with site.worker() as worker:
        for repo in (MIRRORED_REPO, OTHER):
            await worker.mirror.get_manifest(repo, Tag("1"))
        if stored:
            assert await read_blob(worker.mirror, MIRRORED_REPO, DIGEST) == BIG
        else:
            site.far.faults.gates[MIB] = gate
            first = await worker.mirror.open_blob(MIRRORED_REPO, DIGEST)
        assert not (await worker.mirror.resolve_blob(OTHER, DIGEST)).verified
        with pytest.raises(RegistryError):
            await read_blob(worker.mirror, OTHER, DIGEST)
        assert not await worker.store.records.is_confirmed(OTHER, DIGEST)
        if not stored:
            gate.set()
            assert await read(first) == BIG
            with pytest.raises(RegistryError):
                await read_blob(worker.mirror, OTHER, DIGEST)
        assert not await worker.store.records.is_confirmed(OTHER, DIGEST)
        assert await worker.store.records.is_confirmed(MIRRORED_REPO, DIGEST)


async def test_a_doubtful_no_is_not_remembered(site: MirrorStore, worker: MirrorWorker) -> None:
    """When a firewall answers for the upstream, the client gets "unknown" and the next request asks again, for the size
    and for the blob."""
    site.far.faults.down = UnconfirmedBlobUnknown()
    loose = site.far.add_blob(UPSTREAM_REPO, b"named by no manifest here")
    with pytest.raises(UnconfirmedBlobUnknown):
        await worker.mirror.open_blob(MIRRORED_REPO, loose.digest)
    site.far.faults.down = None
    assert await read_blob(worker.mirror, MIRRORED_REPO, loose.digest) == b"named by no manifest here"
    await begun(site, worker)
    site.far.faults.down = UnconfirmedBlobUnknown()
    with pytest.raises(UnconfirmedBlobUnknown):
        await worker.mirror.open_blob(MIRRORED_REPO, DIGEST)
    site.far.faults.down = None
    assert await read_blob(worker.mirror, MIRRORED_REPO, DIGEST) == BIG


async def test_two_repositories_share_a_fill(site: MirrorStore, worker: MirrorWorker) -> None:
    """A layer requested in two repositories at once is fetched once and stored for both."""
    await begun(site, worker)
    site.far.add_image("library/other", BIG)
    await worker.mirror.get_manifest(OTHER, Tag("1"))
    got = await asyncio.gather(*(read_blob(worker.mirror, repo, DIGEST) for repo in (MIRRORED_REPO, OTHER)))
    assert got == [BIG, BIG]
    for repo in (MIRRORED_REPO, OTHER):
        await stored(worker, DIGEST, repo)
    sent_once(site, DIGEST, len(BIG))


async def test_a_stop_keeps_what_came(site: MirrorStore) -> None:
    """A server that stops during a fill cuts its readers. After the next start only the missing bytes are fetched."""
    async with site.worker() as worker:
        await begun(site, worker)
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
    """A request for a blob that waits for a connection is answered in time. The blob follows when there is a
    connection."""
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
    """The client gets an error in time also if the upstream does not answer the question for the size."""
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
    """The client gets an error before it gives up. Bytes that arrive later are kept."""
    site.start_timeout = 0.5
    data = BIG[:size]
    stall = site.far.faults.stall = asyncio.Event()
    async with site.worker() as worker:
        await begun(site, worker, data)
        with pytest.raises(UpstreamTimeout):
            await worker.mirror.open_blob(MIRRORED_REPO, digest_of(data))
        stall.set()
        await wait_until(lambda: not worker.mirror.running_fills)
        assert await read_blob(worker.mirror, MIRRORED_REPO, digest_of(data)) == data
    sent_once(site, digest_of(data), size)
