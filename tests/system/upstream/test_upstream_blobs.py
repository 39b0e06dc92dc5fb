"""Blobs from upstreams: whole, in parts, unknown, and from another endpoint."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from registry.mirror.upstream_client import RangesUnsupported, UnconfirmedBlobUnknown
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


async def test_a_blob_comes_whole_and_in_order(registry: StoredRegistry, upstream: Hub, image: ImageTree) -> None:
    """A whole blob is requested without Range. The sink first gets endpoint and size."""
    layer = image.layers[1]
    async with upstream_source(registry, upstream.url) as source:
        sink = await fetch(source, layer.digest)
    assert bytes(sink.body) == layer.read()
    assert sink.begun == [(upstream.url, 0, layer.size, layer.size)]
    (seen,) = upstream.requests("blob")
    assert seen.range == ""
    assert seen.headers["accept-encoding"] == "identity"
    assert seen.headers["user-agent"].startswith("entrepot/")


@pytest.mark.parametrize(
    ("span", "sent"),
    [
        (Span(0, 5), "bytes=0-4"),
        (Span(7), "bytes=7-"),
        (Span(3_000_000, 3_000_001), "bytes=3000000-3000000"),
        (Span(-9), "bytes=-9"),
    ],
)
async def test_a_part_of_a_blob(
    registry: StoredRegistry, upstream: Hub, image: ImageTree, span: Span, sent: str
) -> None:
    """A span is requested by Range, and exactly its bytes arrive."""
    layer = image.layers[1]
    start, stop = span.to_offsets(layer.size)
    async with upstream_source(registry, upstream.url) as source:
        sink = await fetch(source, layer.digest, span)
    assert bytes(sink.body) == layer.read(start, stop)
    assert sink.begun == [(upstream.url, start, stop, layer.size)]
    assert upstream.requests("blob")[0].range == sent


async def test_an_empty_blob(registry: StoredRegistry) -> None:
    """For an empty blob the sink is begun and gets no bytes."""
    async with scripted_server(lambda head: answer(200)) as server, upstream_source(registry, server.url) as source:
        for span in (Span(0), Span(0, 0)):
            sink = await fetch(source, ABSENT, span)
            assert (bytes(sink.body), sink.begun) == (b"", [(server.url, 0, 0, 0)])
        assert "range:" not in "".join(server.heads).lower()
        assert server.connections == 1


async def test_connections_are_used_again(registry: StoredRegistry, upstream: Hub, image: ImageTree) -> None:
    """A piece that is read to its end leaves the connection for the next, also behind a redirect."""
    upstream.set(redirects=True)
    layer = image.layers[1]
    async with upstream_source(registry, upstream.url) as source:
        for start in range(0, 1000, 100):
            await fetch(source, layer.digest, Span(start, start + 100))
        await fetch(source, layer.digest)
        await fetch(source, image.config.digest)
        assert upstream.opened == 2


async def test_redirects_get_no_authorization(registry: StoredRegistry, upstream: Hub, image: ImageTree) -> None:
    """The token is sent to the registry only; the target of the redirect would refuse it."""
    upstream.set(auth="bearer", redirects=True)
    async with upstream_source(registry, upstream.url) as source:
        sink = await fetch(source, image.layers[1].digest)
    assert bytes(sink.body) == image.layers[1].read()
    assert [seen.authorization for seen in upstream.requests("blob")] == [False]
    assert all(seen.authorization for seen in upstream.requests("redirect") if seen.status == 307)


async def test_a_token_that_expires_between_two_pieces(
    registry: StoredRegistry, upstream: Hub, image: ImageTree
) -> None:
    """After a 401 a new token is obtained and the request is sent again, unnoticed by the sink."""
    upstream.set(auth="bearer", token_uses=1)
    layer, body = image.layers[1], b""
    async with upstream_source(registry, upstream.url) as source:
        for start in range(0, layer.size, 1 << 20):
            sink = await fetch(source, layer.digest, Span(start, min(start + (1 << 20), layer.size)))
            body += bytes(sink.body)
    assert body == layer.read()
    assert upstream.count("token") == 4


async def test_a_registry_without_ranges(registry: StoredRegistry, upstream: Hub, image: ImageTree) -> None:
    """A registry without ranges raises RangesUnsupported for a span before any byte; the whole blob works."""
    upstream.set(ranges=False)
    async with upstream_source(registry, upstream.url) as source:
        for span in (Span(5), Span(5, 10), Span(0, 10)):
            sink = CollectingSink()
            with pytest.raises(RangesUnsupported):
                await source.fetch_blob(REPO, Digest(image.layers[1].digest), span, sink)
            assert sink.begun == []
        sink = await fetch(source, image.layers[1].digest, Span(0, image.layers[1].size))
        assert bytes(sink.body) == image.layers[1].read()


async def test_a_blob_of_unknown_length(registry: StoredRegistry, upstream: Hub, image: ImageTree) -> None:
    """A registry that does not state a blob's length states it in the response to a range of the whole."""
    upstream.set(lengths=False)
    async with upstream_source(registry, upstream.url) as source:
        sink = await fetch(source, image.layers[1].digest)
        assert bytes(sink.body) == image.layers[1].read()
        upstream.set(ranges=False)
        with pytest.raises(UpstreamUnavailable, match="how long"):
            await fetch(source, image.layers[1].digest)


