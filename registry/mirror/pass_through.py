"""Sends a blob from the upstream to one client without storing the blob (`PassThroughReader`). The mirror does this if
the disk is too full for the blob.

The bytes arrive in a thread, which waits while the client is slower than the upstream. If the upstream closes the
connection meanwhile, the response ends early. The client can then request the remaining bytes with a `Range` header.

The client gets the last byte of the blob only after the blob's digest is verified. So a request for the last byte
downloads the whole blob. A request for other bytes downloads only these bytes, and does not verify them.

A download holds one of the upstream's connection slots (`registry.mirror.fill.slots`), and waits for its client if the
blob is larger than the buffer. While another request waits for a slot, a reader whose client is slow is cut off
(`registry.mirror.fill.slot_holders`). While the reader waits for the upstream, its client does not count as slow.

The bytes that the client has not received yet are in memory. So each reader has a share of the memory budget of its
worker process (`new_pass_through_memory`), from the start of the download until the reader is closed.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Final

from registry.memory_budget import MIB, MemoryBudget
from registry.mirror.fill.retry import AvoidedEndpoints
from registry.mirror.fill.sinks import check_response
from registry.mirror.fill.slots import ConnectionSlots
from registry.mirror.upstream_client import RangesUnsupported, UpstreamClient
from registry.single_flight import cancel_and_wait
from storage.content import BLOB_TYPE, Descriptor, OpenFile, Span
from storage.errors import (
    DigestInvalid,
    RegistryError,
    StorageFull,
    TooManyRequests,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from storage.names import Digest, RepositoryName
from storage.running_digest import start_digest

CHUNK_BYTES: Final = 256 * 1024
"""Largest number of bytes that a reader yields at once."""
MAX_BUFFERED_BYTES: Final = 512 * 1024
"""Largest number of bytes of one blob that are buffered. If a chunk would exceed this limit, the thread waits for the
client."""
SMALL_CHUNK_BYTES: Final = 4 * 1024
"""The buffer counts a chunk smaller than this with `_CHUNK_OVERHEAD_BYTES` more than its size. Otherwise, thousands of
tiny chunks would take much more memory than `MAX_BUFFERED_BYTES`."""
_CHUNK_OVERHEAD_BYTES: Final = 64
"""Memory of a chunk in addition to its bytes."""
READER_BYTES: Final = MAX_BUFFERED_BYTES + 2 * CHUNK_BYTES
"""The share of the budget that the reader of a large blob has: the buffer, the last chunk that it yielded, and the copy
of this chunk in the buffer of the client's connection."""
BUDGET_BYTES: Final = 48 * MIB
"""Size of the budget of a worker. Large shares may use three quarters of it (`registry.memory_budget`). So 36 readers
can have `READER_BYTES` each."""
SLOW_CLIENT_SECONDS: Final = 30.0
"""While another reader waits for memory, a reader whose client takes longer than this for `CHUNK_BYTES` is cut off."""
_TOO_SLOW: Final = "the client receives the blob too slowly while other requests wait"


def new_pass_through_memory() -> MemoryBudget:
    """Returns a budget for the readers of one worker."""
    return MemoryBudget(BUDGET_BYTES, "blobs that do not fit on the full disk", slow_seconds=SLOW_CLIENT_SECONDS)


class ReaderClosed(Exception):
    """Stops the thread, because the reader was closed or its client was cut off."""


def _memory_of(chunk: bytes) -> int:
    """Returns how many bytes of the buffer's limit the chunk uses."""
    return len(chunk) if len(chunk) >= SMALL_CHUNK_BYTES else len(chunk) + _CHUNK_OVERHEAD_BYTES


