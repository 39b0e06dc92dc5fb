"""Blobs that a mirror passes on to a client without storing them, because the disk is full."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Collection, Iterator
from contextlib import AsyncExitStack, aclosing
from pathlib import Path

import pytest

from registry.memory_budget import MemoryBudget
from registry.mirror import pass_through
from registry.mirror.fill import slot_holders, slots
from registry.mirror.fill.retry import AvoidedEndpoints
from registry.mirror.fill.slots import ConnectionSlots
from registry.mirror.pass_through import (
    CHUNK_BYTES,
    MAX_BUFFERED_BYTES,
    READER_BYTES,
    PassThroughReader,
    new_pass_through_memory,
)
from registry.mirror.upstream_client import BlobSink, RangesUnsupported, UpstreamClient
from registry.single_flight import cancel_and_wait
from storage.content import Span
from storage.data_dir.file_leases import FileLeases
from storage.data_dir.system import System
from storage.errors import (
    BlobUnknown,
    DigestInvalid,
    StorageFull,
    TooManyRequests,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from storage.names import Digest, RepositoryName
from tests.unit.registry.conftest import wait_until

APP = RepositoryName("library/app")


class Sender:
    """An upstream that sends `data` in pieces of `piece` bytes. It calls the sink in a thread, as the real client does.
    After the last piece, it raises `error`, if there is one. `size`: the size that it states for the blob.
    `range_error`: what it raises for each request for a part of the blob. `connections`: number of its slots."""

    name = "hub"

    def __init__(
        self,
        data: bytes,
        piece: int = 1000,
        *,
        size: int | None = None,
        error: Exception | None = None,
        range_error: Exception | None = None,
        connections: int = 8,
    ) -> None:
        self.data = data
        self.piece = piece
        self.size = len(data) if size is None else size
        self.error = error
        self.range_error = range_error
        self.connections = connections
        self.sent = 0
        self.requested_spans: list[Span] = []
        self.expected_sizes: set[int | None] = set()
        self.is_done = threading.Event()
        self.pause_at: int | None = None  # offset before which it waits for `resumed`
        self.resumed = threading.Event()

    async def fetch_blob(
        self,
        repo: RepositoryName,
        digest: Digest,
        span: Span,
        sink: BlobSink,
        avoid: Collection[str] = (),
        untrusted: Collection[str] = (),
        expected_size: int | None = None,
    ) -> None:
        self.expected_sizes.add(expected_size)
        self.requested_spans.append(span)
        if span != Span(0) and self.range_error is not None:
            raise self.range_error
        await asyncio.to_thread(self._send, sink, *(span.to_offsets(self.size) if self.size else (0, 0)))

    def _send(self, sink: BlobSink, start: int, stop: int) -> None:
        sink.begin("https://hub", start, stop, self.size)
        for offset in range(start, min(stop, len(self.data)), self.piece):
            if offset == self.pause_at:
                self.resumed.wait(60)
            piece = self.data[offset : min(offset + self.piece, stop)]
            sink.take(offset, memoryview(piece))
            self.sent += len(piece)
        self.is_done.set()
        if self.error is not None:
            raise self.error


class Site:
    """A mirror of one upstream, for which readers are opened. `corrupt_senders`: the endpoints that readers have
    reported because they sent corrupt bytes."""

    def __init__(self, leases: FileLeases) -> None:
        self._leases = leases
        self.corrupt_senders: list[str] = []

    def reader_of(
        self,
        sender: Sender,
        span: tuple[int, int] | None = None,
        expected: bytes | None = None,
        memory: MemoryBudget | None = None,
        *,
        digest: Digest | None = None,
        avoided: AvoidedEndpoints | None = None,
    ) -> PassThroughReader:
        """Returns a reader of the blob, or of its range `span`. `expected`: the content from which the blob's size and
        digest are made; None: what the sender sends."""
        content = sender.data if expected is None else expected
        digest = digest or Digest(f"sha256:{hashlib.sha256(content).hexdigest()}")

        async def on_corrupt(endpoint: str) -> None:
            self.corrupt_senders.append(endpoint)

        upstream: UpstreamClient = sender  # type: ignore[assignment]
        return PassThroughReader(
            upstream,
            ConnectionSlots(self._leases, upstream),
            APP,
            (digest, len(content)),
            span or (0, len(content)),
            avoided or AvoidedEndpoints(),
            memory or new_pass_through_memory(),
            on_corrupt=on_corrupt,
        )


def open_site(folder: Path) -> Iterator[Site]:
    leases = FileLeases(folder / "leases", System())
    yield Site(leases)
    leases.close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    yield from open_site(tmp_path)


@pytest.fixture
def other_site(tmp_path: Path) -> Iterator[Site]:
    """The same mirror in another worker: it shares the connection slots with `site`."""
    yield from open_site(tmp_path)


@pytest.fixture
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """While another request waits for a slot, each reader that waits for its client is cut off within milliseconds."""
    monkeypatch.setattr(slots, "MARK_SECONDS", 0.0)
    monkeypatch.setattr(slot_holders, "SLOW_SLOT_SECONDS", 0.0)
    monkeypatch.setattr(slot_holders, "SLOW_POLL_SECONDS", 0.01)


async def read_all(reader: PassThroughReader) -> bytes:
    """Reads all bytes of a reader that was started."""
    return b"".join([chunk async for chunk in reader])


async def read(reader: PassThroughReader) -> bytes:
    """Reads all bytes. If the reader raises an error, the number of bytes that were read is added to it as a note."""
    received = b""
    try:
        await reader.start()
        async for chunk in reader:
            received += chunk
    except Exception as error:
        error.add_note(str(len(received)))
        raise
    finally:
        await reader.aclose()
    return received


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 100_000])
async def test_all_bytes_reach_the_client(site: Site, size: int) -> None:
    """The client gets all bytes of a blob of any size."""
    data = bytes(index % 251 for index in range(size))
    assert await read(site.reader_of(Sender(data))) == data


@pytest.mark.parametrize("span", [(0, 1), (0, 999), (500, 2500), (2999, 3000), (1000, 3000)])
async def test_the_client_gets_the_requested_range(site: Site, span: tuple[int, int]) -> None:
    """A client that requests a range gets the bytes of this range."""
    data = bytes(index % 251 for index in range(3000))
    assert await read(site.reader_of(Sender(data), span)) == data[slice(*span)]


@pytest.mark.parametrize(
    ("span", "requested"),
    [
        ((0, 1), Span(0, 1)),
        ((500, 2500), Span(500, 2500)),
        ((2998, 2999), Span(2998, 2999)),
        ((2999, 3000), Span(0)),
        ((0, 3000), Span(0)),
    ],
)
async def test_only_a_range_with_the_last_byte_needs_the_whole_blob(
    site: Site, span: tuple[int, int], requested: Span
) -> None:
    """The upstream is asked only for the range that the client requests. If the range contains the last byte, the whole
    blob is requested, because the digest has to be verified before that byte is sent."""
    sender = Sender(bytes(3000))
    assert await read(site.reader_of(sender, span)) == bytes(span[1] - span[0])
    assert sender.requested_spans == [requested]


@pytest.mark.parametrize("error", [RangesUnsupported(), UpstreamUnavailable("the upstream answers 416")])
async def test_range_of_an_upstream_that_sends_only_whole_blobs(site: Site, error: Exception) -> None:
    """If the upstream ignores or refuses ranges, the whole blob is requested instead."""
    data = bytes(index % 251 for index in range(3000))
    sender = Sender(data, range_error=error)
    assert await read(site.reader_of(sender, (500, 700))) == data[500:700]
    assert sender.requested_spans == [Span(500, 700), Span(0)]
    assert sender.expected_sizes == {sender.size}  # for an upstream that does not state it


@pytest.mark.parametrize("error", [UpstreamTimeout(), TooManyRequests("later"), BlobUnknown()])
async def test_failed_range_request_is_not_repeated(site: Site, error: Exception) -> None:
    """After a timeout, a rate limit or an unknown blob, the whole blob is not requested."""
    sender = Sender(bytes(3000), range_error=error)
    with pytest.raises(type(error)):
        await read(site.reader_of(sender, (500, 700)))
    assert sender.requested_spans == [Span(500, 700)]


@pytest.mark.parametrize("piece", [1, 1000, 5000])
async def test_client_does_not_get_the_last_byte_of_corrupt_bytes(site: Site, piece: int) -> None:
    """If the bytes from the upstream do not have the blob's digest, the client gets an error instead of the last
    byte."""
    with pytest.raises(DigestInvalid) as failed:
        await read(site.reader_of(Sender(b"x" * 2000, piece), expected=b"y" * 2000))
    assert failed.value.__notes__ == ["1999"]
    assert site.corrupt_senders == ["https://hub"]


async def test_empty_blob_with_another_digest_is_refused(site: Site) -> None:
    """If a blob has no bytes although its digest is not that of an empty blob, the client gets no response with status
    200, and the endpoint counts as one that sent corrupt bytes."""
    with pytest.raises(DigestInvalid):
        await site.reader_of(Sender(b""), digest=Digest(f"sha256:{hashlib.sha256(b'x').hexdigest()}")).start()
    assert site.corrupt_senders == ["https://hub"]


async def test_refused_endpoint_sends_no_bytes(site: Site) -> None:
    """No bytes are accepted from an endpoint that has sent corrupt bytes several times."""
    refusal = UpstreamUnavailable("it sent wrong bytes", retry_after=7)
    with pytest.raises(UpstreamUnavailable, match="sent wrong bytes") as refused:
        await read(site.reader_of(Sender(b"123"), avoided=AvoidedEndpoints(untrusted={"https://hub": refusal})))
    assert refused.value.__notes__ == ["0"]


async def test_errors_of_the_upstream(site: Site) -> None:
    """The client gets an error if the upstream fails before the first byte or in the middle, states a wrong size, or
    sends too few bytes."""
    error = UpstreamUnavailable("broken")
    with pytest.raises(UpstreamUnavailable, match="broken"):
        await read(site.reader_of(Sender(b"", size=5, error=error), expected=b"12345"))
    with pytest.raises(UpstreamUnavailable, match="broken"):
        await read(site.reader_of(Sender(b"123", size=5, error=error), expected=b"12345"))
    with pytest.raises(UpstreamUnavailable, match="has a blob of 3 bytes; 5 bytes were expected"):
        await read(site.reader_of(Sender(b"123"), expected=b"12345"))
    with pytest.raises(UpstreamUnavailable, match="sent only a part"):
        await read(site.reader_of(Sender(b"123", size=5), expected=b"12345"))


async def test_memory_for_a_slow_client_is_limited(site: Site) -> None:
    """Bytes are received from the upstream only as fast as the client receives them, so only a limited number of bytes
    is in memory. When the client disconnects, no more bytes are received."""
    sender = Sender(bytes(8 * MAX_BUFFERED_BYTES), 100_000)
    reader = site.reader_of(sender)
    await reader.start()
    chunks = aiter(reader)
    assert len(await anext(chunks)) == 100_000
    await reader.aclose()
    assert sender.sent <= MAX_BUFFERED_BYTES + 2 * 100_000


async def test_memory_for_tiny_pieces_is_limited(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the upstream sends a few bytes at a time, each piece counts as more bytes than it has, because it takes more
    memory. All bytes reach the client."""
    monkeypatch.setattr(pass_through, "MAX_BUFFERED_BYTES", 10_000)
    sender = Sender(bytes(1000), 1)
    reader = site.reader_of(sender)
    await reader.start()
    chunks = aiter(reader)
    received = [await anext(chunks)]
    await asyncio.to_thread(sender.is_done.wait, 0.2)  # returns at the timeout, because the sender waits for the client
    assert sender.sent <= 10_000 // 64
    async for chunk in chunks:
        received.append(chunk)
    await reader.aclose()
    assert b"".join(received) == sender.data


