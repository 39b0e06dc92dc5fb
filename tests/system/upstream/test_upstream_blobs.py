"""Tests of downloads of blobs with the upstream client: whole blobs, ranges, unknown blobs, and several endpoints. The
downloaded bytes go to a sink, an object that the caller passes to `fetch_blob`."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from registry.mirror.upstream_client import (
    BlobLengthWrong,
    BlobSizeUnknown,
    RangesUnsupported,
    UnconfirmedBlobUnknown,
)
from registry.upstream import transport
from storage.content import Span
from storage.errors import BlobUnknown, UpstreamUnavailable
from storage.names import Digest
from storage.store.stored_registry import StoredRegistry
from tests.fakes.hub.hub import Hub, hub
from tests.fakes.upstream_content import ImageTree, UpstreamContent
from tests.fakes.upstream_source import (
    ABSENT,
    REPO,
    CollectingSink,
    always,
    answer,
    fetch,
    scripted_server,
    upstream_source,
)


async def test_whole_blob(registry: StoredRegistry, upstream: Hub, image: ImageTree) -> None:
    """A whole blob is requested without Range. The sink first gets the endpoint and the size, and then all bytes in
    order."""
    layer = image.layers[1]
    async with upstream_source(registry, upstream.url) as source:
        sink = await fetch(source, layer.digest)
    assert bytes(sink.body) == layer.read()
    assert sink.begin_calls == [(upstream.url, 0, layer.size, layer.size)]
    (request,) = upstream.requests("blob")
    assert request.range == ""
    assert request.headers["accept-encoding"] == "identity"
    assert request.headers["user-agent"].startswith("entrepot/")


@pytest.mark.parametrize(
    ("span", "range_header"),
    [
        (Span(0, 5), "bytes=0-4"),
        (Span(7), "bytes=7-"),
        (Span(3_000_000, 3_000_001), "bytes=3000000-3000000"),
        (Span(-9), "bytes=-9"),
    ],
)
async def test_range_of_a_blob(
    registry: StoredRegistry, upstream: Hub, image: ImageTree, span: Span, range_header: str
) -> None:
    """A span of a blob is requested with Range, and the sink gets exactly its bytes."""
    layer = image.layers[1]
    start, stop = span.to_offsets(layer.size)
    async with upstream_source(registry, upstream.url) as source:
        sink = await fetch(source, layer.digest, span)
    assert bytes(sink.body) == layer.read(start, stop)
    assert sink.begin_calls == [(upstream.url, start, stop, layer.size)]
    assert upstream.requests("blob")[0].range == range_header


async def test_an_empty_blob(registry: StoredRegistry) -> None:
    """For an empty blob, the sink gets the endpoint and the size 0, and no bytes."""
    async with scripted_server(lambda head: answer(200)) as server, upstream_source(registry, server.url) as source:
        for span in (Span(0), Span(0, 0)):
            sink = await fetch(source, ABSENT, span)
            assert (bytes(sink.body), sink.begin_calls) == (b"", [(server.url, 0, 0, 0)])
        assert "range:" not in "".join(server.heads).lower()
        assert server.connections == 1


async def test_connections_are_reused(registry: StoredRegistry, upstream: Hub, image: ImageTree) -> None:
    """After a completely read piece, the connection is reused for the next piece, also the connection to the target of
    a redirect."""
    upstream.set(redirects=True)
    layer = image.layers[1]
    async with upstream_source(registry, upstream.url) as source:
        for start in range(0, 1000, 100):
            await fetch(source, layer.digest, Span(start, start + 100))
        await fetch(source, layer.digest)
        await fetch(source, image.config.digest)
        assert upstream.opened == 2


async def test_connection_that_was_idle_for_long_is_not_reused(
    registry: StoredRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that was idle for longer than MAX_IDLE_SECONDS is closed and not reused, because a NAT gateway may
    have forgotten it. The time of the download before does not count."""
    monkeypatch.setattr(transport, "MAX_IDLE_SECONDS", 0.5)

    async def reply(head: str) -> bytes:
        await asyncio.sleep(0.6)
        return answer(200, "0123456789")

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        await fetch(source, ABSENT)
        await fetch(source, ABSENT)
        assert server.connections == 1
        await asyncio.sleep(0.6)
        await fetch(source, ABSENT)
        assert server.connections == 2


