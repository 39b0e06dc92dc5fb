"""Sends a blob from the upstream to one client without storing the blob (`PassThroughReader`). The mirror does so if
the disk is too full for the blob.

The bytes arrive in a thread, which waits while the client is slower than the upstream. If the client reads nothing for
the idle timeout of the upstream, the response ends early. The client can then request the remaining bytes with a
`Range` header. As with a blob that is being stored, the client gets the last byte only after the digest is verified.

The bytes that have arrived, and that the client has not received yet, are in memory. So each reader has a share of a
budget of its worker (`new_pass_through_memory`), from the start of the download until the reader is closed.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection
from typing import Final

from registry.memory_budget import MIB, MemoryBudget
from registry.mirror.fill.slots import ConnectionSlots, Demand
from registry.mirror.upstream_client import UpstreamClient
from storage.content import BLOB_TYPE, Descriptor, OpenFile, Span
from storage.errors import DigestInvalid, StorageFull, TooManyRequests, UpstreamUnavailable
from storage.names import Digest, RepositoryName
from storage.running_digest import start_digest

CHUNK_BYTES: Final = 256 * 1024
"""Largest number of bytes that a reader yields at once."""
MAX_BUFFERED_BYTES: Final = 512 * 1024
"""Largest number of bytes of one blob that are buffered. If a chunk would exceed it, the thread waits for the
client."""
SMALL_CHUNK_BYTES: Final = 4 * 1024
"""A smaller chunk counts as `_CHUNK_OVERHEAD_BYTES` more bytes, so that tiny chunks do not take much more memory."""
_CHUNK_OVERHEAD_BYTES: Final = 64
"""Memory of a chunk in addition to its bytes."""
READER_BYTES: Final = MAX_BUFFERED_BYTES + 2 * CHUNK_BYTES
"""The share of the budget that the reader of a large blob has: the buffer, the last chunk that it yielded, and the copy
of this chunk in the buffer of the client's connection."""
BUDGET_BYTES: Final = 48 * MIB
"""Size of the budget of a worker. Three quarters of it are for large shares, so 36 large blobs are passed through at
the same time. That is more than an upstream has connections by default."""
SLOW_CLIENT_SECONDS: Final = 30.0
"""While another reader waits for memory, a reader whose client takes longer than this for `CHUNK_BYTES` is cut off."""
_TOO_SLOW: Final = "the client receives the blob too slowly while other requests wait for memory"


def new_pass_through_memory() -> MemoryBudget:
    """Returns a budget for the readers of one worker."""
    return MemoryBudget(BUDGET_BYTES, "blobs that do not fit on the full disk", slow_seconds=SLOW_CLIENT_SECONDS)


class ReaderClosed(Exception):
    """The client has closed the reader, so the thread stops."""


def _memory_of(chunk: bytes) -> int:
    """Returns the number of bytes as which the chunk counts."""
    return len(chunk) if len(chunk) >= SMALL_CHUNK_BYTES else len(chunk) + _CHUNK_OVERHEAD_BYTES


