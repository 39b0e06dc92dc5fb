"""If the disk is too full for a blob, sends the blob from the upstream to one client without storing it
(`PassThroughReader`).

A thread receives the bytes and adds them to a buffer. When the buffer is full, the thread waits for the client. If the
upstream closes the connection during this wait, the response ends early. The client can request the remaining bytes
with a `Range` header.

The client gets the last byte of the blob only after the reader has verified the blob's digest. A request for the last
byte therefore downloads the whole blob. A request that does not include the last byte downloads only the requested
bytes, without verifying them.

Each download holds one of the upstream's connection slots (`registry.mirror.fill.slots`), and each reader has a share
of the memory budget of its worker process (`new_pass_through_memory`). While another request waits for a slot or for
memory, a reader with a slow client can be *cut off*: its download ends with an error. While a reader waits for the
upstream, its client does not count as slow.
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
"""If a chunk is smaller than this, the buffer counts `_CHUNK_OVERHEAD_BYTES` in addition to the chunk's size, so that
thousands of tiny chunks do not exceed the memory limit."""
_CHUNK_OVERHEAD_BYTES: Final = 64
"""Memory that Python needs for a chunk in addition to the chunk's bytes."""
READER_BYTES: Final = MAX_BUFFERED_BYTES + 2 * CHUNK_BYTES
"""Memory that the reader of a large blob needs: the buffer, the chunk that the reader yielded last, and the copy of
this chunk in the client connection's buffer."""
BUDGET_BYTES: Final = 48 * MIB
"""Size of a worker's memory budget. The readers of large blobs together may use three quarters of the budget
(`registry.memory_budget`). These 36 MiB are enough for 36 readers, because `READER_BYTES` is 1 MiB."""
SLOW_CLIENT_SECONDS: Final = 30.0
"""While any reader waits for memory, readers whose clients take longer than this for `CHUNK_BYTES` are cut off."""
_TOO_SLOW: Final = "the client receives the blob too slowly while other requests wait"


def new_pass_through_memory() -> MemoryBudget:
    """Returns the memory budget for all readers of one worker."""
    return MemoryBudget(BUDGET_BYTES, "blobs that do not fit on the full disk", slow_seconds=SLOW_CLIENT_SECONDS)


class ReaderClosed(Exception):
    """Stops the thread, because the reader was closed or cut off."""


def _counted_bytes(chunk: bytes) -> int:
    """Returns the number of bytes that the chunk counts for `MAX_BUFFERED_BYTES`."""
    return len(chunk) if len(chunk) >= SMALL_CHUNK_BYTES else len(chunk) + _CHUNK_OVERHEAD_BYTES


class _Buffer:
    """A bounded queue of bytes. A thread adds bytes with `take`, a method of the Protocol `BlobSink`. The event loop
    removes bytes with `next_chunk`."""

    def __init__(self, digest: Digest, size: int, avoided: AvoidedEndpoints, notify: Callable[[], None]) -> None:
        """`size`: size of the whole blob in bytes. `avoided`: the buffer refuses bytes from the endpoints in
        `avoided.untrusted`. `notify`: called in the thread after each added chunk."""
        self.endpoint: str | None = None
        """The endpoint that has started to send. None: no endpoint has started to send."""
        self.requested_range = (0, size)
        """The requested bytes of the blob: the offset of the first byte, and the offset at which they end (exclusive).
        Do not change the range after `begin`."""
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
        if (start, stop) != self.requested_range:
            raise UpstreamUnavailable(f"{endpoint} sent another part of the blob than the requested part")
        self._next_offset = start

    def take(self, offset: int, data: memoryview) -> None:
        """Adds the bytes in chunks. Before each chunk, waits until the buffer has space for the chunk."""
        if offset != self._next_offset or offset + len(data) > self.requested_range[1]:
            raise UpstreamUnavailable("the upstream sent bytes that were not requested")
        if self.is_whole_blob_requested:
            self._running_digest.update(data)
        for start in range(0, len(data), CHUNK_BYTES):
            self._add(bytes(data[start : start + CHUNK_BYTES]))
            self._notify()

    def _add(self, chunk: bytes) -> None:
        """Waits until the buffer has space for the chunk, and adds the chunk. Raises ReaderClosed if the buffer is
        closed."""

        def can_go_on() -> bool:
            return self._close_error is not None or self._buffered_bytes + _counted_bytes(chunk) <= MAX_BUFFERED_BYTES

        with self._changed:
            self._changed.wait_for(can_go_on)
            if self._close_error is not None:
                raise ReaderClosed
            self._chunks.append(chunk)
            self._buffered_bytes += _counted_bytes(chunk)
            self._next_offset += len(chunk)

    def next_chunk(self) -> bytes | None:
        """Removes the next chunk and returns it. Returns None if the buffer is empty. If the buffer was closed, raises
        the error that was passed to `close`."""
        with self._changed:
            if self._close_error is not None:
                raise self._close_error
            if not self._chunks:
                return None
            chunk = self._chunks.popleft()
            self._buffered_bytes -= _counted_bytes(chunk)
            self._changed.notify_all()
            return chunk

    @property
    def is_whole_blob_requested(self) -> bool:
        """Whether the whole blob is requested. Only then is the digest of the bytes computed."""
        return self.requested_range == (0, self._size)

    @property
    def received_bytes(self) -> int:
        """Number of bytes that have arrived."""
        return max(self._next_offset - self.requested_range[0], 0)

    def close(self, error: Exception) -> None:
        """Drops the buffered bytes. Every later or waiting `take` raises ReaderClosed, which stops the thread. Every
        later `next_chunk` raises `error`."""
        with self._changed:
            self._close_error = error
            self._chunks.clear()
            self._buffered_bytes = 0
            self._changed.notify_all()

    def digest(self) -> Digest:
        """Returns the digest of the bytes that have arrived. Call this only if the whole blob is requested."""
        return self._running_digest.digest()


