"""Blobs that a mirror passes on to a client without storing them, because the disk is full."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Collection
from contextlib import asynccontextmanager
from typing import Any

import pytest

from registry.mirror.pass_through import MAX_BUFFERED_BYTES, PassThroughReader
from registry.mirror.upstream_client import BlobSink
from storage.content import Span
from storage.errors import DigestInvalid, StorageFull, UpstreamUnavailable
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
        if self.error is not None:
            raise self.error


class Slots:
    """Slots for connections to the upstream. A slot is always free."""

    @asynccontextmanager
    async def primary(self, demand: object, *, is_new_connection: bool) -> Any:
        yield True


def reader_of(sender: Sender, span: tuple[int, int] | None = None, expected: bytes | None = None) -> PassThroughReader:
    content = sender.data if expected is None else expected
    digest = Digest(f"sha256:{hashlib.sha256(content).hexdigest()}")
    size = len(content)
    return PassThroughReader(sender, Slots(), APP, (digest, size), span or (0, size), ())  # type: ignore[arg-type]


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


async def test_a_blob_that_is_passed_through_cannot_be_waited_for() -> None:
    """A caller that waits until the blob is in the store, such as a mount, gets the error that the disk is full."""
    reader = reader_of(Sender(b"123"))
    with pytest.raises(StorageFull):
        await reader.readable_until(2)
    await reader.aclose()