async def test_a_large_read_is_divided_into_chunks(site: Site) -> None:
    """The client gets no more than `CHUNK_BYTES` at once, although the upstream client receives more at once."""
    reader = site.reader_of(Sender(bytes(5 * CHUNK_BYTES), 3 * CHUNK_BYTES))
    await reader.start()
    sizes = [len(chunk) async for chunk in reader]
    await reader.aclose()
    assert sum(sizes) == 5 * CHUNK_BYTES
    assert max(sizes) == CHUNK_BYTES


@pytest.mark.parametrize("size", [CHUNK_BYTES, 8 * MAX_BUFFERED_BYTES])
async def test_memory_of_all_readers_is_limited(site: Site, size: int) -> None:
    """All readers of a worker share a budget. If it is used up, a further reader is refused. Each reader holds its
    share until it is closed, also if its download has ended, because its client may not have received the bytes."""
    share_bytes = min(2 * size, READER_BYTES)
    memory = MemoryBudget(4 * share_bytes, "blobs", wait_seconds=0.05)  # large shares may use three quarters of it
    readers = [site.reader_of(Sender(bytes(size), CHUNK_BYTES), memory=memory) for _ in range(5)]
    for reader in readers[:3]:
        await reader.start()
    assert memory.used == 3 * share_bytes
    with pytest.raises(TooManyRequests):
        await readers[3].start()
    await readers[3].aclose()
    await readers[0].aclose()
    await readers[4].start()
    assert memory.used == 3 * share_bytes
    for reader in readers:
        await reader.aclose()
    assert memory.used == 0


