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


def get(client: httpx2.Client, path: str, asked: str, **more: str) -> httpx2.Response:
    headers = {name.replace("_", "-"): value for name, value in more.items()}
    return client.get(path, headers={"Range": asked, **headers})


def parts_of(answer: httpx2.Response) -> list[Message]:
    """Returns the parts, as a MIME parser finds them."""
    kind = answer.headers["content-type"]
    document = BytesParser().parsebytes(b"Content-Type: " + kind.encode() + b"\r\n\r\n" + answer.content)
    assert document.get_content_type() == "multipart/byteranges"
    parts = document.get_payload()
    assert isinstance(parts, list)
    return [part for part in parts if isinstance(part, Message)]


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
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
def test_a_range(client: httpx2.Client, blob: str, asked: str, start: int, stop: int) -> None:
    """A range gets 206 with those bytes, Content-Range and Content-Length. An end beyond the blob is cut to it (14.1.2,
    15.3.7)."""
    answer = get(client, blob, asked)
    assert answer.status_code == 206
    assert answer.content == DATA[start:stop]
    assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{SIZE}"
    assert answer.headers["content-length"] == str(stop - start)
    assert answer.headers["docker-content-digest"] in blob


@pytest.mark.parametrize("asked", ["bytes=500-0", f"bytes={SIZE}-", f"bytes={SIZE * 9}-{SIZE * 10}", "bytes=-0"])
def test_a_range_outside(client: httpx2.Client, blob: str, asked: str) -> None:
    """A range that ends before it starts, or starts beyond the end, gets 416 with the blob's size (15.5.17)."""
    answer = get(client, blob, asked)
    assert answer.status_code == 416
    assert answer.headers["content-range"] == f"bytes */{SIZE}"
    assert client.get(blob).content == DATA


@pytest.mark.parametrize(
    "asked", ["lines=1-2", "bytes", "bytes=", "bytes=a-b", "bytes=1", "bytes=1-2-3", "bytes=--1", "0-5"]
)
def test_a_range_that_cannot_be_read(client: httpx2.Client, blob: str, asked: str) -> None:
    """A Range with an unknown unit or of a malformed form is ignored: the response is 200 with the whole blob
    (14.2)."""
    answer = get(client, blob, asked)
    assert answer.status_code == 200
    assert answer.content == DATA


def test_an_empty_blob_has_no_range(push: Pusher, algorithm: str) -> None:
    """No range lies inside a blob of zero bytes: 416 (14.1.2)."""
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
    """Ranges outside the blob are left out if another one lies inside. If only one is left, the response is a plain 206
    (14.2, 15.3.7.2)."""
    answer = get(client, blob, f"bytes={SIZE}-,3-4")
    assert answer.status_code == 206
    assert answer.content == DATA[3:5]
    assert answer.headers["content-range"] == f"bytes 3-4/{SIZE}"


def test_several_ranges_outside(client: httpx2.Client, blob: str) -> None:
    """If none of several ranges lies inside the blob, the response is 416 (15.5.17)."""
    answer = get(client, blob, f"bytes={SIZE}-,{SIZE + 5}-{SIZE + 9}")
    assert answer.status_code == 416
    assert answer.headers["content-range"] == f"bytes */{SIZE}"


def test_ranges_that_ask_for_more_than_all(client: httpx2.Client, blob: str) -> None:
    """Overlapping ranges that add up to more than the blob get the blob once, so that no client can make the server
    send more (17.15)."""
    answer = get(client, blob, "bytes=0-,0-,0-")
    assert answer.status_code == 200
    assert answer.content == DATA


def test_too_many_ranges(client: httpx2.Client, blob: str) -> None:
    """A thousand ranges and more get 400; clients then request fewer (17.15)."""
    assert get(client, blob, "bytes=" + ",".join(["0-0"] * 1025)).status_code == 400
    assert get(client, blob, "bytes=" + ",".join(f"{n}-{n}" for n in range(1024))).status_code == 206


def test_if_range(client: httpx2.Client, blob: str) -> None:
    """Range counts only if If-Range names this content; otherwise the whole blob is sent (13.1.5)."""
    etag = client.head(blob).headers["etag"]
    assert get(client, blob, "bytes=1-2", If_Range=etag).status_code == 206
    for validator in ('"other"', f"W/{etag}", "Thu, 01 Jan 1970 00:00:00 GMT"):
        answer = get(client, blob, "bytes=1-2", If_Range=validator)
        assert answer.status_code == 200
        assert answer.content == DATA


def test_head_knows_no_range(client: httpx2.Client, blob: str) -> None:
    """Range is for GET: the response to HEAD describes the whole blob (14.2)."""
    answer = client.head(blob, headers={"Range": "bytes=1-2"})
    assert answer.status_code == 200
    assert answer.headers["content-length"] == str(SIZE)
    assert answer.headers["accept-ranges"] == "bytes"


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_if_none_match(push: Pusher, algorithm: str, method: str) -> None:
    """The ETag is the quoted digest. A request with it in If-None-Match gets 304 without a body (13.1.2)."""
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
    """If-None-Match with the former content of a tag gets the new content (13.1.2)."""
    push.tag("moving")
    path = f"{push.root}/manifests/moving"
    etag = push.client.head(path).headers["etag"]
    body = push.tag("moving")
    answer = push.client.get(path, headers={"If-None-Match": etag})
    assert answer.status_code == 200
    assert answer.content == body


def test_caches(push: Pusher, algorithm: str) -> None:
    """Content requested by digest may be cached for ever; a tag has to be revalidated each time (RFC 9111, 5.2.2)."""
    blob = push.blob(DATA, algorithm)
    manifest = push.put(push.image(algorithm), algorithm=algorithm)
    push.tag("moving")
    for path in (f"blobs/{blob}", f"manifests/{manifest}"):
        assert push.client.get(f"{push.root}/{path}").headers["cache-control"] == "max-age=31536000, immutable"
    for path in ("manifests/moving", "tags/list", f"referrers/{manifest}"):
        assert push.client.get(f"{push.root}/{path}").headers["cache-control"] == "no-cache"
    assert push.client.get(f"{push.root}/manifests/missing").headers["cache-control"] == "no-store"
