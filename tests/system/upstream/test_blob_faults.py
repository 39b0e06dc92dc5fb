"""Tests of downloads of blobs from an upstream whose connections break or stall, or whose responses are invalid. The
downloaded bytes go to a sink, an object that the caller passes to `fetch_blob`."""

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
async def test_download_can_continue_after_a_broken_connection(
    registry: StoredRegistry, upstream: Hub, image: ImageTree, reset: bool
) -> None:
    """After the connection has broken, the sink has the bytes that arrived before. A second download gets exactly the
    remaining bytes."""
    layer = image.layers[1]
    upstream.fault(drop_after=1_000_000, reset=reset)
    async with upstream_source(registry, upstream.url) as source:
        sink = CollectingSink()
        with pytest.raises(UpstreamUnavailable):
            await source.fetch_blob(REPO, Digest(layer.digest), Span(0), sink)
        assert 0 < sink.next_offset <= 1_000_000
        second_sink = await fetch(source, layer.digest, Span(sink.next_offset))
    assert bytes(sink.body) + bytes(second_sink.body) == layer.read()


async def test_stall_during_a_body_is_a_timeout(registry: StoredRegistry, upstream: Hub, image: ImageTree) -> None:
    """If no bytes of a body arrive for `idle_timeout`, the download raises UpstreamTimeout. The sink keeps the bytes
    that arrived before."""
    upstream.fault(stall_after=500_000)
    async with upstream_source(registry, upstream.url, idle_timeout=2) as source:
        sink = CollectingSink()
        with pytest.raises(UpstreamTimeout):
            await source.fetch_blob(REPO, Digest(image.layers[1].digest), Span(0), sink)
    assert sink.next_offset == 500_000


async def test_stall_before_the_response_is_a_timeout(
    registry: StoredRegistry, upstream: Hub, image: ImageTree
) -> None:
    """If the upstream does not respond for `idle_timeout`, the download raises UpstreamTimeout, and the sink is not
    called."""
    upstream.fault(stall=True)
    async with upstream_source(registry, upstream.url, idle_timeout=0.3) as source:
        sink = CollectingSink()
        with pytest.raises(UpstreamTimeout):
            await source.fetch_blob(REPO, Digest(image.layers[1].digest), Span(0), sink)
    assert sink.begin_calls == []


async def test_slow_download_is_no_timeout(registry: StoredRegistry, upstream: Hub, image: ImageTree) -> None:
    """A body may take longer than `idle_timeout` as long as bytes arrive. The first bytes are passed to the sink before
    the rest has arrived."""
    layer, sent_before_pieces = image.layers[1], list[int]()
    sink = CollectingSink(lambda offset: sent_before_pieces.append(upstream.requests("blob")[0].sent))
    upstream.set(rate=1 << 20)
    async with upstream_source(registry, upstream.url, idle_timeout=2) as source:
        await source.fetch_blob(REPO, Digest(layer.digest), Span(0), sink)
    assert bytes(sink.body) == layer.read()
    assert sent_before_pieces[0] < layer.size


async def test_wrong_content_range_is_refused(registry: StoredRegistry, upstream: Hub, image: ImageTree) -> None:
    """If a response has another Content-Range than requested, it is refused before the sink is called."""
    upstream.fault(shift=3)
    async with upstream_source(registry, upstream.url) as source:
        sink = CollectingSink()
        with pytest.raises(UpstreamUnavailable, match="another part"):
            await source.fetch_blob(REPO, Digest(image.layers[1].digest), Span(10, 100), sink)
        assert sink.begin_calls == []


