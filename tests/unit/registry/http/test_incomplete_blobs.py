"""Blobs that a mirror is still downloading: their bytes are sent as they arrive, and the response is cut off if the
download fails."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from registry.asgi import Message, Receive, Scope, Send
from registry.http import DistributionAPI
from registry.log_output import was_logged
from storage.content import BLOB_TYPE, Descriptor, OpenFile, Span, digest_of
from storage.errors import (
    DigestInvalid,
    PartialBlobLost,
    RegistryError,
    StorageFailed,
    StorageFull,
    UpstreamUnavailable,
)
from storage.interface import BlobReader
from storage.names import Digest, RepositoryName
from storage.wrappers import RefusingRegistry
from tests.fakes.asgi_client import AsgiClient
from tests.unit.registry.conftest import V2

DATA = bytes(range(256)) * 16
DIGEST = digest_of(DATA)
SIZE = len(DATA)


class GrowingBlobRegistry(RefusingRegistry):
    """A registry with one blob in a file. The download of the blob has written `available` bytes so far.
    `awaited_offsets` has the offsets for which readers have waited. `opened_spans` has the spans that were opened.
    Only the first `file_readers` readers have the file (None: all). Later readers have no file, like the readers of a
    blob that is passed through without being stored."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT)
        os.ftruncate(self.fd, SIZE)
        self.available = 0
        self.awaited_offsets: list[int] = []
        self.opened_spans: list[Span | None] = []
        self.file_readers: int | None = None
        self.open: set[GrowingReader] = set()
        self._error: RegistryError | None = None
        self._changed = asyncio.Condition()

    async def grow(self, to: int) -> None:
        os.pwrite(self.fd, DATA[self.available : to], self.available)
        async with self._changed:
            self.available = to
            self._changed.notify_all()

    async def fail(self, error: RegistryError) -> None:
        async with self._changed:
            self._error = error
            self._changed.notify_all()

    async def wait_until_readable(self, at: int) -> int:
        self.awaited_offsets.append(at)
        async with self._changed:
            self._changed.notify_all()
            await self._changed.wait_for(lambda: self.available > at or self._error)
        if self.available <= at and self._error is not None:
            raise self._error
        return self.available

    async def wait_for_reader(self, at: int) -> None:
        """Waits until a reader waits for the byte at the offset `at`."""
        async with self._changed:
            await self._changed.wait_for(lambda: at in self.awaited_offsets)

    async def resolve_blob(self, repo: RepositoryName, digest: Digest) -> Descriptor:
        return Descriptor(BLOB_TYPE, DIGEST, SIZE)

    async def open_blob(self, repo: RepositoryName, digest: Digest, span: Span | None = None) -> BlobReader:
        reader = GrowingReader(self, (span or Span(0)).to_offsets(SIZE))
        self.opened_spans.append(span)
        if self.file_readers is not None and len(self.opened_spans) > self.file_readers:
            reader.file = None
        self.open.add(reader)
        return reader


class GrowingReader:
    """A reader for the blob of `GrowingBlobRegistry`. It waits for bytes that have not arrived."""

    location: str | None = None
    data: bytes | None = None

    def __init__(self, blob: GrowingBlobRegistry, span: tuple[int, int]) -> None:
        self.descriptor = Descriptor(BLOB_TYPE, DIGEST, SIZE)
        self.span = span
        self.file: OpenFile | None = OpenFile(blob.fd)
        self.is_incomplete = blob.available < SIZE
        self._blob = blob

    async def readable_until(self, at: int) -> int:
        return min(await self._blob.wait_until_readable(at), self.span[1])

    async def __aiter__(self) -> AsyncIterator[bytes]:
        at, stop = self.span
        while at < stop:
            end = await self.readable_until(at)
            yield os.pread(self._blob.fd, end - at, at)
            at = end

    async def aclose(self) -> None:
        self._blob.open.discard(self)


@pytest.fixture
def blob(tmp_path: Path) -> Iterator[GrowingBlobRegistry]:
    growing = GrowingBlobRegistry(tmp_path / "partial")
    yield growing
    os.close(growing.fd)


@pytest.fixture(params=[True, False], ids=["files", "bytes"])
def client(request: pytest.FixtureRequest, blob: GrowingBlobRegistry) -> AsgiClient:
    return AsgiClient(DistributionAPI(blob), zero_copy=request.param)


