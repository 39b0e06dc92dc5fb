"""Connections that break or stall, and answers that make no sense, while a blob is fetched from an upstream."""

from __future__ import annotations

import pytest

from registry.upstream.client import HttpUpstreamClient
from registry.upstream.transfer import SocketBody
from storage.content import Span
from storage.errors import RegistryError, StorageFull, UpstreamTimeout, UpstreamUnavailable
from storage.names import Digest
from storage.store.stored_registry import StoredRegistry
from tests.fakes.hub.hub import Hub
from tests.fakes.upstream_content import ImageTree
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
    """A body without bytes for idle_timeout is a timeout. The sink keeps the bytes it has."""
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
            return b"" if calls == 1 else answer(200, b"12345")  # no response: the server closes the connection

        server.reply = reply
        assert bytes((await fetch(source, ABSENT)).body) == b"12345"
        assert calls == 2


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
