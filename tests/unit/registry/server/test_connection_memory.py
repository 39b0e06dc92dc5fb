"""The server frees the memory of a connection as soon as the connection is lost."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
import weakref
from collections.abc import Iterator

import pytest

from registry.asgi import Receive, Scope, Send
from registry.server.connection.context import WorkerContext
from registry.server.connection.protocol import RegistryProtocol
from registry.server.connection.request_reader import MAX_HELD_BYTES
from registry.server.connection.unsent_budget import UnsentBudget
from registry.server.server_limits import ServerLimits

GET = b"GET / HTTP/1.1\r\nHost: test\r\n\r\n"
CHUNKED_POST = b"POST / HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n"
UNFINISHED_POST = b"POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 10\r\n\r\nabc"


class RecordingTransport(asyncio.Transport):
    """A transport that records everything that is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return False

    def can_write_eof(self) -> bool:
        return False

    def abort(self) -> None:
        """Does nothing: the test calls `connection_lost` itself."""

    def pause_reading(self) -> None:
        """Does nothing: the test delivers all bytes itself."""

    def resume_reading(self) -> None:
        """Does nothing: the test delivers all bytes itself."""


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that reads the body and sends a response."""
    while (message := await receive())["type"] == "http.request" and message["more_body"]:
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def no_automatic_collection() -> Iterator[None]:
    """Disables automatic garbage collection."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize(
    "sent", [b"", b"GET / HT", GET, GET * 3, UNFINISHED_POST], ids=["nothing", "half", "one", "many", "body"]
)
async def test_a_lost_connection_is_freed_at_once(no_automatic_collection: None, sent: bytes) -> None:
    """A lost connection leaves neither a reference cycle nor a task, whatever part of a request it had received."""
    loop = asyncio.get_running_loop()
    worker = WorkerContext(app, loop, ServerLimits(), UnsentBudget(0, 0.1, loop.time))
    connection = RegistryProtocol(worker)
    transport = RecordingTransport()
    connection.connection_made(transport)
    connection.get_buffer(-1)[: len(sent)] = sent
    connection.buffer_updated(len(sent))
    for _ in range(20):
        await asyncio.sleep(0)
    assert transport.written.count(b"200 OK") == sent.count(b"GET / HTTP/1.1")
    connection.connection_lost(None)
    for _ in range(5):
        await asyncio.sleep(0)
    assert not worker.state.tasks
    assert not worker.state.connections
    lost_connection = weakref.ref(connection)
    del connection
    assert lost_connection() is None


async def test_pipelined_requests_take_little_memory(no_automatic_collection: None) -> None:
    """While a request is being answered, the connection keeps the bytes of the requests that the client has sent ahead,
    and parses them only when their turn comes. Parsed requests would take 3 KB each."""
    loop, answering = asyncio.get_running_loop(), asyncio.Event()

    async def waiting_app(scope: Scope, receive: Receive, send: Send) -> None:
        await answering.wait()
        await app(scope, receive, send)

    worker = WorkerContext(waiting_app, loop, ServerLimits(), UnsentBudget(0, 0.1, loop.time))
    connections = [RegistryProtocol(worker) for _ in range(100)]
    transports = [RecordingTransport() for _ in connections]
    for connection, transport in zip(connections, transports, strict=True):
        connection.connection_made(transport)
    sent = GET * 65
    tracemalloc.start()
    try:
        for connection in connections:
            connection.get_buffer(-1)[: len(sent)] = sent
            connection.buffer_updated(len(sent))
        bytes_per_connection = tracemalloc.get_traced_memory()[0] / len(connections)
    finally:
        tracemalloc.stop()
    assert bytes_per_connection < len(sent) + 10_000
    answering.set()
    for _ in range(400):
        await asyncio.sleep(0)
    assert {transport.written.count(b"200 OK") for transport in transports} == {65}
    for connection in connections:
        connection.connection_lost(None)


async def test_requests_after_a_chunked_body_take_little_memory() -> None:
    """The end of a chunked body can arrive in one read with many further requests. If these have more than 16 KiB, the
    server ignores them, and the connection ends after the response to the request with this body."""
    loop = asyncio.get_running_loop()
    worker = WorkerContext(app, loop, ServerLimits(), UnsentBudget(0, 0.1, loop.time))
    connection, transport = RegistryProtocol(worker), RecordingTransport()
    connection.connection_made(transport)
    for sent in (CHUNKED_POST, b"3\r\nabc\r\n0\r\n\r\n" + GET * (MAX_HELD_BYTES // len(GET) + 1)):
        connection.get_buffer(-1)[: len(sent)] = sent
        connection.buffer_updated(len(sent))
    for _ in range(20):
        await asyncio.sleep(0)
    assert transport.written.count(b"HTTP/1.1 ") == 1
    assert b"connection: close" in transport.written
    connection.connection_lost(None)