async def test_a_blob_is_sent_while_it_arrives(client: AsgiClient, blob: GrowingBlobRegistry) -> None:
    """The headers are sent first. The bytes are sent as they arrive from the upstream, and the client gets the right
    content."""
    await blob.grow(100)
    async with asyncio.TaskGroup() as group:
        request_task = group.create_task(client("GET", f"{V2}/blobs/{DIGEST}"))
        for at in (100, 101, 3000):
            await blob.wait_for_reader(at)
            await blob.grow({100: 101, 101: 3000, 3000: SIZE}[at])
    answer = request_task.result()
    assert (answer.status, answer["content-length"], answer.body) == (200, str(SIZE), DATA)
    assert client.sent == [5, 4 if client.zero_copy else 0]  # the headers and four pieces, and pieces sent as a file
    assert not blob.open


async def test_headers_are_sent_before_the_first_byte_arrives(blob: GrowingBlobRegistry) -> None:
    """The status is sent before the first byte has arrived."""
    started, api = asyncio.Event(), DistributionAPI(blob)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_and_notify(message: Message) -> None:
            await send(message)
            started.set()

        await api(scope, receive, send_and_notify)

    async with asyncio.TaskGroup() as group:
        request_task = group.create_task(AsgiClient(app, zero_copy=True)("GET", f"{V2}/blobs/{DIGEST}"))
        await started.wait()
        assert blob.available == 0
        await blob.grow(SIZE)
    assert request_task.result().body == DATA


async def test_a_range_waits_only_for_its_own_bytes(client: AsgiClient, blob: GrowingBlobRegistry) -> None:
    """The response with a range waits until the bytes of the range have arrived, and not for later bytes."""
    await blob.grow(10)
    async with asyncio.TaskGroup() as group:
        request_task = group.create_task(client("GET", f"{V2}/blobs/{DIGEST}", {"Range": "bytes=500-599"}))
        await blob.wait_for_reader(500)
        await blob.grow(550)
        await blob.wait_for_reader(550)
        await blob.grow(700)
    answer = request_task.result()
    assert (answer.status, answer.body) == (206, DATA[500:600])
    assert answer["content-range"] == f"bytes 500-599/{SIZE}"


async def test_many_ranges_of_a_growing_blob(client: AsgiClient, blob: GrowingBlobRegistry) -> None:
    """The parts of a multipart response are sent as they arrive, in the requested order."""
    async with asyncio.TaskGroup() as group:
        request_task = group.create_task(client("GET", f"{V2}/blobs/{DIGEST}", {"Range": "bytes=2000-2099,0-9"}))
        await blob.wait_for_reader(2000)
        await blob.grow(2050)
        await blob.wait_for_reader(2050)
        await blob.grow(SIZE)
    answer = request_task.result()
    assert answer.status == 206
    assert DATA[2000:2100] in answer.body
    assert answer.body.count(DATA[0:10] + b"\r\n--") == 1
    assert not blob.open


async def test_ranges_of_a_blob_without_a_file_get_the_whole_blob(blob: GrowingBlobRegistry) -> None:
    """An incomplete blob without a file is downloaded once for each reader. A request for many ranges of it gets the
    whole blob, so that the request opens no reader for each range."""
    await blob.grow(100)
    blob.file_readers = 0
    client = AsgiClient(DistributionAPI(blob), zero_copy=True)
    async with asyncio.TaskGroup() as group:
        ranges = ",".join(f"{offset}-{offset}" for offset in range(90, 0, -2))
        request_task = group.create_task(client("GET", f"{V2}/blobs/{DIGEST}", {"Range": f"bytes={ranges}"}))
        await blob.wait_for_reader(100)
        await blob.grow(SIZE)
    answer = request_task.result()
    assert (answer.status, answer["content-length"], answer.body) == (200, str(SIZE), DATA)
    assert blob.opened_spans == [Span(90, 91), None]
    assert not blob.open


async def test_multipart_response_ends_early_when_the_blob_loses_its_file(blob: GrowingBlobRegistry) -> None:
    """If the disk becomes full during a response with many ranges, the remaining ranges would each be a download of
    their own. The response then ends early, after one such download was opened."""
    await blob.grow(100)
    blob.file_readers = 2
    client = AsgiClient(DistributionAPI(blob), zero_copy=True)
    answer = await client("GET", f"{V2}/blobs/{DIGEST}", {"Range": "bytes=1-1,3-3,5-5,7-7,9-9"})
    assert (answer.status, answer.whole) == (206, False)
    assert isinstance(answer.cut, PartialBlobLost)
    assert len(blob.opened_spans) == 3
    assert not blob.open


