"""A server that resets connections as soon as it has accepted them, such as a load balancer without a working server
behind it. The tests run with uvloop and with asyncio's event loop, which treat closed connections differently."""

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

from registry.config import Upstream
from registry.upstream.api_client import ApiClient
from registry.upstream.destinations import ANYWHERE, AddressPolicy
from registry.upstream.transport import CheckedBackend, OutboundProxies, Resolver, TrustStore
from storage.errors import UpstreamUnavailable

MakeLoop = Callable[[], asyncio.AbstractEventLoop]
with_both_loops = pytest.mark.parametrize(
    "make_loop", [uvloop.new_event_loop, asyncio.new_event_loop], ids=["uvloop", "asyncio"]
)


@pytest.fixture
def closed_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes httpcore2 return a new connection only after the event loop has seen that the server closed it. Otherwise
    this happens by chance, when many connections are made at the same time."""
    connect = httpcore2.AnyIOBackend.connect_tcp

    async def connect_and_wait(self: httpcore2.AnyIOBackend, *args: Any) -> Any:
        stream: Any = await connect(self, *args)
        await stream.write(b"reset")
        transport = stream._stream._transport
        transport.resume_reading()
        async with asyncio.timeout(10):
            while not transport.is_closing():  # noqa: ASYNC110  there is no event for it
                await asyncio.sleep(0.001)
        return stream

    monkeypatch.setattr(httpcore2.AnyIOBackend, "connect_tcp", connect_and_wait)


@contextlib.asynccontextmanager
async def resetting_server() -> AsyncIterator[int]:
    """Runs a server that resets each connection after its first bytes. Yields its port."""

    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(5)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    async with await asyncio.start_server(reset, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


@with_both_loops
@pytest.mark.usefixtures("closed_early")
def test_an_upstream_that_resets_connections_is_unavailable(make_loop: MakeLoop) -> None:
    """If an upstream resets each new connection, requests to it raise UpstreamUnavailable, after which the mirror
    serves cached tags."""

    async def send() -> None:
        async with resetting_server() as port:
            url = f"http://127.0.0.1:{port}"
            settings = Upstream(name="far.test", endpoints=[url])
            api = ApiClient(settings, OutboundProxies(), TrustStore(None), AddressPolicy("far.test"))
            try:
                with pytest.raises(UpstreamUnavailable, match="cannot be reached"):
                    await api.send("GET", f"{url}/v2/", {})
            finally:
                await api.aclose()

    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(send())


@with_both_loops
@pytest.mark.usefixtures("closed_early")
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
