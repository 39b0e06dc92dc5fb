"""Requests whose client resets the connection before the response has started."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator

import pytest

from registry.asgi import Receive, Scope, Send
from registry.server.connection.context import WorkerContext
from registry.server.connection.protocol import RegistryProtocol
from registry.server.connection.unsent_budget import UnsentBudget
from registry.server.server_limits import ServerLimits
from tests.unit.registry.conftest import wait_until

RESET_ON_CLOSE = struct.pack("ii", 1, 0)
"""Value of SO_LINGER with which `close` resets the connection."""


class WaitingApp:
    """An application that reads the body, waits for `upstream_answer`, and then sends a response. It does not read the
    body of a GET. For the path `/started`, it sends the status before it waits. `waiting`: number of the requests that
    wait. `ended`: how each request has ended."""

    def __init__(self) -> None:
        self.upstream_answer = asyncio.Event()
        self.waiting = 0
        self.ended: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        while scope["method"] != "GET" and (await receive()).get("more_body"):
            pass
        is_started = scope["path"] == "/started"
        start = {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]}
        try:
            if is_started:
                await send(start)
            self.waiting += 1
            await self.upstream_answer.wait()
            if not is_started:
                await send(start)
            await send({"type": "http.response.body", "body": b"x"})
        except BaseException as error:
            self.ended.append(type(error).__name__)
            raise
        else:
            self.ended.append("answered")


class WaitingServer:
    """A server with a `WaitingApp`."""

    def __init__(self, worker: WorkerContext, app: WaitingApp, port: int) -> None:
        self.worker = worker
        self.app = app
        self.port = port

    async def send_and_reset(self, method: str, path: str) -> None:
        """Sends a request, waits until the application waits, and resets the connection. Returns when the server has
        noticed the reset."""
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            sock.connect(("127.0.0.1", self.port))
            body = b"" if method in ("GET", "HEAD") else b"Content-Length: 1\r\n"
            waiting_before = self.app.waiting
            sock.sendall(f"{method} {path} HTTP/1.1\r\nHost: x\r\n".encode() + body + b"\r\n" + (b"a" if body else b""))
            await wait_until(lambda: self.app.waiting > waiting_before)
        await wait_until(lambda: not self.worker.state.connections)

    async def wait_for_tasks(self) -> None:
        """Waits until all requests have ended."""
        await wait_until(lambda: not self.worker.state.tasks)


@pytest.fixture
async def server() -> AsyncIterator[WaitingServer]:
    loop, app = asyncio.get_running_loop(), WaitingApp()
    worker = WorkerContext(app, loop, ServerLimits(), UnsentBudget(1 << 20, loop.time))
    listening = await loop.create_server(lambda: RegistryProtocol(worker), "127.0.0.1", 0)
    async with listening, asyncio.timeout(60):
        yield WaitingServer(worker, app, listening.sockets[0].getsockname()[1])


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_read_is_cancelled_when_its_connection_is_lost(server: WaitingServer, method: str) -> None:
    """If the client resets the connection while a read waits for its response, the request ends at once. So requests of
    clients that are gone do not collect."""
    await server.send_and_reset(method, "/")
    await server.wait_for_tasks()
    assert server.app.ended == ["CancelledError"]


async def test_read_with_an_invalid_body_is_cancelled(server: WaitingServer) -> None:
    """If the server refuses the body of a read that waits for its response, the client gets the error response, and the
    read ends at once."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    await wait_until(lambda: server.app.waiting > 0)
    writer.write(b"no chunk\r\n")
    assert (await reader.readline()).startswith(b"HTTP/1.1 400 ")
    await server.wait_for_tasks()
    assert server.app.ended == ["CancelledError"]
    writer.close()


@pytest.mark.parametrize(
    ("method", "path"),
    [("PUT", "/"), ("POST", "/"), ("PATCH", "/"), ("DELETE", "/"), ("GET", "/started")],
)
async def test_write_and_started_response_are_not_cancelled(server: WaitingServer, method: str, path: str) -> None:
    """If the client resets the connection, a write runs to its end, and so does a read whose response has started:
    sending the next part then raises ClientDisconnected."""
    await server.send_and_reset(method, path)
    server.app.upstream_answer.set()
    await server.wait_for_tasks()
    assert server.app.ended == ["ClientDisconnected"]
