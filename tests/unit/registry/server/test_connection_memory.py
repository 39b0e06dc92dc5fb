"""The server frees the memory of a connection as soon as the connection is lost."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator

import pytest

from registry.asgi import Receive, Scope, Send
from registry.server.connection.context import WorkerContext
from registry.server.connection.protocol import RegistryProtocol
from registry.server.connection.unsent_budget import UnsentBudget
from registry.server.server_limits import ServerLimits

GET = b"GET / HTTP/1.1\r\nHost: test\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 10\r\n\r\nabc"


class RecordingTransport(asyncio.Transport):
    """A transport that accepts everything that is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
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


@pytest.mark.parametrize("sent", [b"", b"GET / HT", GET, GET * 3, POST], ids=["nothing", "half", "one", "many", "body"])
async def test_a_lost_connection_is_freed_at_once(no_automatic_collection: None, sent: bytes) -> None:
    """A lost connection leaves neither a reference cycle nor a task, whatever part of a request it had received."""
    loop = asyncio.get_running_loop()
    worker = WorkerContext(app, loop, ServerLimits(), UnsentBudget(0, loop.time))
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