async def test_redirect_targets_get_no_authorization(registry: StoredRegistry, upstream: Hub, image: ImageTree) -> None:
    """The token is sent to the registry only, and not to the target of a redirect, which would refuse it."""
    upstream.set(auth="bearer", redirects=True)
    async with upstream_source(registry, upstream.url) as source:
        sink = await fetch(source, image.layers[1].digest)
    assert bytes(sink.body) == image.layers[1].read()
    assert [request.authorization for request in upstream.requests("blob")] == [False]
    assert all(request.authorization for request in upstream.requests("redirect") if request.status == 307)


async def test_token_can_expire_between_two_pieces(registry: StoredRegistry, upstream: Hub, image: ImageTree) -> None:
    """If a piece gets a 401 because the token has expired, the client gets a new token and sends the request again. The
    sink gets all bytes."""
    upstream.set(auth="bearer", token_uses=1)
    layer, body = image.layers[1], b""
    async with upstream_source(registry, upstream.url) as source:
        for start in range(0, layer.size, 1 << 20):
            sink = await fetch(source, layer.digest, Span(start, min(start + (1 << 20), layer.size)))
            body += bytes(sink.body)
    assert body == layer.read()
    assert upstream.count("token") == 4


async def test_upstream_without_range_support(registry: StoredRegistry, upstream: Hub, image: ImageTree) -> None:
    """If the upstream does not support Range, a request for a span raises RangesUnsupported before the sink is called.
    The whole blob can be fetched."""
    upstream.set(ranges=False)
    async with upstream_source(registry, upstream.url) as source:
        for span in (Span(5), Span(5, 10), Span(0, 10)):
            sink = CollectingSink()
            with pytest.raises(RangesUnsupported):
                await source.fetch_blob(REPO, Digest(image.layers[1].digest), span, sink)
            assert sink.begin_calls == []
        sink = await fetch(source, image.layers[1].digest, Span(0, image.layers[1].size))
        assert bytes(sink.body) == image.layers[1].read()


async def test_blob_without_content_length(registry: StoredRegistry, upstream: Hub, image: ImageTree) -> None:
    """If the upstream sends no Content-Length, the client requests the whole blob as a range, and gets the size from
    Content-Range. If the upstream does not support Range either, the size is the one that the caller expects. Without
    it, the download fails."""
    upstream.set(lengths=False)
    layer = image.layers[1]
    async with upstream_source(registry, upstream.url) as source:
        sink = await fetch(source, layer.digest)
        assert bytes(sink.body) == layer.read()
        upstream.set(ranges=False)
        with pytest.raises(UpstreamUnavailable, match="how long"):
            await fetch(source, layer.digest)
        sink = await fetch(source, layer.digest, expected_size=layer.size)
        assert bytes(sink.body) == layer.read()
        assert sink.begin_calls == [(upstream.url, 0, layer.size, layer.size)]
        with pytest.raises(RangesUnsupported):
            await fetch(source, layer.digest, Span(5), expected_size=layer.size)


def chunked(*chunks: bytes, media_type: str = "application/octet-stream") -> bytes:
    """Returns a response in chunks, without a length."""
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {media_type}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    return head + b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in (*chunks, b""))


@pytest.mark.parametrize("ranges", ["ignored", "refused"])
async def test_chunked_blob_of_the_expected_size(registry: StoredRegistry, ranges: str) -> None:
    """A whole blob without a stated length is received in chunks, whether the upstream ignores ranges or refuses them.
    Its connection is reused for the next blob. An empty blob is received, too."""

    def reply(head: str) -> bytes:
        return answer(416) if ranges == "refused" and "range:" in head.lower() else response

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        for body in (b"12345", b"1", b""):
            response = chunked(*([body] if body else []))
            sink = await fetch(source, ABSENT, expected_size=len(body))
            assert (bytes(sink.body), sink.begin_calls) == (body, [(server.url, 0, len(body), len(body))])
        assert server.connections == 4  # one that is reused, and one for each first request, which is broken off


@pytest.mark.parametrize(("body", "expected_size"), [(b"12345", 6), (b"12345", 4), (b"12345", 0), (b"", 1)])
async def test_chunked_blob_of_another_size(registry: StoredRegistry, body: bytes, expected_size: int) -> None:
    """If a blob without a stated length is shorter or longer than expected, the download raises BlobLengthWrong. The
    sink gets no byte beyond the expected size."""
    response = chunked(*([body] if body else []))
    async with scripted_server(always(response)) as server, upstream_source(registry, server.url) as source:
        sink = CollectingSink()
        with pytest.raises(BlobLengthWrong):
            await source.fetch_blob(REPO, ABSENT, Span(0), sink, expected_size=expected_size)
        assert bytes(sink.body) == body[:expected_size]


