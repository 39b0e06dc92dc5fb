"""Blobs from upstreams: whole, in parts, and with every fault of a connection."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from registry.mirror.upstream_client import RangesUnsupported, UnconfirmedBlobUnknown
from registry.upstream.client import HttpUpstreamClient
from registry.upstream.transfer import SocketBody
from storage.content import Span
from storage.errors import (
    BlobUnknown,
    RegistryError,
    StorageFull,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from storage.names import Digest
from storage.store.stored_registry import StoredRegistry
from tests.fakes.hub.hub import Hub, hub
from tests.fakes.upstream_content import ImageTree, UpstreamContent
from tests.fakes.upstream_source import REPO, CollectingSink, always, answer, fetch, scripted_server, upstream_source

ABSENT = Digest("sha256:" + "0" * 64)


async def test_a_blob_comes_whole_and_in_order(registry: StoredRegistry, upstream: Hub, held: ImageTree) -> None:
    """A whole blob is requested without Range. The sink first gets endpoint and size."""
    layer = held.layers[1]
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
    registry: StoredRegistry, upstream: Hub, held: ImageTree, span: Span, sent: str
) -> None:
    """A span is requested by Range, and exactly its bytes arrive."""
    layer = held.layers[1]
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


async def test_connections_are_used_again(registry: StoredRegistry, upstream: Hub, held: ImageTree) -> None:
    """A piece that is read to its end leaves the connection for the next, also behind a redirect."""
    upstream.set(redirects=True)
    layer = held.layers[1]
    async with upstream_source(registry, upstream.url) as source:
        for start in range(0, 1000, 100):
            await fetch(source, layer.digest, Span(start, start + 100))
        await fetch(source, layer.digest)
        await fetch(source, held.config.digest)
        assert upstream.opened == 2


async def test_redirects_get_no_authorization(registry: StoredRegistry, upstream: Hub, held: ImageTree) -> None:
    """The token is sent to the registry only; the target of the redirect would refuse it."""
    upstream.set(auth="bearer", redirects=True)
    async with upstream_source(registry, upstream.url) as source:
        sink = await fetch(source, held.layers[1].digest)
    assert bytes(sink.body) == held.layers[1].read()
    assert [seen.authorization for seen in upstream.requests("blob")] == [False]
    assert all(seen.authorization for seen in upstream.requests("redirect") if seen.status == 307)


async def test_a_token_that_expires_between_two_pieces(
    registry: StoredRegistry, upstream: Hub, held: ImageTree
) -> None:
    """After a 401 a new token is obtained and the request is sent again, unnoticed by the sink."""
    upstream.set(auth="bearer", token_uses=1)
    layer, body = held.layers[1], b""
    async with upstream_source(registry, upstream.url) as source:
        for start in range(0, layer.size, 1 << 20):
            sink = await fetch(source, layer.digest, Span(start, min(start + (1 << 20), layer.size)))
            body += bytes(sink.body)
    assert body == layer.read()
    assert upstream.count("token") == 4


async def test_a_registry_without_ranges(registry: StoredRegistry, upstream: Hub, held: ImageTree) -> None:
    """A registry without ranges raises RangesUnsupported for a span before any byte; the whole blob works."""
    upstream.set(ranges=False)
    async with upstream_source(registry, upstream.url) as source:
        for span in (Span(5), Span(5, 10), Span(0, 10)):
            sink = CollectingSink()
            with pytest.raises(RangesUnsupported):
                await source.fetch_blob(REPO, Digest(held.layers[1].digest), span, sink)
            assert sink.begun == []
        sink = await fetch(source, held.layers[1].digest, Span(0, held.layers[1].size))
        assert bytes(sink.body) == held.layers[1].read()


async def test_a_blob_of_unknown_length(registry: StoredRegistry, upstream: Hub, held: ImageTree) -> None:
    """A registry that does not state a blob's length states it in the response to a range of the whole."""
    upstream.set(lengths=False)
    async with upstream_source(registry, upstream.url) as source:
        sink = await fetch(source, held.layers[1].digest)
        assert bytes(sink.body) == held.layers[1].read()
        upstream.set(ranges=False)
        with pytest.raises(UpstreamUnavailable, match="how long"):
            await fetch(source, held.layers[1].digest)


