"""Blobs that pass through a mirror without being stored."""

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
    """An upstream that sends `data` in pieces of `piece` bytes, from a thread as the real client does, and then fails
    with `error`."""

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
    """Slots of which one is always free."""

    @asynccontextmanager
    async def primary(self, demand: object, *, is_new_connection: bool) -> Any:
        yield True


def reader_of(sender: Sender, span: tuple[int, int] | None = None, expected: bytes | None = None) -> PassThroughReader:
    content = sender.data if expected is None else expected
    digest = Digest(f"sha256:{hashlib.sha256(content).hexdigest()}")
    size = len(content)
    return PassThroughReader(sender, Slots(), APP, (digest, size), span or (0, size), ())  # type: ignore[arg-type]


async def read(reader: PassThroughReader) -> bytes:
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
async def test_all_bytes_pass(size: int) -> None:
    data = bytes(index % 251 for index in range(size))
    assert await read(reader_of(Sender(data))) == data


@pytest.mark.parametrize("span", [(0, 1), (0, 999), (500, 2500), (2999, 3000), (1000, 3000)])
async def test_spans(span: tuple[int, int]) -> None:
    data = bytes(index % 251 for index in range(3000))
    assert await read(reader_of(Sender(data), span)) == data[slice(*span)]


@pytest.mark.parametrize("piece", [1, 1000, 5000])
async def test_wrong_bytes_are_never_complete(piece: int) -> None:
    """If a blob has another digest, the client does not get its last byte."""
    with pytest.raises(DigestInvalid) as failed:
        await read(reader_of(Sender(b"x" * 2000, piece), expected=b"y" * 2000))
    assert failed.value.__notes__ == ["1999"]


async def test_errors_of_the_upstream() -> None:
    """The upstream fails before the first byte or in the middle, sends another size, or sends too few bytes."""
    error = UpstreamUnavailable("broken")
    with pytest.raises(UpstreamUnavailable, match="broken"):
        await read(reader_of(Sender(b"", size=5, error=error), expected=b"12345"))
    with pytest.raises(UpstreamUnavailable, match="broken"):
        await read(reader_of(Sender(b"123", size=5, error=error), expected=b"12345"))
    with pytest.raises(UpstreamUnavailable, match="has a blob of 3 bytes; 5 bytes were expected"):
        await read(reader_of(Sender(b"123"), expected=b"12345"))
    with pytest.raises(UpstreamUnavailable, match="sent only a part"):
        await read(reader_of(Sender(b"123", size=5), expected=b"12345"))


async def test_a_slow_client_bounds_the_memory() -> None:
    """The bytes are read from the upstream only as fast as the client receives them. Reading stops when the client
    disconnects."""
    sender = Sender(bytes(8 * MAX_BUFFERED_BYTES), 100_000)
    reader = reader_of(sender)
    await reader.start()
    iterating = aiter(reader)
    assert len(await anext(iterating)) == 100_000
    await reader.aclose()
    assert sender.sent <= MAX_BUFFERED_BYTES + 2 * 100_000


async def test_nothing_stays_to_wait_for() -> None:
    """A caller that needs the blob in the store, such as a mount, gets the error that there is no room."""
    reader = reader_of(Sender(b"123"))
    with pytest.raises(StorageFull):
        await reader.readable_until(2)
    await reader.aclose()
