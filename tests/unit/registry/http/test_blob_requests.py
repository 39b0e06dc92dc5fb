"""Requests for blobs: for a whole blob, for ranges, and with conditions (RFC 9110, sections 13 and 14)."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator

import pytest

from registry.http import DistributionAPI, RequestLimits
from storage.content import BLOB_TYPE, Descriptor, OpenFile, Span
from storage.interface import BlobReader
from storage.memory_registry import MemoryRegistry
from storage.names import Digest, RepositoryName
from storage.wrappers import RefusingRegistry
from tests.fakes.asgi_client import AsgiAnswer, AsgiClient
from tests.unit.registry.conftest import V2, put_blob

DATA = bytes(range(256)) * 8
SIZE = len(DATA)


@pytest.fixture
async def path(registry: MemoryRegistry) -> str:
    return f"{V2}/blobs/{await put_blob(registry, DATA)}"


def parts_of(answer: AsgiAnswer) -> list[tuple[dict[str, str], bytes]]:
    """Parses a multipart body. Returns the headers and the content of each part."""
    kind, _, boundary = answer["content-type"].partition("; boundary=")
    assert kind == "multipart/byteranges"
    first, *middle, last = (b"\r\n" + answer.body.removeprefix(b"\r\n")).split(b"\r\n--" + boundary.encode())
    assert (first, last) == (b"", b"--\r\n")
    parts = []
    for part in middle:
        head, _, content = part.partition(b"\r\n\r\n")
        lines = head.removeprefix(b"\r\n").decode("ascii").split("\r\n")
        parts.append((dict(line.split(": ", 1) for line in lines), content))
    return parts


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
@pytest.mark.parametrize("data", [b"", b"x", DATA, b"\xff" * (5 << 19)], ids=["empty", "one", "some", "chunks"])
async def test_get_and_head_agree(client: AsgiClient, registry: MemoryRegistry, data: bytes, algorithm: str) -> None:
    """GET and HEAD have the same headers."""
    digest = await put_blob(registry, data, algorithm=algorithm)
    get_answer = await client("GET", f"{V2}/blobs/{digest}")
    head_answer = await client("HEAD", f"{V2}/blobs/{digest}")
    assert get_answer.body == data
    for answer in (get_answer, head_answer):
        assert answer.status == 200
        assert answer["docker-content-digest"] == digest
        assert answer["etag"] == f'"{digest}"'
        assert answer["content-length"] == str(len(data))
        assert answer["content-type"] == "application/octet-stream"
        assert answer["cache-control"] == "max-age=31536000, immutable"
        assert answer["accept-ranges"] == "bytes"
        assert "content-encoding" not in answer


@pytest.mark.parametrize(
    ("range_header", "start", "stop"),
    [
        ("bytes=500-1499", 500, 1500),
        ("bytes=500-", 500, SIZE),
        ("bytes=-500", SIZE - 500, SIZE),
        ("bytes=-999999", 0, SIZE),
        ("bytes=2000-999999", 2000, SIZE),
        ("bytes=0-0", 0, 1),
        ("bytes=0-", 0, SIZE),
        (f"bytes={SIZE - 1}-", SIZE - 1, SIZE),
        ("BYTES = 5-6 ", 5, 7),
        ("bytes=,5-6,", 5, 7),
        ("bytes=5-6,90000-", 5, 7),
        (f"bytes=0-{'9' * 4000}", 0, SIZE),
    ],
)
async def test_one_range(client: AsgiClient, path: str, range_header: str, start: int, stop: int) -> None:
    """A range gets 206 with exactly its bytes. A range that ends beyond the blob is cut."""
    answer = await client("GET", path, {"Range": range_header})
    assert answer.status == 206
    assert answer.body == DATA[start:stop]
    assert answer["content-range"] == f"bytes {start}-{stop - 1}/{SIZE}"


@pytest.mark.parametrize(
    "range_header",
    [
        *("bytes=5000-10000", "bytes=500-0", f"bytes={SIZE}-", "bytes=-0", f"bytes={'9' * 4000}-"),
        *("bytes=5000-6000,7000-8000", "bytes=-0,9000-"),
    ],
)
async def test_a_range_outside_is_416(client: AsgiClient, path: str, range_header: str) -> None:
    """A range outside of the blob gets 416 with the blob's size."""
    answer = await client("GET", path, {"Range": range_header})
    assert (answer.status, answer.code) == (416, "BLOB_UPLOAD_INVALID")
    assert answer["content-range"] == f"bytes */{SIZE}"