@pytest.mark.parametrize("reset", [False, True])
async def test_a_connection_that_breaks(registry: StoredRegistry, upstream: Hub, held: ImageTree, reset: bool) -> None:
    """After a break, the sink has the bytes so far, and the rest can be requested without repeating any."""
    layer = held.layers[1]
    upstream.fault(drop_after=1_000_000, reset=reset)
    async with upstream_source(registry, upstream.url) as source:
        sink = CollectingSink()
        with pytest.raises(UpstreamUnavailable):
            await source.fetch_blob(REPO, Digest(layer.digest), Span(0), sink)
        assert 0 < sink.at <= 1_000_000
        rest = await fetch(source, layer.digest, Span(sink.at))
    assert bytes(sink.body) + bytes(rest.body) == layer.read()


async def test_an_upstream_that_stalls_in_a_body(registry: StoredRegistry, upstream: Hub, held: ImageTree) -> None:
    """No bytes for idle_timeout is a timeout. The sink keeps its bytes."""
    upstream.fault(stall_after=500_000)
    async with upstream_source(registry, upstream.url, idle_timeout=2) as source:
        sink = CollectingSink()
        with pytest.raises(UpstreamTimeout):
            await source.fetch_blob(REPO, Digest(held.layers[1].digest), Span(0), sink)
    assert sink.at == 500_000


async def test_an_upstream_that_stalls_before_it_answers(
    registry: StoredRegistry, upstream: Hub, held: ImageTree
) -> None:
    """A stall before the response is a timeout, and the sink is not begun."""
    upstream.fault(stall=True)
    async with upstream_source(registry, upstream.url, idle_timeout=0.3) as source:
        sink = CollectingSink()
        with pytest.raises(UpstreamTimeout):
            await source.fetch_blob(REPO, Digest(held.layers[1].digest), Span(0), sink)
    assert sink.begun == []


async def test_a_slow_upstream_is_no_silent_one(registry: StoredRegistry, upstream: Hub, held: ImageTree) -> None:
    """The whole transfer has no time limit: a body may take longer than idle_timeout, and its first bytes are passed on
    at once."""
    upstream.set(rate=1 << 20)
    async with upstream_source(registry, upstream.url, idle_timeout=2) as source:
        sink = await fetch(source, held.layers[1].digest)
    assert bytes(sink.body) == held.layers[1].read()
    assert sink.pieces[0] < 1_000_000


async def test_a_wrong_part_is_refused(registry: StoredRegistry, upstream: Hub, held: ImageTree) -> None:
    """A response with another Content-Range than requested is refused before any byte."""
    upstream.fault(shift=3)
    async with upstream_source(registry, upstream.url) as source:
        sink = CollectingSink()
        with pytest.raises(UpstreamUnavailable, match="another part"):
            await source.fetch_blob(REPO, Digest(held.layers[1].digest), Span(10, 100), sink)
        assert sink.begun == []


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (answer(206, b"12345"), "without saying which"),
        (answer(206, b"12345", content_range="bytes 5-9/*"), "without saying which"),
        (answer(206, b"1234", content_range="bytes 5-8/100"), "another part"),
        (answer(206, b"123456", content_range="bytes 5-9/100"), "another part"),
        (answer(206, b"12345", content_range="bytes 5-9/8"), "another part"),
        (answer(206, b"12345", content_range="bytes 5-9/100", content_encoding="gzip"), "compresses"),
        (answer(416, b"", content_range="bytes */3"), "answers 416"),
        (answer(204), "answers 204"),
        (b"HTTP/1.1 200\r\nbroken", "how long"),
        (b"SSH-2.0-what\r\n\r\n", "cannot be reached"),
    ],
)
async def test_answers_that_make_no_sense(registry: StoredRegistry, given: bytes, says: str) -> None:
    """Invalid responses are refused, and the sink is not begun."""
    broken = b"\r\n\r\n" not in given or not given.startswith(b"HTTP")

    async def once() -> bytes:
        return given

    async with (
        scripted_server(lambda head: once() if not broken else given + b"\r\nconnection: close\r\n\r\n") as server,
        upstream_source(registry, server.url, idle_timeout=10) as source,
    ):
        sink = CollectingSink()
        with pytest.raises(UpstreamUnavailable, match=says):
            await source.fetch_blob(REPO, ABSENT, Span(5, 10), sink)
        assert sink.begun == []


async def test_a_chunked_body(registry: StoredRegistry) -> None:
    """A part may be sent in chunks, and the connection is reused."""
    given = (
        b"HTTP/1.1 206 Partial\r\nContent-Range: bytes 2-9/10\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"3\r\ncde\r\n5\r\nfghij\r\n0\r\n\r\n"
    )
    async with scripted_server(lambda head: given) as server, upstream_source(registry, server.url) as source:
        for _ in range(2):
            assert bytes((await fetch(source, ABSENT, Span(2))).body) == b"cdefghij"
        assert server.connections == 1