class _Buffer:
    """A bounded queue of bytes from the thread that reads the response to the event loop. Implements the Protocol
    `BlobSink`."""

    def __init__(self, digest: Digest, size: int, avoided: AvoidedEndpoints, notify: Callable[[], None]) -> None:
        """`avoided`: the endpoints to avoid; bytes from those in `avoided.untrusted` are not accepted. `notify`: called
        in the thread when there are new bytes."""
        self.endpoint: str | None = None
        """The endpoint that has started to send; None: none has."""
        self.expected = (0, size)
        """The requested range: the offsets of its first byte and of the byte after its last one. Do not change it after
        `begin`."""
        self._notify = notify
        self._size = size
        self._untrusted = avoided.untrusted
        self._running_digest = start_digest(digest.algorithm)
        self._chunks: deque[bytes] = deque()
        self._buffered_bytes = 0
        self._next_offset = 0
        self._close_error: Exception | None = None  # set when the buffer is closed
        self._changed = threading.Condition()

    def begin(self, endpoint: str, start: int, stop: int, size: int) -> None:
        self.endpoint = endpoint
        check_response(endpoint, self._untrusted, size, self._size)
        if (start, stop) != self.expected:
            raise UpstreamUnavailable(f"{endpoint} sent another part of the blob than the one asked for")
        self._next_offset = start

    def take(self, offset: int, data: memoryview) -> None:
        """Adds the bytes in chunks. Waits for each until the buffer has space for it."""
        if offset != self._next_offset or offset + len(data) > self.expected[1]:
            raise UpstreamUnavailable("the upstream sent bytes that were not asked for")
        if self.is_whole:
            self._running_digest.update(data)
        for start in range(0, len(data), CHUNK_BYTES):
            self._add(bytes(data[start : start + CHUNK_BYTES]))
            self._notify()

    def _add(self, chunk: bytes) -> None:
        """Waits until the buffer has space for the chunk, and adds it. Raises ReaderClosed if the buffer is closed."""

        def can_go_on() -> bool:
            return self._close_error is not None or self._buffered_bytes + _memory_of(chunk) <= MAX_BUFFERED_BYTES

        with self._changed:
            self._changed.wait_for(can_go_on)
            if self._close_error is not None:
                raise ReaderClosed
            self._chunks.append(chunk)
            self._buffered_bytes += _memory_of(chunk)
            self._next_offset += len(chunk)

    def next_chunk(self) -> bytes | None:
        """Returns the next bytes; None if there are none now. Raises the error with which the buffer was closed."""
        with self._changed:
            if self._close_error is not None:
                raise self._close_error
            if not self._chunks:
                return None
            chunk = self._chunks.popleft()
            self._buffered_bytes -= _memory_of(chunk)
            self._changed.notify_all()
            return chunk

    @property
    def is_whole(self) -> bool:
        """Whether the whole blob is requested, so that its digest can be verified."""
        return self.expected == (0, self._size)

    @property
    def received_bytes(self) -> int:
        """Number of bytes that have arrived."""
        return max(self._next_offset - self.expected[0], 0)

    def close(self, error: Exception) -> None:
        """Drops the bytes and makes the thread stop: from now on, `take` raises ReaderClosed, and `next_chunk` raises
        `error`."""
        with self._changed:
            self._close_error = error
            self._chunks.clear()
            self._buffered_bytes = 0
            self._changed.notify_all()

    def digest(self) -> Digest:
        """Returns the digest of the bytes that have arrived."""
        return self._running_digest.digest()