@pytest.mark.parametrize(
    "range_header",
    ["lines=0-5", "bytes=a-b", "bytes=5", "bytes=-", "bytes=", "bytes 0-5", "bytes=0-1,x", "bytes=1--2", "\xb2"],
)
async def test_a_range_that_cannot_be_parsed_is_ignored(client: AsgiClient, path: str, range_header: str) -> None:
    """A Range header with another unit or bad syntax is ignored (RFC 9110, 14.2)."""
    answer = await client("GET", path, {"Range": range_header})
    assert (answer.status, answer.body) == (200, DATA)


async def test_two_range_fields_are_ignored(client: AsgiClient, path: str) -> None:
    """Two Range headers are both ignored, because the value of Range is not a list."""
    answer = await client("GET", path, [("Range", "bytes=0-1"), ("Range", "bytes=2-3")])
    assert (answer.status, answer.body) == (200, DATA)


async def test_head_ignores_range(client: AsgiClient, path: str) -> None:
    """HEAD ignores Range, because Range has a meaning only for GET."""
    answer = await client("HEAD", path, {"Range": "bytes=0-1"})
    assert (answer.status, answer["content-length"]) == (200, str(SIZE))


async def test_several_ranges_are_sent_as_parts(client: AsgiClient, path: str) -> None:
    """Several ranges are sent as parts in the requested order."""
    answer = await client("GET", path, {"Range": "bytes=100-199, 0-9 ,-5,99999-,1000-1000"})
    assert answer.status == 206
    assert "content-range" not in answer
    spans = [(100, 200), (0, 10), (SIZE - 5, SIZE), (1000, 1001)]
    assert parts_of(answer) == [
        (
            {"content-type": "application/octet-stream", "content-range": f"bytes {start}-{stop - 1}/{SIZE}"},
            DATA[start:stop],
        )
        for start, stop in spans
    ]


async def test_a_thousand_ranges_are_served(client: AsgiClient, path: str) -> None:
    """1024 ranges are served, because clients that read parts of layers request so many."""
    range_header = "bytes=" + ",".join(f"{index * 2}-{index * 2}" for index in range(1024))
    answer = await client("GET", path, {"Range": range_header})
    assert [content for _, content in parts_of(answer)] == [DATA[index * 2 : index * 2 + 1] for index in range(1024)]


async def test_too_many_ranges_are_400(registry: MemoryRegistry, path: str) -> None:
    """Too many ranges get 400, because clients then retry with fewer ranges."""
    client = AsgiClient(DistributionAPI(registry, limits=RequestLimits(ranges_per_request=3)))
    assert (await client("GET", path, {"Range": "bytes=0-0,2-2,4-4"})).status == 206
    answer = await client("GET", path, {"Range": "bytes=0-0,2-2,4-4,6-6"})
    assert (answer.status, answer.code) == (400, "UNSUPPORTED")


async def test_overlapping_ranges_never_send_more_than_the_blob(client: AsgiClient, path: str) -> None:
    """If the ranges together are longer than the blob, the whole blob is sent once (RFC 9110, 14.2)."""
    answer = await client("GET", path, {"Range": "bytes=" + ",".join(["0-"] * 500)})
    assert (answer.status, answer.body) == (200, DATA)


@pytest.mark.parametrize(("validator", "status"), [('"{}"', 206), ('W/"{}"', 200), ("{}", 200), ('"other"', 200)])
async def test_if_range(client: AsgiClient, path: str, validator: str, status: int) -> None:
    """The range is sent only if If-Range is the blob's strong ETag (RFC 9110, 13.1.5)."""
    tag = validator.format(path.rpartition("/")[2])
    answer = await client("GET", path, {"Range": "bytes=0-4", "If-Range": tag})
    assert answer.status == status