class PassThroughReader:
    """Reads a blob while its bytes arrive from the upstream. The bytes can be read only once. Implements the Protocols
    `BlobReader` and `SlotHolder`."""

    location: str | None = None
    is_incomplete = True
    """Always True, because the blob is downloaded for this reader alone and is never stored. For other readers, True
    means that the registry is still downloading the blob."""
    data: bytes | None = None
    file: OpenFile | None = None

    def __init__(
        self,
        client: UpstreamClient,
        slots: ConnectionSlots,
        upstream_name: RepositoryName,
        digest_and_size: tuple[Digest, int],
        span: tuple[int, int],
        avoided: AvoidedEndpoints,
        memory: MemoryBudget,
        *,
        on_corrupt: Callable[[str], Awaitable[None]],
        on_fetched: Callable[[int], None] = lambda _: None,
    ) -> None:
        """- `upstream_name`: the repository's name at the upstream.
        - `digest_and_size`: digest and size of the blob.
        - `span`: the bytes to read: the offset of the first byte, and the offset at which they end (exclusive).
        - `avoided`: the endpoints (base URLs of the upstream) to avoid.
        - `memory`: the memory budget of the worker.
        - `on_corrupt`: called with an endpoint whose bytes have a wrong digest.
        - `on_fetched`: called after each download, also after a failed one, with the number of bytes that have arrived.
        """
        self._digest, self._size = digest_and_size
        self.descriptor = Descriptor(BLOB_TYPE, self._digest, self._size)
        self.span = span
        self._client = client
        self._slots = slots
        self._upstream_name = upstream_name
        self._avoided = avoided
        self._report_corrupt = on_corrupt
        self._report_fetched = on_fetched
        self._share = memory.new_share()
        """The reader's share of the memory budget. While any reader waits for memory, the budget cuts off readers whose
        `last_progress_at` is long ago. The reader sets `last_progress_at`:

        - to the current time, whenever the client has received another `CHUNK_BYTES`
        - to infinity, when a wait for the upstream begins, to prevent a cut-off during the wait
        - to the current time, when a wait for the upstream ends"""
        self._measured_bytes = 0
        """Number of bytes that the client has received since the reader last set `last_progress_at`."""
        self._chunk_seconds = 0.0
        """Seconds that the client needed for the last `CHUNK_BYTES`. 0: not measured since the last wait for the
        upstream."""
        self._has_news = asyncio.Event()  # set when bytes arrive, and when the download ends
        loop = asyncio.get_running_loop()
        self._buffer = _Buffer(self._digest, self._size, avoided, lambda: _notify(loop, self._has_news))
        self._fetching: asyncio.Task[None] | None = None

    async def readable_until(self, offset: int) -> int:
        """Always raises StorageFull, because no byte is stored. Iterate over the reader instead."""
        raise StorageFull

    async def start(self) -> None:
        """Waits for memory, starts the download, and waits until the first bytes have arrived. Raises TooManyRequests
        if too little memory becomes free in time. Raises DigestInvalid if the blob is empty and its digest is wrong.
        Also raises the errors of the upstream client. After an error or a cancellation, the caller must close the
        reader."""
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
        """Returns the seconds that the client needs for `CHUNK_BYTES`. Returns 0 while the reader waits for the
        upstream."""
        return max(self._chunk_seconds, asyncio.get_running_loop().time() - self._share.last_progress_at)

    def cut_off(self) -> None:
        """Drops the buffered bytes, frees the memory and makes the download end. Called if the client is slow and
        another request waits for memory or for a connection slot. Iterating over the reader then raises
        TooManyRequests."""
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
        """Inside the `with` block, the reader waits for the upstream, and its client does not count as slow. Discards
        the earlier measurements of the client's speed."""
        self._measured_bytes, self._chunk_seconds, self._share.last_progress_at = 0, 0.0, math.inf
        try:
            yield
        finally:
            self._share.last_progress_at = asyncio.get_running_loop().time()

    async def _fetch(self) -> None:
        """Downloads the bytes of `span`. Downloads the whole blob instead in two cases: `span` contains the blob's last
        byte, or the upstream sends only whole blobs."""
        if self.span[1] < self._size:
            try:
                await self._download(self.span)
                return
            except RegistryError as error:
                if self._buffer.endpoint is not None or not _may_be_range_refusal(error):
                    raise
        await self._download((0, self._size))

    async def _download(self, span: tuple[int, int]) -> None:
        """Waits for a connection slot, and downloads the bytes of `span` into the buffer."""
        self._buffer.requested_range = start, stop = span
        # `waits_for_client`: the download may have to wait for the client if not all its bytes fit into the buffer.
        async with self._slots.pass_through_slot(
            self, waits_for_client=stop - start > MAX_BUFFERED_BYTES, blob_size=self._size
        ):
            requested_span = Span(0) if self._buffer.is_whole_blob_requested else Span(start, stop)
            try:
                await self._client.fetch_blob(
                    *(self._upstream_name, self._digest, requested_span, self._buffer),
                    self._avoided.ask_last,
                    self._avoided.untrusted,
                    expected_size=self._size,
                )
            finally:
                self._report_fetched(self._buffer.received_bytes)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yields the bytes of `span`. Raises the errors of the upstream client. If the digest is wrong, raises
        DigestInvalid instead of yielding the last byte of the blob. If the reader is cut off (`cut_off`), raises
        TooManyRequests."""
        offset = self._buffer.requested_range[0]
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
        """Yields all bytes that the download requests. Verifies the digest before it yields the last byte of the
        blob."""
        assert self._fetching is not None, "start was not called"
        offset, stop = self._buffer.requested_range
        while offset < stop:
            self._has_news.clear()
            chunk = self._buffer.next_chunk()
            if chunk is None:
                if not self._fetching.done():
                    with self._waiting_for_upstream():
                        await self._has_news.wait()
                    continue
                self._fetching.result()  # raises the error if the download failed
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
        """Waits for the end of the download and verifies the digest. If the digest is wrong, reports the endpoint that
        sent the bytes, and raises DigestInvalid. If the download failed, raises its error."""
        assert self._fetching is not None
        with self._waiting_for_upstream():
            await self._fetching
        if self._buffer.digest() != self._digest:
            await self._report_corrupt(self._buffer.endpoint or "")
            raise DigestInvalid(f"{self._client.name} sent other bytes than those of {self._digest}")

    async def aclose(self) -> None:
        """Stops the download, and gives the memory back to the budget."""
        self._buffer.close(ReaderClosed())
        self._share.close()
        if self._fetching is not None:
            await cancel_and_wait([self._fetching])


def _may_be_range_refusal(error: RegistryError) -> bool:
    """Returns whether `error` may mean that the upstream ignores or refuses a `Range` header."""
    return isinstance(error, RangesUnsupported | UpstreamUnavailable) and not isinstance(error, UpstreamTimeout)


def _notify(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    """Sets an event of the loop from another thread. Does nothing if the loop is closed."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(event.set)