class PassThroughReader:
    """Reads a blob while it arrives from the upstream. Implements the Protocols `BlobReader` and `SlotHolder`.
    The bytes can be read only once."""

    location: str | None = None
    is_incomplete = True
    """Always True: this reader forwards bytes while they arrive, and the blob is never stored."""
    data: bytes | None = None
    file: OpenFile | None = None

    def __init__(
        self,
        client: UpstreamClient,
        slots: ConnectionSlots,
        upstream_name: RepositoryName,
        descriptor: tuple[Digest, int],
        span: tuple[int, int],
        avoided: AvoidedEndpoints,
        memory: MemoryBudget,
        *,
        on_corrupt: Callable[[str], Awaitable[None]],
        on_fetched: Callable[[int], None] = lambda _: None,
    ) -> None:
        """`upstream_name`: the repository's name at the upstream. `descriptor`: digest and size of the blob. `span`:
        offsets of the first byte to read and of the byte after the last one. `avoided`: the endpoints (base URLs of the
        upstream) to avoid. `memory`: the worker's budget for the bytes of all readers. `on_corrupt`: called with the
        endpoint whose bytes do not have the digest. `on_fetched`: called after each download with the number of bytes
        that have arrived."""
        self._digest, self._size = descriptor
        self.descriptor = Descriptor(BLOB_TYPE, self._digest, self._size)
        self.span = span
        self._client = client
        self._slots = slots
        self._upstream_name = upstream_name
        self._avoided = avoided
        self._report_corrupt = on_corrupt
        self._report_fetched = on_fetched
        self._share = memory.new_share()
        """The reader's share of the budget. If other readers wait for memory, the budget cuts off readers whose
        `last_progress_at` is long ago. The reader sets `last_progress_at` as follows:

        - to the current time, each time the client has received `CHUNK_BYTES` more bytes
        - to infinity when a wait for the upstream begins, so that the budget does not cut off the reader meanwhile
        - to the current time when this wait ends"""
        self._measured_bytes = 0
        """Number of bytes that the client has received since `last_progress_at` of the share."""
        self._chunk_seconds = 0.0
        """Seconds that the client has needed for the last `CHUNK_BYTES`; 0: the upstream was slower than the client."""
        self._has_news = asyncio.Event()  # set when bytes have arrived and when the download has ended
        loop = asyncio.get_running_loop()
        self._buffer = _Buffer(self._digest, self._size, avoided, lambda: _notify(loop, self._has_news))
        self._fetching: asyncio.Task[None] | None = None

    async def readable_until(self, offset: int) -> int:
        """Always raises StorageFull: no byte is stored, so the caller can only iterate over the reader."""
        raise StorageFull

    async def start(self) -> None:
        """Waits for memory, starts the download and waits until the first bytes have arrived. Raises TooManyRequests if
        no memory becomes free in time, DigestInvalid if the blob is empty and its digest is wrong, and the errors of
        the upstream client. After an error or a cancellation, the caller must close the reader."""
        await self._share.grow(min(READER_BYTES, 2 * self._size))  # a small blob is in memory at most twice
        self._share.on_cut = self.cut_off
        self._fetching = asyncio.create_task(self._fetch())
        self._fetching.add_done_callback(lambda _: self._has_news.set())
        with self._waiting_for_upstream():
            await self._has_news.wait()
        if self._fetching.done():
            self._fetching.result()
        if not self._size:
            await self._verify()

    def slowness(self) -> float:
        """Returns the seconds that the client needs for `CHUNK_BYTES`. Returns 0 if the upstream is slower than the
        client."""
        return max(self._chunk_seconds, asyncio.get_running_loop().time() - self._share.last_progress_at)

    def cut_off(self) -> None:
        """Drops the bytes in memory and ends the download, because other requests need the memory or the connection
        slot, and this client is too slow. The iteration then raises TooManyRequests."""
        self._buffer.close(TooManyRequests(_TOO_SLOW))
        self._share.close()
        self._has_news.set()

    def _note_received(self, size: int) -> None:
        """Notes that the client has received a chunk of `size` bytes."""
        self._measured_bytes += size
        if self._measured_bytes >= CHUNK_BYTES:
            now = asyncio.get_running_loop().time()
            self._chunk_seconds = now - self._share.last_progress_at
            self._measured_bytes, self._share.last_progress_at = 0, now

    @contextmanager
    def _waiting_for_upstream(self) -> Iterator[None]:
        """Says that the reader waits for the upstream inside the `with` block. The client does not count as slow inside
        the block, because it has received all bytes that have arrived. Discards the measurements made before."""
        self._measured_bytes, self._chunk_seconds, self._share.last_progress_at = 0, 0.0, math.inf
        try:
            yield
        finally:
            self._share.last_progress_at = asyncio.get_running_loop().time()

    async def _fetch(self) -> None:
        """Downloads the span. Downloads the whole blob instead if the span contains the blob's last byte, or if the
        upstream sends only whole blobs."""
        if self.span[1] < self._size:
            try:
                await self._download(self.span)
                return
            except RegistryError as error:
                if self._buffer.endpoint is not None or not _may_refuse_ranges(error):
                    raise
        await self._download((0, self._size))

    async def _download(self, span: tuple[int, int]) -> None:
        """Waits for a connection slot, and downloads the bytes of `span` into the buffer."""
        self._buffer.expected = start, stop = span
        async with self._slots.pass_through_slot(
            self, waits_for_client=stop - start > MAX_BUFFERED_BYTES, blob_size=self._size
        ):
            requested = Span(0) if self._buffer.is_whole else Span(start, stop)
            try:
                await self._client.fetch_blob(
                    *(self._upstream_name, self._digest, requested, self._buffer),
                    self._avoided.ask_last,
                    self._avoided.untrusted,
                    expected_size=self._size,
                )
            finally:
                self._report_fetched(self._buffer.received_bytes)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yields the bytes of the span. Raises the error of the upstream client. If the digest is wrong, raises
        DigestInvalid instead of yielding the last byte of the blob. If the client is too slow while other requests wait
        for memory or a connection slot, raises TooManyRequests."""
        offset = self._buffer.expected[0]
        async with aclosing(self._verified_chunks()) as chunks:
            async for chunk in chunks:
                start, stop = max(self.span[0] - offset, 0), min(self.span[1] - offset, len(chunk))
                if start < stop:
                    yield chunk[start:stop]
                self._note_received(len(chunk))
                offset += len(chunk)
                if offset >= self.span[1]:
                    return

    async def _verified_chunks(self) -> AsyncGenerator[bytes, None]:
        """Yields all bytes that are requested. Yields the last byte of the blob only after the digest is verified."""
        assert self._fetching is not None, "start was not called"
        offset, stop = self._buffer.expected
        while offset < stop:
            self._has_news.clear()
            chunk = self._buffer.next_chunk()
            if chunk is None:
                if not self._fetching.done():
                    with self._waiting_for_upstream():
                        await self._has_news.wait()
                    continue
                self._fetching.result()  # raises the error of the download, if it failed
                chunk = self._buffer.next_chunk()
                if chunk is None:
                    raise UpstreamUnavailable(f"{self._client.name} sent only a part of {self._digest}")
            offset += len(chunk)
            if offset < self._size:
                yield chunk
                continue
            if len(chunk) > 1:
                yield chunk[:-1]
            await self._verify()
            yield chunk[-1:]

    async def _verify(self) -> None:
        """Waits for the end of the download and verifies the digest. If it is wrong, reports the endpoint that has sent
        the bytes, and raises DigestInvalid. Raises the error of the download."""
        assert self._fetching is not None
        with self._waiting_for_upstream():
            await self._fetching
        if self._buffer.digest() != self._digest:
            await self._report_corrupt(self._buffer.endpoint or "")
            raise DigestInvalid(f"{self._client.name} sent other bytes than those of {self._digest}")

    async def aclose(self) -> None:
        """Stops the download, and gives the memory back."""
        self._buffer.close(ReaderClosed())
        self._share.close()
        if self._fetching is not None:
            await cancel_and_wait([self._fetching])


def _may_refuse_ranges(error: RegistryError) -> bool:
    """Returns whether `error` may mean that the upstream ignores or refuses a `Range` header. If so, a request for the
    whole blob can help."""
    return isinstance(error, RangesUnsupported | UpstreamUnavailable) and not isinstance(error, UpstreamTimeout)


def _notify(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    """Sets the event from a thread. Does nothing if the loop is closed."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(event.set)