async def test_chunked_blob_that_breaks_off(registry: StoredRegistry) -> None:
    """If the connection breaks before the last chunk of a blob, the error does not say that the size is wrong."""
    response = chunked(b"12345")[: -len(b"0\r\n\r\n")].replace(b"Transfer", b"Connection: close\r\nTransfer")
    async with scripted_server(always(response)) as server, upstream_source(registry, server.url) as source:
        for expected_size in (5, 6):
            with pytest.raises(UpstreamUnavailable, match="cannot be reached"):
                await fetch(source, ABSENT, expected_size=expected_size)


async def test_html_page_without_a_length_is_no_blob(registry: StoredRegistry) -> None:
    """An HTML page without a stated length is refused, and the next endpoint is asked: it is an error page or a login
    page."""
    page = chunked(b"<html>", media_type="text/html; charset=utf-8")
    async with (
        scripted_server(always(page)) as first,
        scripted_server(always(answer(200, b"123456"))) as second,
        upstream_source(registry, first.url, second.url) as source,
    ):
        sink = await fetch(source, ABSENT, expected_size=6)
        assert sink.begin_calls == [(second.url, 0, 6, 6)]


async def test_unknown_blobs(registry: StoredRegistry, upstream: Hub) -> None:
    """A 404 of the upstream raises BlobUnknown."""
    async with upstream_source(registry, upstream.url) as source:
        with pytest.raises(BlobUnknown):
            await source.resolve_blob(REPO, ABSENT)
        with pytest.raises(BlobUnknown):
            await fetch(source, ABSENT)


async def test_size_of_a_blob(registry: StoredRegistry, upstream: Hub, image: ImageTree) -> None:
    """The client gets the size of a blob with HEAD, or with a GET of one byte if the response to HEAD has no size."""
    layer = image.layers[1]
    async with upstream_source(registry, upstream.url) as source:
        for switches in ({}, {"redirects": True}, {"lengths": False}):
            upstream.set(**switches)
            descriptor = await source.resolve_blob(REPO, Digest(layer.digest))
            assert (descriptor.digest, descriptor.size) == (layer.digest, layer.size)

    def reply(head: str) -> bytes:
        return answer(405) if head.startswith("HEAD") else answer(206, b"x", content_range="bytes 0-0/77")

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        assert (await source.resolve_blob(REPO, ABSENT)).size == 77
        server.reply = lambda head: answer(405) if head.startswith("HEAD") else answer(416, content_range="bytes */0")
        assert (await source.resolve_blob(REPO, ABSENT)).size == 0
        server.reply = lambda head: answer(416 if "range:" in head.lower() else 200, b"", content_length="55")
        assert (await source.resolve_blob(REPO, ABSENT)).size == 55


async def test_size_that_no_response_states(registry: StoredRegistry, upstream: Hub, image: ImageTree) -> None:
    """If no response states the size of a blob, the request raises BlobSizeUnknown if the response names the digest of
    the blob. Otherwise it does not show that the upstream has the blob, and the request raises UpstreamUnavailable."""
    upstream.set(lengths=False, ranges=False)
    async with upstream_source(registry, upstream.url) as source:
        with pytest.raises(BlobSizeUnknown):
            await source.resolve_blob(REPO, Digest(image.layers[1].digest))
    page = chunked(b"please log in")
    async with scripted_server(always(page)) as server, upstream_source(registry, server.url) as source:
        with pytest.raises(UpstreamUnavailable, match="how long") as raised:
            await source.resolve_blob(REPO, ABSENT)
        assert not isinstance(raised.value, BlobSizeUnknown)


@pytest.mark.parametrize("head", [200, 405])
async def test_size_of_another_blob_is_refused(registry: StoredRegistry, head: int) -> None:
    """If the response names another digest than the requested one, its size is not used, and the request fails."""
    other_digest = "sha256:" + "1" * 64

    def reply(request: str) -> bytes:
        if request.startswith("HEAD") and head != 200:
            return answer(head)
        body = b"" if request.startswith("HEAD") else b"12345"
        return answer(200, body, content_length="5", docker_content_digest=other_digest)

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        with pytest.raises(UpstreamUnavailable, match="another blob"):
            await source.resolve_blob(REPO, ABSENT)