@pytest.mark.parametrize("headers", [{}, {"Range": "bytes=0-3999"}, {"Range": "bytes=0-99,200-3999"}])
async def test_a_failed_download_cuts_the_response_off(
    client: AsgiClient, blob: GrowingBlobRegistry, headers: dict[str, str]
) -> None:
    """If the download fails, the bytes that have arrived are sent. Then the response ends before its Content-Length."""
    await blob.grow(150)
    async with asyncio.TaskGroup() as group:
        request_task = group.create_task(client("GET", f"{V2}/blobs/{DIGEST}", headers))
        await blob.wait_for_reader(200 if "," in str(headers) else 150)
        error = PartialBlobLost()
        await blob.fail(error)
    answer = request_task.result()
    assert answer.cut is error
    assert not answer.whole
    assert DATA[:100] in answer.body
    assert not blob.open


@pytest.mark.parametrize(
    ("error", "level"),
    [
        (DigestInvalid(), logging.INFO),  # the code that downloads the blob has already logged this error
        (PartialBlobLost(), logging.WARNING),
        (UpstreamUnavailable("it broke off"), logging.WARNING),
        (StorageFull(), logging.ERROR),
        (StorageFailed("the file is gone"), logging.ERROR),
    ],
    ids=lambda value: getattr(value, "code", ""),
)
async def test_a_response_that_is_cut_off_is_logged_in_one_line(
    client: AsgiClient, blob: GrowingBlobRegistry, error: RegistryError, level: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A response that is cut off is logged in one line, with the reason and the request's id, and without a traceback.
    The error is marked as logged, so that the server does not log it again."""
    caplog.set_level(logging.INFO)
    await blob.grow(150)
    async with asyncio.TaskGroup() as group:
        request_task = group.create_task(client("GET", f"{V2}/blobs/{DIGEST}"))
        await blob.wait_for_reader(150)
        await blob.fail(error)
    answer = request_task.result()
    assert answer.cut is error
    assert was_logged(error)
    (record,) = [each for each in caplog.records if each.name == "registry.http"]
    assert (record.levelno, record.exc_info) == (level, None)
    assert answer["x-request-id"] in record.getMessage()
    assert error.message in record.getMessage()


@pytest.mark.slow
@pytest.mark.parametrize("has_file", [True, False])
async def test_the_reader_is_closed_when_the_client_disconnects(blob: GrowingBlobRegistry, has_file: bool) -> None:
    """If the client disconnects while no byte arrives, the blob's reader is closed."""
    blob.file_readers = None if has_file else 0
    client, disconnected = AsgiClient(DistributionAPI(blob), zero_copy=True), asyncio.Event()
    await blob.grow(100)
    running = asyncio.create_task(client("GET", f"{V2}/blobs/{DIGEST}", leaves=True, after=disconnected))
    await blob.wait_for_reader(100)
    disconnected.set()
    answer = await running
    assert (answer.status, answer.body, answer.whole) == (200, DATA[:100], False)
    assert not blob.open


@pytest.mark.slow
@pytest.mark.parametrize("has_file", [True, False])
async def test_the_reader_is_closed_when_the_client_disconnects_before_the_first_byte(
    blob: GrowingBlobRegistry, has_file: bool
) -> None:
    """If the client disconnects before the first byte has arrived, the blob's reader is closed."""
    blob.file_readers = None if has_file else 0
    client, disconnected = AsgiClient(DistributionAPI(blob), zero_copy=True), asyncio.Event()
    running = asyncio.create_task(
        client("GET", f"{V2}/blobs/{DIGEST}", {"Range": "bytes=9-"}, leaves=True, after=disconnected)
    )
    await blob.wait_for_reader(9)
    disconnected.set()
    answer = await running
    assert (answer.status, answer.body, answer.whole) == (206, b"", False)
    assert not blob.open


async def test_a_cancelled_request_is_not_taken_for_a_disconnect(blob: GrowingBlobRegistry) -> None:
    """If the server cancels the request, the cancellation is not mistaken for a disconnect of the client."""
    client = AsgiClient(DistributionAPI(blob), zero_copy=True)
    running = asyncio.create_task(client("GET", f"{V2}/blobs/{DIGEST}"))
    await blob.wait_for_reader(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not blob.open


async def test_a_complete_blob_is_sent_in_one_message(blob: GrowingBlobRegistry) -> None:
    """A complete blob is sent in one message, after one call of `readable_until`."""
    await blob.grow(SIZE)
    blob.awaited_offsets.clear()
    client = AsgiClient(DistributionAPI(blob), zero_copy=True)
    assert (await client("GET", f"{V2}/blobs/{DIGEST}")).body == DATA
    assert (client.sent, blob.awaited_offsets) == ([1, 1], [0])