async def test_if_range_with_a_date_never_matches(client: AsgiClient, path: str) -> None:
    """A date in If-Range never matches, because blobs have no Last-Modified."""
    headers = {"Range": "bytes=0-4", "If-Range": "Sun, 06 Nov 1994 08:49:37 GMT"}
    assert (await client("GET", path, headers)).status == 200


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_not_modified(client: AsgiClient, path: str, method: str) -> None:
    """If-None-Match with the blob's ETag or `*` gets 304."""
    digest = path.rpartition("/")[2]
    for etags in (f'"{digest}"', f'W/"{digest}"', f'"a", "{digest}"', "*"):
        answer = await client(method, path, {"If-None-Match": etags, "Range": "bytes=0-1"})
        assert (answer.status, answer["etag"]) == (304, f'"{digest}"')
    for etags in ('"other"', digest, "", "W/"):
        assert (await client(method, path, {"If-None-Match": etags})).status == 200


async def test_if_match_that_fails_is_412(client: AsgiClient, path: str) -> None:
    """If-Match with another ETag gets 412."""
    assert (await client("GET", path, {"If-Match": '"other"'})).status == 412
    assert (await client("GET", path, {"If-Match": f'"{path.rpartition("/")[2]}"'})).status == 200
    assert (await client("GET", path, {"If-Match": "*"})).status == 200


async def test_a_missing_blob_is_404_whatever_the_conditions(client: AsgiClient) -> None:
    """A missing blob gets 404, whatever conditions the client sends."""
    absent = f"{V2}/blobs/sha256:{'0' * 64}"
    assert (await client("GET", absent, {"If-None-Match": "*"})).status == 404
    assert (await client("GET", absent, {"Range": "bytes=0-1,3-4"})).status == 404


async def test_delete(client: AsgiClient, path: str) -> None:
    """A DELETE gets 202. The next request for the blob gets 404."""
    assert (await client("DELETE", path)).status == 202
    assert (await client("GET", path)).status == 404
    assert (await client("DELETE", path)).status == 404


class EndlessReader:
    """A reader for a blob of a tebibyte. At the third chunk, it sets `disconnected`, and the client disconnects."""

    def __init__(self, disconnected: asyncio.Event) -> None:
        self.descriptor = Descriptor(BLOB_TYPE, Digest("sha256:" + "a" * 64), 1 << 40)
        self.span = (0, 1 << 40)
        self.file: OpenFile | None = None
        self.location: str | None = None
        self.is_incomplete = False
        self.data: bytes | None = None
        self.disconnected = disconnected
        self.read = 0
        self.closed = False

    async def readable_until(self, at: int) -> int:
        return self.span[1]

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            self.read += 1
            if self.read == 3:
                self.disconnected.set()
            await asyncio.sleep(0)
            yield bytes(1024)

    async def aclose(self) -> None:
        self.closed = True


class EndlessRegistry(RefusingRegistry):
    """A registry that returns the `EndlessReader` for every blob."""

    def __init__(self, reader: EndlessReader) -> None:
        self.reader = reader

    async def open_blob(self, repo: RepositoryName, digest: Digest, span: Span | None = None) -> BlobReader:
        return self.reader


async def test_reading_stops_when_the_client_has_left() -> None:
    """After the client has disconnected, reading stops and the reader is closed."""
    disconnected = asyncio.Event()
    reader = EndlessReader(disconnected)
    answer = await AsgiClient(DistributionAPI(EndlessRegistry(reader)))(
        "GET", f"{V2}/blobs/{reader.descriptor.digest}", leaves=True, after=disconnected
    )
    assert answer.status == 200
    assert not answer.whole
    assert reader.read < 10
    assert reader.closed


async def test_the_boundary_differs_each_time(client: AsgiClient, path: str) -> None:
    """The boundary of multipart bodies is random. Otherwise somebody could push a blob that contains the boundary of a
    later response."""
    kinds = {(await client("GET", path, {"Range": "bytes=0-0,2-2"}))["content-type"] for _ in range(5)}
    assert len(kinds) == 5
    assert all(re.fullmatch(r"multipart/byteranges; boundary=[0-9a-f]{32}", kind) for kind in kinds)
