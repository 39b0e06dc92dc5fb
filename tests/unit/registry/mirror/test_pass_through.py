"""Blobs that a mirror passes on to a client without storing them, because the disk is full."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Collection
from contextlib import asynccontextmanager
from typing import Any

import pytest

from registry.memory_budget import MemoryBudget
from registry.mirror import pass_through
from registry.mirror.pass_through import (
    CHUNK_BYTES,
    MAX_BUFFERED_BYTES,
    READER_BYTES,
    PassThroughReader,
    new_pass_through_memory,
)
from registry.mirror.upstream_client import BlobSink
from storage.content import Span
from storage.errors import DigestInvalid, StorageFull, TooManyRequests, UpstreamUnavailable
from storage.names import Digest, RepositoryName

APP = RepositoryName("library/app")


class Sender:
    """An upstream that sends `data` in pieces of `piece` bytes. It calls the sink in a thread, as the real client does.
    After the last piece, it raises `error`, if there is one. `size`: the size that it states for the blob."""

    name = "hub"

    def __init__(
        self, data: bytes, piece: int = 1000, *, size: int | None = None, error: Exception | None = None
    ) -> None:
        self.data = data
        self.piece = piece
        self.size = len(data) if size is None else size
        self.error = error
        self.sent = 0
        self.is_done = threading.Event()

    async def fetch_blob(
        self, repo: RepositoryName, digest: Digest, span: Span, sink: BlobSink, avoid: Collection[str] = ()
    ) -> None:
        await asyncio.to_thread(self._send, sink)

    def _send(self, sink: BlobSink) -> None:
        sink.begin("https://hub", 0, self.size, self.size)
        for offset in range(0, len(self.data), self.piece):
            piece = self.data[offset : offset + self.piece]
            sink.take(offset, memoryview(piece))
            self.sent += len(piece)
        self.is_done.set()
        if self.error is not None:
            raise self.error


class Slots:
    """Slots for connections to the upstream. A slot is always free."""

    @asynccontextmanager
    async def primary(self, demand: object, *, is_new_connection: bool) -> Any:
        yield True


def reader_of(
    sender: Sender,
    span: tuple[int, int] | None = None,
    expected: bytes | None = None,
    memory: MemoryBudget | None = None,
) -> PassThroughReader:
    content = sender.data if expected is None else expected
    digest = Digest(f"sha256:{hashlib.sha256(content).hexdigest()}")
    size = len(content)
    memory = memory or new_pass_through_memory()
    return PassThroughReader(sender, Slots(), APP, (digest, size), span or (0, size), (), memory)  # type: ignore[arg-type]


async def read(reader: PassThroughReader) -> bytes:
    """Reads all bytes. If the reader raises an error, the number of bytes before it is added as a note to the error."""
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
async def test_all_bytes_reach_the_client(size: int) -> None:
    """The client gets all bytes of a blob of any size."""
    data = bytes(index % 251 for index in range(size))
    assert await read(reader_of(Sender(data))) == data


@pytest.mark.parametrize("span", [(0, 1), (0, 999), (500, 2500), (2999, 3000), (1000, 3000)])
async def test_the_client_gets_the_requested_range(span: tuple[int, int]) -> None:
    """A client that requests a range gets the bytes of this range."""
    data = bytes(index % 251 for index in range(3000))
    assert await read(reader_of(Sender(data), span)) == data[slice(*span)]


@pytest.mark.parametrize("piece", [1, 1000, 5000])
async def test_client_does_not_get_the_last_byte_of_corrupt_bytes(piece: int) -> None:
    """If the bytes from the upstream do not have the blob's digest, the client gets an error instead of the last
    byte."""
    with pytest.raises(DigestInvalid) as failed:
        await read(reader_of(Sender(b"x" * 2000, piece), expected=b"y" * 2000))
    assert failed.value.__notes__ == ["1999"]


async def test_errors_of_the_upstream() -> None:
    """The client gets an error if the upstream fails before the first byte or in the middle, states a wrong size, or
    sends too few bytes."""
    error = UpstreamUnavailable("broken")
    with pytest.raises(UpstreamUnavailable, match="broken"):
        await read(reader_of(Sender(b"", size=5, error=error), expected=b"12345"))
    with pytest.raises(UpstreamUnavailable, match="broken"):
        await read(reader_of(Sender(b"123", size=5, error=error), expected=b"12345"))
    with pytest.raises(UpstreamUnavailable, match="has a blob of 3 bytes; 5 bytes were expected"):
        await read(reader_of(Sender(b"123"), expected=b"12345"))
    with pytest.raises(UpstreamUnavailable, match="sent only a part"):
        await read(reader_of(Sender(b"123", size=5), expected=b"12345"))


async def test_memory_for_a_slow_client_is_limited() -> None:
    """Bytes are received from the upstream only as fast as the client receives them, so only a limited number of bytes
    is in memory. When the client disconnects, no more bytes are received."""
    sender = Sender(bytes(8 * MAX_BUFFERED_BYTES), 100_000)
    reader = reader_of(sender)
    await reader.start()
    chunks = aiter(reader)
    assert len(await anext(chunks)) == 100_000
    await reader.aclose()
    assert sender.sent <= MAX_BUFFERED_BYTES + 2 * 100_000


async def test_memory_for_tiny_pieces_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the upstream sends a few bytes at a time, each piece counts as more bytes than it has, because it takes more
    memory. All bytes reach the client."""
    monkeypatch.setattr(pass_through, "MAX_BUFFERED_BYTES", 10_000)
    sender = Sender(bytes(1000), 1)
    reader = reader_of(sender)
    await reader.start()
    chunks = aiter(reader)
    received = [await anext(chunks)]
    await asyncio.to_thread(sender.is_done.wait, 0.2)  # returns at the timeout, because the sender waits for the client
    assert sender.sent <= 10_000 // 64
    async for chunk in chunks:
        received.append(chunk)
    await reader.aclose()
    assert b"".join(received) == sender.data