async def test_slow_client_is_cut_off_while_another_reader_waits_for_memory(site: Site) -> None:
    """A reader whose client does not receive the bytes loses its memory to a reader that waits for memory. Its
    iteration then ends with an error. The other reader gets all bytes."""
    size = MAX_BUFFERED_BYTES
    memory = MemoryBudget(READER_BYTES, "blobs", wait_seconds=30, slow_seconds=0.0)
    slow, other = (site.reader_of(Sender(bytes(size), CHUNK_BYTES), memory=memory) for _ in range(2))
    await slow.start()
    chunks = aiter(slow)
    assert len(await anext(chunks)) == CHUNK_BYTES
    assert await read(other) == bytes(size)
    with pytest.raises(TooManyRequests, match="too slowly"):
        await anext(chunks)
    await slow.aclose()
    assert memory.used == 0


@pytest.mark.usefixtures("no_patience")
@pytest.mark.parametrize("connections", [1, 2, 5])
@pytest.mark.parametrize("is_other_worker", [False, True])
async def test_slow_client_is_cut_off_while_another_request_waits_for_a_connection(
    site: Site, other_site: Site, connections: int, is_other_worker: bool
) -> None:
    """Clients that receive nothing hold connections to the upstream. Such a client is cut off as soon as another
    request, in any worker, waits for a connection. The other request then gets its bytes."""
    data = bytes(4 * MAX_BUFFERED_BYTES)
    sender = Sender(data, CHUNK_BYTES, connections=connections)
    # Readers of large blobs leave two connections free, if there are more than two.
    slow = [site.reader_of(sender) for _ in range(max(connections - 2, 1))]
    async with AsyncExitStack() as stack:
        for reader in slow:
            await stack.enter_async_context(aclosing(reader))
            await reader.start()
        assert await read((other_site if is_other_worker else site).reader_of(sender)) == data
        outcomes = await asyncio.gather(*(read_all(reader) for reader in slow), return_exceptions=True)
        assert any(isinstance(outcome, TooManyRequests) for outcome in outcomes)
        assert all(outcome == data or isinstance(outcome, TooManyRequests) for outcome in outcomes)