@pytest.mark.parametrize(
    ("status", "body", "is_confirmed"),
    [
        (404, '{"errors": [{"code": "BLOB_UNKNOWN"}]}', True),
        (404, "<html>not for you</html>", False),
        (404, "", False),
        (403, "<html>not for you</html>", False),
        (401, '{"errors": [{"code": "UNAUTHORIZED"}]}', False),
    ],
)
async def test_blob_refusal_without_a_registry_error_is_unconfirmed(
    registry: StoredRegistry, status: int, body: str, is_confirmed: bool
) -> None:
    """A refusal without an error code of the distribution spec is unconfirmed, because it can come from a firewall or
    proxy. After a refused HEAD, which has no body, the client sends a GET."""

    def reply(head: str) -> bytes:
        return answer(status, b"" if head.startswith("HEAD") else body, content_length=str(len(body)))

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        for request in (source.resolve_blob(REPO, ABSENT), fetch(source, ABSENT)):
            with pytest.raises(BlobUnknown) as raised:
                await request
            assert type(raised.value) is (BlobUnknown if is_confirmed else UnconfirmedBlobUnknown)


async def test_unconfirmed_refusal_of_one_endpoint(registry: StoredRegistry) -> None:
    """If one endpoint answers BLOB_UNKNOWN and the other endpoint sends an HTML page, such as that of a firewall, the
    refusal is unconfirmed."""
    unknown = answer(404, '{"errors": [{"code": "BLOB_UNKNOWN"}]}')
    async with (
        scripted_server(always(unknown)) as first,
        scripted_server(always(answer(404, "<html>"))) as second,
        upstream_source(registry, first.url, second.url) as source,
    ):
        with pytest.raises(UnconfirmedBlobUnknown):
            await fetch(source, ABSENT)


async def test_blob_from_the_next_endpoint(
    registry: StoredRegistry, tmp_path: Path, upstream: Hub, image: ImageTree
) -> None:
    """If the first endpoint does not have a blob or fails, the client uses the next endpoint. Endpoints in `avoid` are
    tried last."""
    layer = image.layers[1]
    with hub(tmp_path, UpstreamContent()) as empty:
        async with upstream_source(registry, empty.url, upstream.url) as source:
            sink = await fetch(source, layer.digest, avoid=[empty.url])
            assert sink.begin_calls[0][0] == upstream.url
            assert empty.count() == 0
            sink = await fetch(source, layer.digest, avoid=[empty.url, upstream.url])
            assert sink.begin_calls[0][0] == upstream.url
            assert empty.count("blob") == 1
            with pytest.raises(BlobUnknown):
                await fetch(source, ABSENT)
        for fault in ({}, {"status": 503}, {"status": 500}, {"status": 403}, {"hangup": True}):
            empty.clear()
            empty.forget()
            if fault:
                empty.fault(on="any", times=2, **fault)
            async with upstream_source(registry, empty.url, upstream.url) as source:
                assert (await fetch(source, layer.digest)).begin_calls[0][0] == upstream.url
            assert empty.count() > 0


async def test_blob_is_unknown_only_if_all_endpoints_deny_it(
    registry: StoredRegistry, upstream: Hub, tmp_path: Path
) -> None:
    """If one endpoint does not have the blob and the other endpoint is down, the client raises UpstreamUnavailable,
    because the blob may be at the endpoint that is down."""
    with hub(tmp_path, UpstreamContent()) as down:
        down.refuse()
        for order in ((down.url, upstream.url), (upstream.url, down.url)):
            async with upstream_source(registry, *order) as source:
                with pytest.raises(UpstreamUnavailable):
                    await fetch(source, ABSENT)


async def test_many_pieces_at_once(registry: StoredRegistry, upstream: Hub, image: ImageTree) -> None:
    """24 pieces are fetched at the same time over six connections, and each sink gets the bytes of its own piece."""
    layer = image.layers[1]
    step = layer.size // 24 + 1
    async with upstream_source(registry, upstream.url, connections=6) as source:
        sinks = await asyncio.gather(
            *(
                fetch(source, layer.digest, Span(offset, min(offset + step, layer.size)))
                for offset in range(0, layer.size, step)
            )
        )
    assert b"".join(bytes(sink.body) for sink in sinks) == layer.read()
