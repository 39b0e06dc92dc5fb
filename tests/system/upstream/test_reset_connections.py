"""A server that resets connections as soon as it has accepted them, such as a load balancer that has no working server
behind it or too many connections. The tests run with uvloop and with asyncio's event loop, which treat closed
connections differently."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpcore2
import pytest
import uvloop

from registry.auth.external.identity_http import NoUsableResponse, send_request
from registry.config import Upstream
from registry.upstream.api_client import ApiClient
from registry.upstream.api_transport import CheckedBackend
from registry.upstream.destinations import ANYWHERE, AddressPolicy
from registry.upstream.transport import OutboundProxies, Resolver, TrustStore
from storage.errors import UpstreamUnavailable

RESET_SECONDS = 0.05
"""Time from the response of the server to the reset of the connection."""
RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
MakeLoop = Callable[[], asyncio.AbstractEventLoop]
with_both_loops = pytest.mark.parametrize(
    "make_loop", [uvloop.new_event_loop, asyncio.new_event_loop], ids=["uvloop", "asyncio"]
)


@contextlib.asynccontextmanager
async def resetting_server(response: bytes = b"", resets: int = 1000) -> AsyncIterator[int]:
    """Runs a server that sends `response` at the beginning of each of the first connections (`resets`), and resets
    them. On later connections, it sends `response` to each request. Yields its port."""
    connections: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        if len(connections) > resets:
            while await reader.read(4096):
                writer.write(response)
            return
        writer.write(response)
        await asyncio.sleep(RESET_SECONDS)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]
        for writer in connections:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


@contextlib.asynccontextmanager
async def api_client(url: str) -> AsyncIterator[ApiClient]:
    """Yields a client for an upstream whose endpoint has this URL."""
    settings = Upstream(name="far.test", endpoints=[url])
    api = ApiClient(settings, OutboundProxies(), TrustStore(None), AddressPolicy("far.test"))
    try:
        yield api
    finally:
        await api.aclose()


def after_connecting(monkeypatch: pytest.MonkeyPatch, wait: Callable[[Any], Any]) -> None:
    """Makes httpcore2 return a new connection only after `wait`, which gets anyio's stream. So the event loop has seen
    what the server did in the meantime. Without this, that happens by chance, if many connections are made at the same
    time."""
    connect = httpcore2.AnyIOBackend.connect_tcp

    async def connect_and_wait(self: httpcore2.AnyIOBackend, *args: Any, **options: Any) -> Any:
        stream: Any = await connect(self, *args, **options)
        await wait(stream._stream)
        return stream

    monkeypatch.setattr(httpcore2.AnyIOBackend, "connect_tcp", connect_and_wait)


@pytest.fixture
def sees_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new connection is used after the event loop has seen that the server reset it."""

    async def wait(stream: Any) -> None:
        stream._transport.resume_reading()
        async with asyncio.timeout(10):
            while not stream._transport.is_closing():  # noqa: ASYNC110 - there is no event for it
                await asyncio.sleep(0.001)

    after_connecting(monkeypatch, wait)


@pytest.fixture
def sees_response(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new connection is used after the response has arrived. If the server has reset the connection, the event loop
    sees that only when the request is sent."""

    async def wait(stream: Any) -> None:
        stream._transport.resume_reading()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RESET_SECONDS / 2):
                while not stream._protocol.read_queue:  # noqa: ASYNC110 - there is no event for it
                    await asyncio.sleep(0.001)
        stream._transport.pause_reading()
        await asyncio.sleep(2 * RESET_SECONDS)

    after_connecting(monkeypatch, wait)


@with_both_loops
@pytest.mark.usefixtures("sees_reset")
def test_an_upstream_that_resets_connections_is_unavailable(make_loop: MakeLoop) -> None:
    """If an upstream resets each new connection, requests to it raise UpstreamUnavailable, after which the mirror
    serves cached tags."""

    async def send() -> None:
        async with resetting_server() as port, api_client(f"http://127.0.0.1:{port}") as api:
            with pytest.raises(UpstreamUnavailable, match="cannot be reached"):
                await api.send("GET", f"http://127.0.0.1:{port}/v2/", {})

    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(send())


@with_both_loops
@pytest.mark.usefixtures("sees_reset")
def test_an_identity_provider_that_resets_connections_is_unavailable(make_loop: MakeLoop) -> None:
    """If an OpenID provider or token issuer resets each new connection, requests to it raise NoUsableResponse, as for
    one that cannot be reached."""

    async def send() -> None:
        async with resetting_server() as port:
            with pytest.raises(NoUsableResponse):
                await send_request(f"http://127.0.0.1:{port}/keys")

    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(send())


@with_both_loops
@pytest.mark.parametrize("uses_proxy", [False, True], ids=["direct", "proxy"])
@pytest.mark.usefixtures("sees_response")
def test_a_response_before_a_reset_does_not_break_later_requests(
    make_loop: MakeLoop, uses_proxy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a server or a proxy responds before it has read the request, and resets the connection, later requests to that
    upstream work."""

    async def send() -> None:
        async with resetting_server(RESPONSE, resets=1) as port:
            url = f"http://127.0.0.1:{port}"
            if uses_proxy:
                monkeypatch.setenv("HTTP_PROXY", url)
                url = "http://far.test"
            async with api_client(url) as api:
                statuses = [(await api.send("GET", f"{url}/v2/", {})).status for _ in range(3)]
        assert statuses == [200, 200, 200]

    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(send())


@with_both_loops
@pytest.mark.usefixtures("sees_reset")
def test_a_reset_connection_is_not_used_again(make_loop: MakeLoop) -> None:
    """A connection that the server has reset counts as readable, so that the connection pool closes it, and has no TLS
    session."""

    async def look() -> None:
        async with resetting_server() as port:
            resolver = Resolver("far.test")
            backend = CheckedBackend(AddressPolicy("far.test"), ANYWHERE, resolver)
            stream = await backend.connect_tcp("127.0.0.1", port)
            assert stream.get_extra_info("is_readable") is True
            assert stream.get_extra_info("ssl_object") is None
            await stream.aclose()
            await resolver.aclose()

    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(look())
