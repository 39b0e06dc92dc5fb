"""Spec, "Pulling blobs": Range (RFC 9110, section 14) and conditions (section 13)."""

from __future__ import annotations

from email.message import Message
from email.parser import BytesParser

import httpx2
import pytest

from tests.conformance.pusher import Pusher

DATA = bytes(range(256)) * 20
SIZE = len(DATA)


@pytest.fixture
def blob(push: Pusher, algorithm: str) -> str:
    return f"{push.root}/blobs/{push.blob(DATA, algorithm)}"


def get(client: httpx2.Client, path: str, range_header: str, **more: str) -> httpx2.Response:
    headers = {name.replace("_", "-"): value for name, value in more.items()}
    return client.get(path, headers={"Range": range_header, **headers})


def parts_of(answer: httpx2.Response) -> list[Message]:
    """Returns the parts of a multipart response, as Python's MIME parser reads them."""
    kind = answer.headers["content-type"]
    document = BytesParser().parsebytes(b"Content-Type: " + kind.encode() + b"\r\n\r\n" + answer.content)
    assert document.get_content_type() == "multipart/byteranges"
    parts = document.get_payload()
    assert isinstance(parts, list)
    return [part for part in parts if isinstance(part, Message)]


@pytest.mark.parametrize(
    ("range_header", "start", "stop"),
    [
        ("bytes=500-1499", 500, 1500),
        ("bytes=500-", 500, SIZE),
        ("bytes=-500", SIZE - 500, SIZE),
        ("bytes=0-0", 0, 1),
        ("bytes=0-", 0, SIZE),
        ("bytes=-1", SIZE - 1, SIZE),
        (f"bytes={SIZE - 1}-", SIZE - 1, SIZE),
        (f"bytes=500-{SIZE * 2}", 500, SIZE),
        (f"bytes=-{SIZE * 2}", 0, SIZE),
    ],
)
def test_a_range(client: httpx2.Client, blob: str, range_header: str, start: int, stop: int) -> None:
    """A request for a range gets 206 with its bytes, Content-Range and Content-Length. A range that ends after the end
    of the blob is shortened to the blob's end (14.1.2, 15.3.7)."""
    answer = get(client, blob, range_header)
    assert answer.status_code == 206
    assert answer.content == DATA[start:stop]
    assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{SIZE}"
    assert answer.headers["content-length"] == str(stop - start)
    assert answer.headers["docker-content-digest"] in blob


@pytest.mark.parametrize("range_header", ["bytes=500-0", f"bytes={SIZE}-", f"bytes={SIZE * 9}-{SIZE * 10}", "bytes=-0"])
def test_a_range_outside(client: httpx2.Client, blob: str, range_header: str) -> None:
    """A range that ends before its start, or starts after the end of the blob, gets 416. The response has the size of
    the blob (15.5.17)."""
    answer = get(client, blob, range_header)
    assert answer.status_code == 416
    assert answer.headers["content-range"] == f"bytes */{SIZE}"
    assert client.get(blob).content == DATA


@pytest.mark.parametrize(
    "range_header", ["lines=1-2", "bytes", "bytes=", "bytes=a-b", "bytes=1", "bytes=1-2-3", "bytes=--1", "0-5"]
)
def test_a_range_that_cannot_be_read(client: httpx2.Client, blob: str, range_header: str) -> None:
    """A Range with an unknown unit or of a malformed form is ignored: the response is 200 with the whole blob
    (14.2)."""
    answer = get(client, blob, range_header)
    assert answer.status_code == 200
    assert answer.content == DATA


def test_an_empty_blob_has_no_range(push: Pusher, algorithm: str) -> None:
    """Any range of an empty blob gets 416 (14.1.2)."""
    path = f"{push.root}/blobs/{push.blob(b'', algorithm)}"
    answer = get(push.client, path, "bytes=0-")
    assert answer.status_code == 416
    assert answer.headers["content-range"] == "bytes */0"


def test_several_ranges(client: httpx2.Client, blob: str) -> None:
    """Several ranges get multipart/byteranges in the requested order, each part with its Content-Range (14.6)."""
    spans = [(10, 20), (100, 101), (5, 8), (SIZE - 7, SIZE)]
    answer = get(client, blob, "bytes=10-19, 100-100,5-7, -7")
    assert answer.status_code == 206
    assert "content-range" not in answer.headers
    assert int(answer.headers["content-length"]) == len(answer.content)
    parts = parts_of(answer)
    assert [part["content-range"] for part in parts] == [f"bytes {a}-{b - 1}/{SIZE}" for a, b in spans]
    assert [part.get_payload(decode=True) for part in parts] == [DATA[a:b] for a, b in spans]


