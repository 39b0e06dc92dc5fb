"""The memory of TLS connections in a real server: few of them may have large buffers, and the buffers are freed with
the connection."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import http.client
import socket
import ssl
import weakref
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest

from registry.asgi import Receive, Scope, Send
from registry.server.connection.context import WorkerContext
from registry.server.connection.protocol import RegistryProtocol
from registry.server.connection.unsent_budget import UnsentBudget
from registry.server.process.worker import new_event_loop
from registry.server.server_limits import ServerLimits
from tests.fakes.certificate_authority import CertificateAuthority, KeyPair
from tests.system.server.app_process import AppProcess, Start
from tests.system.server.tls_client import ask, client_context, tls_connection

T = TypeVar("T")

BODY = b"x" * (128 * 1024)
POST = b"POST /echo HTTP/1.1\r\nHost: test\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> CertificateAuthority:
    return CertificateAuthority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def pair(authority: CertificateAuthority) -> KeyPair:
    return authority.sign("localhost")


@pytest.fixture
def no_automatic_collection() -> Iterator[None]:
    """Disables automatic garbage collection."""
    gc.disable()
    yield
    gc.enable()


class BurstClient:
    """A TLS client that encrypts a whole request before it sends the first byte, so that much of it arrives at once."""

    def __init__(self, running: AppProcess, context: ssl.SSLContext) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname="localhost")
        self.sock = running.connect()
        self._repeat(self._tls.do_handshake)

    def _repeat(self, step: Callable[[], T]) -> T:
        """Repeats `step` until it needs no more bytes of the server, and returns its result."""
        while True:
            try:
                result = step()
            except ssl.SSLWantReadError:
                self._send()
                data = self.sock.recv(65536)
                self._incoming.write(data) if data else self._incoming.write_eof()
            else:
                self._send()
                return result

    def _send(self) -> None:
        if self._outgoing.pending:
            self.sock.sendall(self._outgoing.read())

    def post(self) -> bytes:
        """Sends a request with a large body. Returns the beginning of the response. Acknowledges the response at once:
        until then, the server treats the connection as one that still sends, and prefers idle ones for eviction."""
        self._tls.write(POST)
        response = self._repeat(lambda: self._tls.read(65536))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        return response

    def wait_closed(self) -> None:
        """Reads until the server has closed the connection."""
        with contextlib.suppress(ConnectionResetError):
            while self.sock.recv(65536):
                pass


@pytest.mark.parametrize("env", [{}, {"NO_UVLOOP": "1"}], ids=["uvloop", "asyncio"])
def test_few_idle_connections_keep_large_buffers(
    start: Start, authority: CertificateAuthority, pair: KeyPair, env: dict[str, str]
) -> None:
    """A TLS connection that has received much at once keeps large buffers until it is closed. So an idle one is closed
    when another connection receives much. Connections that receive little stay open."""
    limits = {"large_tls_connections": 2}
    running = start(env=env, tls=[str(pair.certificate), str(pair.key)], limits=limits)
    context = client_context(authority.certificate)
    with contextlib.ExitStack() as stack:
        small = stack.enter_context(tls_connection(running, context))
        ask(small)
        clients = [BurstClient(running, context) for _ in range(5)]
        for client in clients:
            stack.callback(client.sock.close)
            assert client.post().startswith(b"HTTP/1.1 200")
        for client in clients[:3]:
            client.wait_closed()
        for client in clients[3:]:
            assert client.post().startswith(b"HTTP/1.1 200")
        ask(small)


def test_number_of_tls_connections_is_limited(start: Start, authority: CertificateAuthority, pair: KeyPair) -> None:
    """A server has at most as many TLS connections as the memory allows. It closes idle ones for a new one."""
    running = start(tls=[str(pair.certificate), str(pair.key)], limits={"tls_connections": 3})
    context = client_context(authority.certificate)
    with contextlib.ExitStack() as stack:
        connections = []
        for _ in range(5):
            connections.append(stack.enter_context(tls_connection(running, context)))
            ask(connections[-1])
        are_open = [is_open(connection) for connection in connections]
        assert are_open[-1]
        assert sum(are_open) <= 3


def is_open(connection: ssl.SSLSocket) -> bool:
    """Returns whether the server still answers requests on the connection."""
    try:
        ask(connection)
    except (OSError, http.client.BadStatusLine):
        return False
    return True


async def _app(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that sends a response to each request."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def _serve_one(pair: KeyPair, context: ssl.SSLContext) -> weakref.ref[RegistryProtocol]:
    """Serves one connection over TLS, until it is lost. Returns a reference to it that does not keep it in memory."""
    loop = asyncio.get_running_loop()
    worker = WorkerContext(_app, loop, ServerLimits(), UnsentBudget(0, 0.1, loop.time))
    connection_refs: list[weakref.ref[RegistryProtocol]] = []
    lost = asyncio.Event()

    def make_protocol() -> RegistryProtocol:
        connection = RegistryProtocol(worker, lost.set)
        connection_refs.append(weakref.ref(connection))
        return connection

    server_context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server_context.load_cert_chain(pair.certificate, pair.key)
    server = await loop.create_server(make_protocol, "127.0.0.1", 0, ssl=server_context)
    port = server.sockets[0].getsockname()[1]
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="localhost")
    writer.write(b"GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
    assert (await reader.read()).endswith(b"ok")
    writer.close()
    await lost.wait()
    server.close()
    for _ in range(20):
        await asyncio.sleep(0)
    return connection_refs[0]


@pytest.mark.parametrize("make_loop", [new_event_loop, asyncio.new_event_loop])
def test_a_lost_tls_connection_is_freed_at_once(
    no_automatic_collection: None,
    authority: CertificateAuthority,
    pair: KeyPair,
    make_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    """A lost TLS connection leaves no reference cycle with its transport, so the buffers of TLS are freed without the
    garbage collector."""
    loop = make_loop()
    try:
        connection_ref = loop.run_until_complete(_serve_one(pair, client_context(authority.certificate)))
        assert connection_ref() is None
    finally:
        loop.close()