@pytest.mark.parametrize(
    ("response", "message"),
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
async def test_invalid_responses_are_refused(registry: StoredRegistry, response: bytes, message: str) -> None:
    """Invalid responses raise UpstreamUnavailable with a message that describes the problem, and the sink is not
    called."""
    # A response without valid headers is sent with the end of the headers, so that the client does not wait for more.
    is_broken = b"\r\n\r\n" not in response or not response.startswith(b"HTTP")

    async def respond() -> bytes:
        return response

    async with (
        scripted_server(
            lambda head: respond() if not is_broken else response + b"\r\nconnection: close\r\n\r\n"
        ) as server,
        upstream_source(registry, server.url, idle_timeout=10) as source,
    ):
        sink = CollectingSink()
        with pytest.raises(UpstreamUnavailable, match=message):
            await source.fetch_blob(REPO, ABSENT, Span(5, 10), sink)
        assert sink.begin_calls == []


async def test_a_chunked_body(registry: StoredRegistry) -> None:
    """A range of a blob can be sent with chunked encoding, and the connection is reused."""
    response = (
        b"HTTP/1.1 206 Partial\r\nContent-Range: bytes 2-9/10\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"3\r\ncde\r\n5\r\nfghij\r\n0\r\n\r\n"
    )
    async with scripted_server(lambda head: response) as server, upstream_source(registry, server.url) as source:
        for _ in range(2):
            assert bytes((await fetch(source, ABSENT, Span(2))).body) == b"cdefghij"
        assert server.connections == 1


async def test_request_is_repeated_if_a_reused_connection_closes(registry: StoredRegistry) -> None:
    """If the server closes an idle connection when the client reuses it, the client sends the request again."""
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


async def test_abandoning_a_finished_transfer_keeps_its_connection(
    registry: StoredRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a transfer is abandoned just after it has returned its connection to the pool, the connection stays open for
    other transfers."""
    finish = SocketBody.finish

    def finish_and_abandon(body: SocketBody) -> None:
        finish(body)
        assert isinstance(source, HttpUpstreamClient)
        for transfer in list(source._blobs._running):
            transfer.abandon()

    monkeypatch.setattr(SocketBody, "finish", finish_and_abandon)
    async with (
        scripted_server(always(answer(200, b"12345"))) as server,
        upstream_source(registry, server.url) as source,
    ):
        for _ in range(3):
            assert bytes((await fetch(source, ABSENT)).body) == b"12345"
        assert server.connections == 1


async def test_exception_of_the_sink_ends_the_download(
    registry: StoredRegistry, upstream: Hub, image: ImageTree
) -> None:
    """If the sink raises an exception, the download ends with the same exception, and no other endpoint of the upstream
    is tried."""
    errors: list[BaseException] = [StorageFull(), OSError("no"), UpstreamUnavailable("mine"), KeyError("x")]
    async with upstream_source(registry, upstream.url, upstream.url.replace("127.0.0.1", "localhost")) as source:
        for error in errors:

            def hook(offset: int, error: BaseException = error) -> None:
                raise error

            upstream.forget()
            with pytest.raises(type(error)) as raised:
                await source.fetch_blob(REPO, Digest(image.layers[1].digest), Span(0), CollectingSink(hook))
            assert raised.value is error
            assert upstream.count("blob") == 1
        assert bytes((await fetch(source, image.layers[1].digest)).body) == image.layers[1].read()


async def test_error_messages_contain_no_redirect_url(registry: StoredRegistry) -> None:
    """No error message contains the URL of a redirect, because such a URL can contain a signature that grants access to
    the blob."""

    def reply(head: str) -> bytes:
        if "/v2/" in head.split()[1]:
            return answer(307, location="/far?X-Signature=secret")
        return answer(403)

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        with pytest.raises(RegistryError) as raised:
            await fetch(source, ABSENT)
        assert "secret" not in str(raised.value)
    redirect = answer(307, location="http://127.0.0.1:1/far?X-Signature=secret")
    async with scripted_server(lambda head: redirect) as server, upstream_source(registry, server.url) as source:
        with pytest.raises(RegistryError) as raised:
            await fetch(source, ABSENT)
        assert "secret" not in str(raised.value)