@pytest.mark.usefixtures("no_patience")
async def test_slow_client_is_not_cut_off_while_connections_are_free(site: Site) -> None:
    """A slow client that holds the last connection for large blobs gets all bytes if no other request needs the
    connection."""
    data = bytes(4 * MAX_BUFFERED_BYTES)
    slow = site.reader_of(Sender(data, CHUNK_BYTES, connections=1))
    await slow.start()
    await asyncio.sleep(10 * slot_holders.SLOW_POLL_SECONDS)
    assert b"".join([chunk async for chunk in slow]) == data
    await slow.aclose()


async def test_large_blobs_leave_connections_free_for_small_blobs(site: Site) -> None:
    """Slow clients of large blobs do not take all connections. Blobs that fit in the buffer still get one, because
    their connection does not wait for the client."""
    sender = Sender(bytes(4 * MAX_BUFFERED_BYTES), CHUNK_BYTES, connections=4)
    async with AsyncExitStack() as stack:
        large = [await stack.enter_async_context(aclosing(site.reader_of(sender))) for _ in range(4)]
        for reader in large[:2]:
            await reader.start()
        waiting = [asyncio.create_task(reader.start()) for reader in large[2:]]
        assert await read(site.reader_of(Sender(b"{}", connections=4))) == b"{}"
        assert await read(site.reader_of(sender, (5, 6))) == b"\0"
        assert not any(task.done() for task in waiting)
        await cancel_and_wait(waiting)