async def test_a_kept_connection_that_was_closed(registry: StoredRegistry) -> None:
    """If the server closes a kept connection just as it is reused, the request is sent again."""
    async with (
        scripted_server(lambda head: answer(200, b"12345")) as server,
        upstream_source(registry, server.url) as source,
    ):
        await fetch(source, ABSENT)
        calls = 0

        def reply(head: str) -> bytes:
            nonlocal calls
            calls += 1
            return b"" if calls == 1 else answer(200, b"12345")  # nothing: it closes

        server.reply = reply
        assert bytes((await fetch(source, ABSENT)).body) == b"12345"
        assert calls == 2


async def test_unknown_blobs(registry: StoredRegistry, upstream: Hub) -> None:
    """404 means that there is no such blob."""
    async with upstream_source(registry, upstream.url) as source:
        with pytest.raises(BlobUnknown):
            await source.resolve_blob(REPO, ABSENT)
        with pytest.raises(BlobUnknown):
            await fetch(source, ABSENT)


async def test_the_size_of_a_blob(registry: StoredRegistry, upstream: Hub, held: ImageTree) -> None:
    """The size comes from HEAD, or from a GET of one byte if HEAD has none."""
    layer = held.layers[1]
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
    """ "Unknown" from one endpoint and a firewall's page from the other are together unconfirmed."""
    gone = answer(404, '{"errors": [{"code": "BLOB_UNKNOWN"}]}')
    async with (
        scripted_server(always(gone)) as one,
        scripted_server(always(answer(404, "<html>"))) as two,
        upstream_source(registry, one.url, two.url) as source,
    ):
        with pytest.raises(UnconfirmedBlobUnknown):
            await fetch(source, ABSENT)