def test_several_ranges_of_which_one_lies_inside(client: httpx2.Client, blob: str) -> None:
    """Of several ranges, those outside the blob are ignored. If only one range is left, the response is not multipart
    (14.2, 15.3.7.2)."""
    answer = get(client, blob, f"bytes={SIZE}-,3-4")
    assert answer.status_code == 206
    assert answer.content == DATA[3:5]
    assert answer.headers["content-range"] == f"bytes 3-4/{SIZE}"


def test_several_ranges_outside(client: httpx2.Client, blob: str) -> None:
    """If all of several ranges are outside the blob, the response is 416 (15.5.17)."""
    answer = get(client, blob, f"bytes={SIZE}-,{SIZE + 5}-{SIZE + 9}")
    assert answer.status_code == 416
    assert answer.headers["content-range"] == f"bytes */{SIZE}"


def test_overlapping_ranges_larger_than_the_blob(client: httpx2.Client, blob: str) -> None:
    """If overlapping ranges have more bytes than the blob, the response is 200 with the whole blob. So no client can
    make the server send more bytes than the blob has (17.15)."""
    answer = get(client, blob, "bytes=0-,0-,0-")
    assert answer.status_code == 200
    assert answer.content == DATA


def test_too_many_ranges(client: httpx2.Client, blob: str) -> None:
    """A request with more than 1024 ranges gets 400 (17.15)."""
    assert get(client, blob, "bytes=" + ",".join(["0-0"] * 1025)).status_code == 400
    assert get(client, blob, "bytes=" + ",".join(f"{n}-{n}" for n in range(1024))).status_code == 206


def test_if_range(client: httpx2.Client, blob: str) -> None:
    """With If-Range, Range counts only if If-Range has the ETag of the blob. Otherwise the response is the whole blob
    (13.1.5)."""
    etag = client.head(blob).headers["etag"]
    assert get(client, blob, "bytes=1-2", If_Range=etag).status_code == 206
    for validator in ('"other"', f"W/{etag}", "Thu, 01 Jan 1970 00:00:00 GMT"):
        answer = get(client, blob, "bytes=1-2", If_Range=validator)
        assert answer.status_code == 200
        assert answer.content == DATA


def test_head_describes_the_whole_blob(client: httpx2.Client, blob: str) -> None:
    """HEAD ignores Range: its response describes the whole blob (14.2)."""
    answer = client.head(blob, headers={"Range": "bytes=1-2"})
    assert answer.status_code == 200
    assert answer.headers["content-length"] == str(SIZE)
    assert answer.headers["accept-ranges"] == "bytes"


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_if_none_match(push: Pusher, algorithm: str, method: str) -> None:
    """The ETag is the digest in quotes. A request with this ETag in If-None-Match gets 304 without a body (13.1.2)."""
    blob = push.blob(DATA, algorithm)
    manifest = push.put(push.image(algorithm), algorithm=algorithm)
    push.tag("moving")
    paths = [f"blobs/{blob}", f"manifests/{manifest}", "manifests/moving"]
    for path in (f"{push.root}/{path}" for path in paths):
        first = push.client.request(method, path)
        etag = first.headers["etag"]
        assert etag == f'"{first.headers["docker-content-digest"]}"'
        for condition in (etag, f"W/{etag}", "*", f'"other", {etag}'):
            answer = push.client.request(method, path, headers={"If-None-Match": condition})
            assert answer.status_code == 304
            assert answer.content == b""
            assert answer.headers["etag"] == etag
            assert answer.headers["cache-control"] == first.headers["cache-control"]
        assert push.client.request(method, path, headers={"If-None-Match": '"other"'}).status_code == 200


def test_a_moved_tag_is_sent_again(push: Pusher) -> None:
    """If a tag has moved, a request with the old ETag in If-None-Match gets 200 with the new manifest (13.1.2)."""
    push.tag("moving")
    path = f"{push.root}/manifests/moving"
    etag = push.client.head(path).headers["etag"]
    body = push.tag("moving")
    answer = push.client.get(path, headers={"If-None-Match": etag})
    assert answer.status_code == 200
    assert answer.content == body


def test_cache_control_of_content(push: Pusher, algorithm: str) -> None:
    """A cache may use the response to a request by digest for a year without asking again. It must revalidate tags and
    lists for each request, and must not store errors (RFC 9111, 5.2.2)."""
    blob = push.blob(DATA, algorithm)
    manifest = push.put(push.image(algorithm), algorithm=algorithm)
    push.tag("moving")
    for path in (f"blobs/{blob}", f"manifests/{manifest}"):
        assert push.client.get(f"{push.root}/{path}").headers["cache-control"] == "max-age=31536000, immutable"
    for path in ("manifests/moving", "tags/list", f"referrers/{manifest}"):
        assert push.client.get(f"{push.root}/{path}").headers["cache-control"] == "no-cache"
    assert push.client.get(f"{push.root}/manifests/missing").headers["cache-control"] == "no-store"