class _Buffer:
    """A bounded queue of bytes from the thread that reads the response to the event loop. Implements the Protocol
    `BlobSink`."""

    def __init__(self, digest: Digest, size: int, notify: Callable[[], None]) -> None:
        """`notify`: called in the thread when there are new bytes."""
        self._notify = notify
        self._size = size
        self._running_digest = start_digest(digest.algorithm)
        self._chunks: deque[bytes] = deque()
        self._buffered_bytes = 0
        self._next_offset = 0
        self._close_error: Exception | None = None  # set when the buffer is closed
        self._changed = threading.Condition()

    def begin(self, endpoint: str, start: int, stop: int, size: int) -> None:
        if (start, stop, size) != (0, self._size, self._size):
            raise UpstreamUnavailable(f"{endpoint} has a blob of {size} bytes; {self._size} bytes were expected")

    def take(self, offset: int, data: memoryview) -> None:
        """Adds the bytes in chunks. Waits for each until the buffer has space for it."""
        if offset != self._next_offset or offset + len(data) > self._size:
            raise UpstreamUnavailable("the upstream sent bytes that were not asked for")
        self._running_digest.update(data)
        for start in range(0, len(data), CHUNK_BYTES):
            self._add(bytes(data[start : start + CHUNK_BYTES]))
            self._notify()

    def _add(self, chunk: bytes) -> None:
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
    def received(self) -> int:
        """Number of bytes that have arrived."""
        return self._next_offset

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
    """Reads a blob while it arrives from the upstream. Implements the Protocol `BlobReader`. The bytes can be read only
    once. The whole blob is requested even for a span, because its digest cannot be verified otherwise."""

    location: str | None = None
    is_incomplete = True
    data: bytes | None = None
    file: OpenFile | None = None

    def __init__(
        self,
        client: UpstreamClient,
        slots: ConnectionSlots,
        upstream_name: RepositoryName,
        descriptor: tuple[Digest, int],
        span: tuple[int, int],
        avoid: Collection[str],
        memory: MemoryBudget,
        on_fetched: Callable[[int], None] = lambda _: None,
    ) -> None:
        """`upstream_name`: the repository's name at the upstream. `descriptor`: digest and size of the blob. `span`:
        offsets of the first byte to read and of the byte after the last one. `avoid`: endpoints (base URLs of the
        upstream) that are asked only if no other endpoint has the blob. `memory`: the worker's budget for the bytes of
        all readers. `on_fetched`: called at the end with the number of bytes that have arrived."""
        self._digest, self._size = descriptor
        self.descriptor = Descriptor(BLOB_TYPE, self._digest, self._size)
        self.span = span
        self._client = client
        self._slots = slots
        self._upstream_name = upstream_name
        self._avoid = avoid
        self._report_fetched = on_fetched
        self._share = memory.share()
        self._received_since_mark = 0  # bytes that the client has received since `held_since` of the share
        self._has_news = asyncio.Event()  # set when bytes have arrived and when the download has ended
        loop = asyncio.get_running_loop()
        self._buffer = _Buffer(self._digest, self._size, lambda: _notify(loop, self._has_news))
        self._fetching: asyncio.Task[None] | None = None

    async def readable_until(self, offset: int) -> int:
        """Always raises StorageFull: no byte is stored, so the caller can only iterate over the reader."""
        raise StorageFull

    async def start(self) -> None:
        """Waits for memory, starts the download and waits until the first bytes have arrived. Raises TooManyRequests if
        no memory becomes free in time, and the errors of the upstream client. After an error or a cancellation, the
        caller must close the reader."""
        await self._share.grow(min(READER_BYTES, 2 * self._size))  # a small blob is in memory at most twice
        self._share.on_cut = self._cut_off
        self._fetching = asyncio.create_task(self._fetch())
        self._fetching.add_done_callback(lambda _: self._has_news.set())
        await self._has_news.wait()
        if self._fetching.done():
            self._fetching.result()
        self._mark_progress()

    def _cut_off(self) -> None:
        """Drops the bytes in memory, because other readers need the memory and this client is too slow. The iteration
        then raises TooManyRequests."""
        self._buffer.close(TooManyRequests(_TOO_SLOW))
        self._share.close()
        self._has_news.set()

    def _note_received(self, size: int) -> None:
        """Notes that the client has received a chunk of `size` bytes, so that it does not count as too slow."""
        self._received_since_mark += size
        if self._received_since_mark >= CHUNK_BYTES:
            self._mark_progress()

    def _mark_progress(self) -> None:
        """Starts to measure the client's speed anew."""
        self._received_since_mark = 0
        self._share.held_since = asyncio.get_running_loop().time()

    async def _fetch(self) -> None:
        demand = Demand()
        demand.request()
        try:
            async with self._slots.primary(demand, is_new_connection=True):
                await self._client.fetch_blob(self._upstream_name, self._digest, Span(0), self._buffer, self._avoid)
        finally:
            self._report_fetched(self._buffer.received)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yields the bytes of the span. Raises the error of the upstream client. If the digest is wrong, raises
        DigestInvalid instead of yielding the last byte of the blob. If the client is too slow while other readers wait
        for memory, raises TooManyRequests."""
        offset = 0
        async for chunk in self._verified_chunks():
            start, stop = max(self.span[0] - offset, 0), min(self.span[1] - offset, len(chunk))
            if start < stop:
                yield chunk[start:stop]
            self._note_received(len(chunk))
            offset += len(chunk)
            if offset >= self.span[1]:
                return

    async def _verified_chunks(self) -> AsyncIterator[bytes]:
        """Yields all bytes of the blob. Yields the last byte only after the digest is verified."""
        assert self._fetching is not None, "start was not called"
        offset = 0
        while offset < self._size:
            self._has_news.clear()
            chunk = self._buffer.next_chunk()
            if chunk is None:
                if not self._fetching.done():
                    await self._has_news.wait()
                    self._mark_progress()  # the client has received everything, and was not the slow one
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
            await self._fetching
            if self._buffer.digest() != self._digest:
                raise DigestInvalid(f"{self._client.name} sent other bytes than those of {self._digest}")
            yield chunk[-1:]

    async def aclose(self) -> None:
        """Stops the download, and gives the memory back."""
        self._buffer.close(ReaderClosed())
        if self._fetching is not None:
            self._fetching.cancel()
        self._share.close()
        if self._fetching is not None:
            await asyncio.wait([self._fetching])
            if not self._fetching.cancelled():
                self._fetching.exception()  # marks the error as retrieved: the iteration has raised it


def _notify(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    """Sets the event from a thread. Does nothing if the loop is closed."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(event.set)