async def test_a_large_read_is_divided_into_chunks() -> None:
    """The client gets no more than `CHUNK_BYTES` at once, although the upstream client receives more at once."""
    reader = reader_of(Sender(bytes(5 * CHUNK_BYTES), 3 * CHUNK_BYTES))
    await reader.start()
    sizes = [len(chunk) async for chunk in reader]
    await reader.aclose()
    assert sum(sizes) == 5 * CHUNK_BYTES
    assert max(sizes) == CHUNK_BYTES


@pytest.mark.parametrize("size", [CHUNK_BYTES, 8 * MAX_BUFFERED_BYTES])
async def test_memory_of_all_readers_is_limited(size: int) -> None:
    """All readers of a worker share a budget. If it is used up, a further reader is refused. Each reader holds its
    share until it is closed, also if its download has ended, because its client may not have received the bytes."""
    share_bytes = min(2 * size, READER_BYTES)
    memory = MemoryBudget(4 * share_bytes, "blobs", wait_seconds=0.05)  # large shares may use three quarters of it
    readers = [reader_of(Sender(bytes(size), CHUNK_BYTES), memory=memory) for _ in range(5)]
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


async def test_slow_client_is_cut_off_while_another_reader_waits_for_memory() -> None:
    """A reader whose client does not receive the bytes loses its memory to a reader that waits for memory. Its
    iteration then ends with an error. The other reader gets all bytes."""
    size = MAX_BUFFERED_BYTES
    memory = MemoryBudget(READER_BYTES, "blobs", wait_seconds=30, slow_seconds=0.0)
    slow, other = (reader_of(Sender(bytes(size), CHUNK_BYTES), memory=memory) for _ in range(2))
    await slow.start()
    chunks = aiter(slow)
    assert len(await anext(chunks)) == CHUNK_BYTES
    assert await read(other) == bytes(size)
    with pytest.raises(TooManyRequests, match="too slowly"):
        await anext(chunks)
    await slow.aclose()
    assert memory.used == 0


async def test_client_that_receives_chunks_is_not_cut_off() -> None:
    """A reader whose client has just received a chunk counts as fast, however long ago its download began."""
    memory = MemoryBudget(READER_BYTES, "blobs", wait_seconds=0.5, slow_seconds=60)
    reader = reader_of(Sender(bytes(8 * CHUNK_BYTES), CHUNK_BYTES), memory=memory)
    await reader.start()
    (share,) = memory._shares
    share.held_since -= 1000
    chunks = aiter(reader)
    received = len(await anext(chunks)) + len(await anext(chunks))
    with pytest.raises(TooManyRequests):
        await memory.share().grow(READER_BYTES)
    received += sum([len(chunk) async for chunk in chunks])
    await reader.aclose()
    assert received == 8 * CHUNK_BYTES


async def test_a_blob_that_is_passed_through_cannot_be_waited_for() -> None:
    """A caller that waits until the blob is in the store, such as a mount, gets the error that the disk is full."""
    reader = reader_of(Sender(b"123"))
    with pytest.raises(StorageFull):
        await reader.readable_until(2)
    await reader.aclose()