async def test_unknown_blobs(registry: StoredRegistry, upstream: Hub) -> None:
    """404 means that there is no such blob."""
    async with upstream_source(registry, upstream.url) as source:
        with pytest.raises(BlobUnknown):
            await source.resolve_blob(REPO, ABSENT)
        with pytest.raises(BlobUnknown):
            await fetch(source, ABSENT)


async def test_the_size_of_a_blob(registry: StoredRegistry, upstream: Hub, image: ImageTree) -> None:
    """The size comes from HEAD, or from a GET of one byte if HEAD has none."""
    layer = image.layers[1]
    async with upstream_source(registry, upstream.url) as source:
        for switches in ({}, {"redirects": True}, {"lengths": False}):
            upstream.set(**switches)
            found = await source.resolve_blob(REPO, Digest(layer.digest))
            assert (found.digest, found.size) == (layer.digest, layer.size)

    def reply(head: str) -> bytes:
        return answer(405) if head.startswith("HEAD") else answer(206, b"x", content_range="bytes 0-0/77")

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        assert (await source.resolve_blob(REPO, ABSENT)).size == 77
        server.reply = lambda head: answer(405) if head.startswith("HEAD") else answer(416, content_range="bytes */0")
        assert (await source.resolve_blob(REPO, ABSENT)).size == 0


@pytest.mark.parametrize("head", [200, 405])
async def test_the_size_of_another_blob(registry: StoredRegistry, head: int) -> None:
    """A response that names another digest is refused, whatever its length."""
    other = "sha256:" + "1" * 64

    def reply(request: str) -> bytes:
        if request.startswith("HEAD") and head != 200:
            return answer(head)
        body = b"" if request.startswith("HEAD") else b"12345"
        return answer(200, body, content_length="5", docker_content_digest=other)

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        with pytest.raises(UpstreamUnavailable, match="another blob"):
            await source.resolve_blob(REPO, ABSENT)


@pytest.mark.parametrize(
    ("status", "body", "sure"),
    [
        (404, '{"errors": [{"code": "BLOB_UNKNOWN"}]}', True),
        (404, "<html>not for you</html>", False),
        (404, "", False),
        (403, "<html>not for you</html>", False),
        (401, '{"errors": [{"code": "UNAUTHORIZED"}]}', False),
    ],
)
async def test_whose_refusal_of_a_blob_it_is(registry: StoredRegistry, status: int, body: str, sure: bool) -> None:
    """Without a registry's error code a refusal is unconfirmed, as for manifests. A response to HEAD has no body, so a
    GET follows."""

    def reply(head: str) -> bytes:
        return answer(status, b"" if head.startswith("HEAD") else body, content_length=str(len(body)))

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        for request in (source.resolve_blob(REPO, ABSENT), fetch(source, ABSENT)):
            with pytest.raises(BlobUnknown) as raised:
                await request
            assert type(raised.value) is (BlobUnknown if sure else UnconfirmedBlobUnknown)


async def test_a_doubtful_no_of_one_endpoint(registry: StoredRegistry) -> None:
    """An "unknown" from one endpoint and a firewall's page from the other one are unconfirmed together."""
    gone = answer(404, '{"errors": [{"code": "BLOB_UNKNOWN"}]}')
    async with (
        scripted_server(always(gone)) as one,
        scripted_server(always(answer(404, "<html>"))) as two,
        upstream_source(registry, one.url, two.url) as source,
    ):
        with pytest.raises(UnconfirmedBlobUnknown):
            await fetch(source, ABSENT)


async def test_another_endpoint_has_it(
    registry: StoredRegistry, tmp_path: Path, upstream: Hub, image: ImageTree
) -> None:
    """Whatever the first endpoint answers for a digest, the next one is asked; the endpoints in `avoid` come last."""
    layer = image.layers[1]
    async with upstream_source(registry) as nobody:
        assert nobody.connections == 8
    with hub(tmp_path, UpstreamContent()) as empty:
        async with upstream_source(registry, empty.url, upstream.url) as source:
            for fault in ({}, {"status": 503}, {"status": 500}, {"status": 403}, {"hangup": True}):
                if fault:
                    empty.fault(on="any", times=2, **fault)
                assert (await fetch(source, layer.digest)).begun[0][0] == upstream.url
                empty.clear()
            empty.forget()
            sink = await fetch(source, layer.digest, avoid=[empty.url])
            assert sink.begun[0][0] == upstream.url
            assert empty.count() == 0
            await fetch(source, layer.digest, avoid=[empty.url, upstream.url])
            with pytest.raises(BlobUnknown):
                await fetch(source, ABSENT)


async def test_endpoints_that_differ_in_their_failure(registry: StoredRegistry, upstream: Hub, tmp_path: Path) -> None:
    """An "unknown" is reported only if all endpoints say so: one that is down might have the blob."""
    with hub(tmp_path, UpstreamContent()) as down:
        down.refuse()
        for order in ((down.url, upstream.url), (upstream.url, down.url)):
            async with upstream_source(registry, *order) as source:
                with pytest.raises(UpstreamUnavailable):
                    await fetch(source, ABSENT)


async def test_many_at_once(registry: StoredRegistry, upstream: Hub, image: ImageTree) -> None:
    """As many pieces as there are connections are fetched at a time, each with its own bytes."""
    layer = image.layers[1]
    step = layer.size // 24 + 1
    async with upstream_source(registry, upstream.url, connections=6) as source:
        sinks = await asyncio.gather(
            *(fetch(source, layer.digest, Span(at, min(at + step, layer.size))) for at in range(0, layer.size, step))
        )
    assert b"".join(bytes(sink.body) for sink in sinks) == layer.read()
