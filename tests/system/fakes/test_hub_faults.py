"""Tests of the faults that a test can set in the fake Docker Hub: connections that break or stall, wrong bytes, limits
of requests, and other statuses."""

from __future__ import annotations

import httpx2
import pytest

from tests.fakes.client_images import MIB
from tests.fakes.hub.hub import Hub, HubFailed, repeated, union
from tests.fakes.upstream_content import ImageTree
from tests.system.fakes.conftest import REPO, SIZE, ask, blob_url, body_of, manifest_url, rest


def test_the_rate_limit_counts_gets(upstream: Hub, client: httpx2.Client) -> None:
    """With a limit of two, the third GET gets 429 with Retry-After. HEAD requests do not count. Setting the limit again
    resets the count."""
    upstream.set(limit=2, retry_after=7)
    assert client.head(manifest_url(upstream)).headers["ratelimit-remaining"] == "2;w=21600"
    answers = [client.get(manifest_url(upstream)) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert [answer.headers["ratelimit-remaining"] for answer in answers] == ["1;w=21600", "0;w=21600", "0;w=21600"]
    assert answers[0].headers["ratelimit-limit"] == "2;w=21600"
    assert answers[2].headers["Retry-After"] == "7"
    assert client.head(manifest_url(upstream)).status_code == 200
    upstream.set(limit=1)
    assert client.get(manifest_url(upstream)).status_code == 200


@pytest.mark.parametrize("reset", [False, True])
def test_connection_ends_after_a_number_of_bytes(upstream: Hub, hub_image: ImageTree, reset: bool) -> None:
    """A connection can be set to end after a number of bytes of a body, normally or with a RST. All sent bytes arrive,
    and the next request succeeds."""
    layer = hub_image.layers[1]
    upstream.fault(drop_after=1_000_001, reset=reset)
    # This layer is shorter, so the fault does not apply to it.
    rest(ask(upstream, f"/v2/{REPO}/blobs/{hub_image.layers[0].digest}", "Connection: close"))
    answer, was_reset = rest(ask(upstream, f"/v2/{REPO}/blobs/{layer.digest}", "Range: bytes=9-"))
    assert was_reset is reset
    assert body_of(answer) == layer.read(9, 1_000_010)
    assert upstream.sent_ranges(layer.digest) == [(9, 1_000_010)]
    assert [request.end for request in upstream.requests("blob")] == ["whole", "dropped"]
    answer, was_reset = rest(
        ask(upstream, f"/v2/{REPO}/blobs/{layer.digest}", "Range: bytes=1000010-", "Connection: close")
    )
    assert body_of(answer) == layer.read(1_000_010)
    assert repeated(upstream.sent_ranges(layer.digest)) == []
    assert union(upstream.sent_ranges(layer.digest)) == [(9, SIZE)]


def test_wrong_bytes(upstream: Hub, client: httpx2.Client, hub_image: ImageTree) -> None:
    """A byte at one position can be made wrong. Only responses that contain this byte are changed, and only as many as
    `times` says. The same works for manifests."""
    layer = hub_image.layers[1]
    upstream.fault(corrupt=2_000_000, times=2)
    url = blob_url(upstream, layer.digest)
    assert client.get(url, headers={"Range": "bytes=0-1999999"}).content == layer.read(0, 2_000_000)
    for requested, start in (("0-", 0), ("1999990-", 1_999_990)):
        got, right = client.get(url, headers={"Range": f"bytes={requested}"}).content, layer.read(start)
        assert [start + at for at, (a, b) in enumerate(zip(got, right, strict=True)) if a != b] == [2_000_000]
    assert client.get(url).content == layer.read()
    upstream.fault(on="manifest", corrupt=3, times=None)
    assert client.get(manifest_url(upstream)).content[3] == hub_image.body[3] ^ 0xFF
    upstream.clear()
    assert client.get(manifest_url(upstream)).content == hub_image.body


def test_statuses_and_hangups(upstream: Hub, client: httpx2.Client, hub_image: ImageTree) -> None:
    """The next requests of one kind can get an error status, or no response at all. `skip` lets the first of them
    succeed. Requests of other kinds are not affected."""
    upstream.fault(on="manifest", method="", status=503, times=2, skip=1, retry_after="3")
    answers = [client.head(manifest_url(upstream)) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 503, 503, 200]
    assert answers[1].headers["Retry-After"] == "3"
    assert upstream.faults == 0
    upstream.fault(on="blob", match=hub_image.layers[0].digest, hangup=True)
    assert client.get(blob_url(upstream, hub_image.layers[1].digest)).status_code == 200
    with pytest.raises(httpx2.RemoteProtocolError):
        client.get(blob_url(upstream, hub_image.layers[0].digest))
    assert client.get(blob_url(upstream, hub_image.layers[0].digest)).status_code == 200


def test_stalled_responses(upstream: Hub, hub_image: ImageTree) -> None:
    """A response can stall before its headers or in the middle of its body, until the test releases it. The fake Hub
    notices if the client disconnects meanwhile."""
    layer = hub_image.layers[1]
    path = f"/v2/{REPO}/blobs/{layer.digest}"
    upstream.fault(stall=True, times=2)
    leaving, waiting = ask(upstream, path, "Connection: close"), ask(upstream, path, "Connection: close")
    upstream.wait(2, "blob")
    leaving.close()
    upstream.until(lambda: upstream.open == 1)
    waiting.settimeout(0.1)
    with pytest.raises(TimeoutError):
        waiting.recv(1)
    waiting.settimeout(30)
    upstream.release()
    assert body_of(rest(waiting)[0]) == layer.read()
    assert sorted(request.end for request in upstream.requests("blob")) == ["gone", "whole"]
    upstream.forget()
    upstream.fault(stall_after=70_000)
    sock = ask(upstream, path, "Connection: close")
    upstream.until(lambda: upstream.sent_ranges(layer.digest) == [(0, 70_000)])
    upstream.release()
    assert body_of(rest(sock)[0]) == layer.read()


def test_refused_connections(upstream: Hub, client: httpx2.Client) -> None:
    """The fake Hub can refuse new connections, and later accept them again at the same port. Open connections are
    reset, unless the test sets `cut=False`."""
    assert client.get(manifest_url(upstream)).status_code == 200
    upstream.refuse(cut=False)
    assert client.get(manifest_url(upstream)).status_code == 200
    upstream.cut()
    with pytest.raises(httpx2.TransportError):
        client.get(manifest_url(upstream))
    with pytest.raises(httpx2.ConnectError):
        client.get(manifest_url(upstream))
    upstream.listen()
    assert client.get(manifest_url(upstream)).status_code == 200
    assert (upstream.open, upstream.opened) == (1, 2)


def test_rate_of_a_connection(upstream: Hub, client: httpx2.Client, hub_image: ImageTree) -> None:
    """With the switch `rate`, a connection gets no more bytes per second than this rate. The fake Hub records the times
    at which a response began and ended."""
    upstream.set(rate=8 * MIB)
    digest = hub_image.layers[1].digest
    client.get(blob_url(upstream, digest), headers={"Range": f"bytes=0-{2 * MIB - 1}"})
    [request] = upstream.requests("blob")
    assert request.ended - request.first_byte >= 0.2
    # A burst may have as many bytes as the rate allows in 30 ms. So 40 ms are added to the time: these 30 ms, and a
    # margin of 10 ms.
    assert request.sent / (request.ended - request.first_byte + 0.04) < 8.5 * MIB


def test_latency(upstream: Hub, client: httpx2.Client) -> None:
    """With the switch `latency`, the first byte of each response is sent only after this number of seconds."""
    upstream.set(latency=0.05)
    client.get(manifest_url(upstream))
    [request] = upstream.requests()
    assert request.first_byte - request.begun >= 0.05


def test_responses_without_a_length(upstream: Hub, client: httpx2.Client, hub_image: ImageTree) -> None:
    """With the switch `lengths` off, responses have no Content-Length and end with their connection. A client cannot
    distinguish a dropped response from a complete one."""
    upstream.set(lengths=False)
    layer = hub_image.layers[1]
    got = client.get(blob_url(upstream, layer.digest), headers={"Range": "bytes=7-"})
    assert got.content == layer.read(7)
    assert "Content-Length" not in got.headers
    assert "Content-Length" not in client.head(manifest_url(upstream)).headers
    upstream.fault(drop_after=99)
    assert client.get(blob_url(upstream, layer.digest)).content == layer.read(0, 99)


def test_ranges_at_another_offset(upstream: Hub, client: httpx2.Client, hub_image: ImageTree) -> None:
    """A response can begin at another offset than requested. Content-Range has the real offset, and the fake Hub
    records the bytes that it has sent."""
    layer = hub_image.layers[1]
    upstream.fault(shift=10)
    got = client.get(blob_url(upstream, layer.digest), headers={"Range": "bytes=7-99"})
    assert got.headers["Content-Range"] == f"bytes 17-99/{SIZE}"
    assert got.content == layer.read(17, 100)
    assert upstream.sent_ranges(layer.digest) == [(17, 100)]


def test_unknown_switches_and_faults_are_errors(upstream: Hub) -> None:
    """An unknown switch or fault raises an error in the call that sets it."""
    with pytest.raises(HubFailed, match="no switch ratte"):
        upstream.set(ratte=1)
    with pytest.raises(TypeError, match="dorp"):
        upstream.fault(dorp=1)