@pytest.mark.usefixtures("no_patience")
async def test_client_is_not_cut_off_while_the_upstream_pauses(site: Site, other_site: Site) -> None:
    """The upstream pauses in the middle of a blob, and the client has received all bytes so far. The client then does
    not count as slow, although other requests wait for memory and for the connection. It gets all bytes."""
    data = bytes(4 * MAX_BUFFERED_BYTES)
    memory = MemoryBudget(READER_BYTES, "blobs", wait_seconds=0.05, slow_seconds=0.0)
    sender = Sender(data, CHUNK_BYTES, connections=1)
    sender.pause_at = CHUNK_BYTES
    reader = site.reader_of(sender, memory=memory)
    await reader.start()
    reading = asyncio.create_task(read_all(reader))
    waiting = asyncio.create_task(read(other_site.reader_of(Sender(data, CHUNK_BYTES, connections=1))))
    await wait_until(reader._slots.has_waiting_request)
    with pytest.raises(TooManyRequests):  # after several checks for slow clients
        await memory.new_share().grow(READER_BYTES)
    await asyncio.sleep(10 * slot_holders.SLOW_POLL_SECONDS)
    assert not reading.done()
    sender.resumed.set()
    async with aclosing(reader):
        assert await reading == data
    assert await waiting == data


@pytest.mark.slow
async def test_client_that_receives_chunks_is_not_cut_off(site: Site) -> None:
    """A reader whose client has just received a chunk counts as fast, however long ago its download began."""
    memory = MemoryBudget(READER_BYTES, "blobs", wait_seconds=0.5, slow_seconds=60)
    reader = site.reader_of(Sender(bytes(8 * CHUNK_BYTES), CHUNK_BYTES), memory=memory)
    await reader.start()
    (share,) = memory._shares
    share.last_progress_at -= 1000
    chunks = aiter(reader)
    received = len(await anext(chunks)) + len(await anext(chunks))
    with pytest.raises(TooManyRequests):
        await memory.new_share().grow(READER_BYTES)
    received += sum([len(chunk) async for chunk in chunks])
    await reader.aclose()
    assert received == 8 * CHUNK_BYTES


async def test_a_blob_that_is_passed_through_cannot_be_waited_for(site: Site) -> None:
    """A caller that waits until the blob is in the store, such as a mount, gets the error that the disk is full."""
    reader = site.reader_of(Sender(b"123"))
    with pytest.raises(StorageFull):
        await reader.readable_until(2)
    await reader.aclose()