async def test_a_connection_that_was_given_back_is_left_alone(
    registry: StoredRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Abandoning a transfer at its very end does not shut down a connection that another transfer may use."""
    finish = SocketBody.finish

    def abandoned(body: SocketBody) -> None:
        finish(body)
        assert isinstance(source, HttpUpstreamClient)
        for transfer in list(source._blobs._running):
            transfer.abandon()

    monkeypatch.setattr(SocketBody, "finish", abandoned)
    async with (
        scripted_server(always(answer(200, b"12345"))) as server,
        upstream_source(registry, server.url) as source,
    ):
        for _ in range(3):
            assert bytes((await fetch(source, ABSENT)).body) == b"12345"
        assert server.connections == 1


async def test_what_the_sink_raises(registry: StoredRegistry, upstream: Hub, held: ImageTree) -> None:
    """An exception of the sink ends the fetch, which raises it; no other endpoint is asked."""
    boom: list[BaseException] = [StorageFull(), OSError("no"), UpstreamUnavailable("mine"), KeyError("x")]
    async with upstream_source(registry, upstream.url, upstream.url.replace("127.0.0.1", "localhost")) as source:
        for error in boom:

            def hook(offset: int, error: BaseException = error) -> None:
                raise error

            upstream.forget()
            with pytest.raises(type(error)) as raised:
                await source.fetch_blob(REPO, Digest(held.layers[1].digest), Span(0), CollectingSink(hook))
            assert raised.value is error
            assert upstream.count("blob") == 1
        assert bytes((await fetch(source, held.layers[1].digest)).body) == held.layers[1].read()


async def test_cancelled_in_a_body(registry: StoredRegistry, upstream: Hub, held: ImageTree) -> None:
    """Cancelling closes the connection, and the sink is not called again, also if no bytes were arriving."""
    upstream.fault(stall_after=100_000)
    arrived = asyncio.Event()
    loop = asyncio.get_running_loop()
    sink = CollectingSink(lambda offset: loop.call_soon_threadsafe(arrived.set))
    async with upstream_source(registry, upstream.url) as source:
        task = asyncio.create_task(source.fetch_blob(REPO, Digest(held.layers[1].digest), Span(0), sink))
        await arrived.wait()
        await upstream.until_async(lambda: sink.at == 100_000)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await upstream.until_async(lambda: upstream.open == 0)
        assert upstream.requests("blob")[0].end == "gone"


async def test_cancelled_while_the_sink_is_at_it(registry: StoredRegistry, upstream: Hub, held: ImageTree) -> None:
    """A cancelled fetch ends when the running call of the sink has ended, not before."""
    entered, leave = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def hook(offset: int) -> None:
        loop.call_soon_threadsafe(entered.set)
        assert leave.wait(30)

    sink = CollectingSink(hook)
    async with upstream_source(registry, upstream.url) as source:
        task = asyncio.create_task(source.fetch_blob(REPO, Digest(held.layers[1].digest), Span(0), sink))
        await entered.wait()
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=0.05)
        assert not done
        task.cancel()
        leave.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(sink.pieces) == 1


async def test_cancelled_before_the_answer(registry: StoredRegistry, upstream: Hub, held: ImageTree) -> None:
    """Cancelling before the response closes the connection at once; the sink is never begun."""
    upstream.fault(stall=True)
    sink = CollectingSink()
    async with upstream_source(registry, upstream.url) as source:
        task = asyncio.create_task(source.fetch_blob(REPO, Digest(held.layers[1].digest), Span(0), sink))
        await upstream.arrival(1, "blob")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await upstream.until_async(lambda: upstream.open == 0)
    assert sink.begun == []


@pytest.mark.parametrize("fault", [{"stall": True}, {"stall_after": 100_000}], ids=["before the answer", "in the body"])
async def test_cancelled_asks_no_more(
    registry: StoredRegistry, upstream: Hub, held: ImageTree, fault: dict[str, Any]
) -> None:
    """A cancelled fetch makes no other connection."""
    upstream.fault(**fault)
    sink = CollectingSink()
    async with upstream_source(registry, upstream.url) as source:
        task = asyncio.create_task(source.fetch_blob(REPO, Digest(held.layers[1].digest), Span(0), sink))
        await upstream.arrival(1, "blob")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await upstream.until_async(lambda: upstream.open == 0)
    assert await asyncio.to_thread(_ended_threads)
    assert upstream.opened == 1


def _ended_threads() -> bool:
    """Waits until no thread of an upstream is left."""
    for thread in threading.enumerate():
        if thread.name.startswith("upstream-"):
            thread.join(30)
    return not any(thread.name.startswith("upstream-") for thread in threading.enumerate())


async def test_closed_in_a_body(registry: StoredRegistry, upstream: Hub, held: ImageTree) -> None:
    """Closing the client ends its running fetches."""
    upstream.fault(stall_after=100_000)
    async with upstream_source(registry, upstream.url) as source:
        task = asyncio.create_task(fetch(source, held.layers[1].digest))
        await upstream.arrival(1, "blob")
        await source.aclose()
        with pytest.raises(UpstreamUnavailable):
            await task


async def test_another_endpoint_has_it(
    registry: StoredRegistry, tmp_path: Path, upstream: Hub, held: ImageTree
) -> None:
    """Whatever the first endpoint answers for a digest, the next is asked; those in `avoid` come last."""
    layer = held.layers[1]
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
    """ "Unknown" is reported only if all endpoints say so: one that is down might have the blob."""
    with hub(tmp_path, UpstreamContent()) as down:
        down.refuse()
        for order in ((down.url, upstream.url), (upstream.url, down.url)):
            async with upstream_source(registry, *order) as source:
                with pytest.raises(UpstreamUnavailable):
                    await fetch(source, ABSENT)


async def test_many_at_once(registry: StoredRegistry, upstream: Hub, held: ImageTree) -> None:
    """As many pieces as there are connections are fetched at a time, each with its own bytes."""
    layer = held.layers[1]
    step = layer.size // 24 + 1
    async with upstream_source(registry, upstream.url, connections=6) as source:
        sinks = await asyncio.gather(
            *(fetch(source, layer.digest, Span(at, min(at + step, layer.size))) for at in range(0, layer.size, step))
        )
    assert b"".join(bytes(sink.body) for sink in sinks) == layer.read()


async def test_errors_say_nothing_of_signed_addresses(registry: StoredRegistry) -> None:
    """No message contains the URL of a redirect, which can grant access to the blob."""

    def reply(head: str) -> bytes:
        if "/v2/" in head.split()[1]:
            return answer(307, location="/far?X-Signature=secret")
        return answer(403)

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        with pytest.raises(RegistryError) as raised:
            await fetch(source, ABSENT)
        assert "secret" not in str(raised.value)
    away = answer(307, location="http://127.0.0.1:1/far?X-Signature=secret")
    async with scripted_server(lambda head: away) as server, upstream_source(registry, server.url) as source:
        with pytest.raises(RegistryError) as raised:
            await fetch(source, ABSENT)
        assert "secret" not in str(raised.value)
