"""Requests whose client resets the connection before the response has started, or before a file in it is sent."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from registry.asgi import Receive, Scope, Send
from registry.server.connection.context import WorkerContext
from registry.server.connection.protocol import RegistryProtocol
from registry.server.connection.request_reports import RequestEnd
from registry.server.connection.unsent_budget import UnsentBudget
from registry.server.server_limits import ServerLimits
from tests.unit.registry.conftest import wait_until

RESET_ON_CLOSE = struct.pack("ii", 1, 0)
"""Value of SO_LINGER with which `close` resets the connection."""


class WaitingApp:
    """An application that reads the body, waits for `upstream_answer`, and then sends a response. It does not read the
    body of a GET. For the path `/started`, it sends the status before it waits. `waiting`: number of the requests that
    wait. `ended`: how each request has ended. While `may_receive` is clear, it does not read bodies."""

    def __init__(self) -> None:
        self.upstream_answer = asyncio.Event()
        self.may_receive = asyncio.Event()
        self.may_receive.set()
        self.waiting = 0
        self.ended: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.may_receive.wait()
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
    worker = WorkerContext(app, loop, ServerLimits(), UnsentBudget(1 << 20, 0.1, loop.time))
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
    """If the client resets the connection, a write is not cancelled, nor is a read whose response has started. When the
    application then sends a part of the response, this raises ClientDisconnected."""
    await server.send_and_reset(method, path)
    server.app.upstream_answer.set()
    await server.wait_for_tasks()
    assert server.app.ended == ["ClientDisconnected"]


async def test_lost_connection_is_noticed_after_a_large_body(server: WaitingServer) -> None:
    """The whole of a body of 600 KiB arrives before the application reads it, so that the server pauses reading. When
    the body is complete, the server reads on, and notices that the client resets the connection."""
    size = 600 * 1024
    server.app.may_receive.clear()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        sock.connect(("127.0.0.1", server.port))
        head = f"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n".encode()
        await asyncio.to_thread(sock.sendall, head + bytes(size))
        await asyncio.sleep(0.1)  # the server receives as much as it accepts before the application reads
        server.app.may_receive.set()
        await wait_until(lambda: server.app.waiting == 1)
    await wait_until(lambda: not server.worker.state.connections)
    server.app.upstream_answer.set()
    await server.wait_for_tasks()
    assert server.app.ended == ["ClientDisconnected"]


FILE_BYTES = 1 << 30


class FileApp:
    """An application that sends a few bytes, and then a large file, in each response. It is its own request recorder.
    `ends`: how each request has ended."""

    def __init__(self, file: BinaryIO) -> None:
        self.request_recorder = self
        self.ends: list[RequestEnd] = []
        self._file = file

    def on_request_end(self, scope: Scope, end: RequestEnd) -> None:
        self.ends.append(end)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        length = b"%d" % (FILE_BYTES + 3)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
        await send({"type": "http.response.body", "body": b"abc", "more_body": True})
        await send({"type": "http.response.zerocopysend", "file": self._file, "offset": 0, "count": FILE_BYTES})


class FullTransport(asyncio.Transport):
    """The transport of a client that receives nothing: all that is written stays in its buffer."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__({"socket": sock})
        self.protocol: RegistryProtocol | None = None
        self.is_waiting = self.is_lost = False
        self._buffered_bytes = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._buffered_bytes += len(data)

    def get_write_buffer_size(self) -> int:
        return self._buffered_bytes

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        if high == 0 and self._buffered_bytes and self.protocol is not None:
            self.is_waiting = True
            self.protocol.pause_writing()

    def is_closing(self) -> bool:
        return self.is_lost

    def can_write_eof(self) -> bool:
        return False

    def close(self) -> None:
        self.is_lost = True

    abort = close

    def pause_reading(self) -> None:
        """Does nothing: the test delivers all bytes itself."""

    resume_reading = pause_reading


async def test_unsent_file_is_not_counted(tmp_path: Path) -> None:
    """If the connection is lost while earlier bytes of the response wait to be sent, the bytes of the file behind them
    do not count as sent."""
    loop = asyncio.get_running_loop()
    server_end, client_end = socket.socketpair()
    with (tmp_path / "file").open("w+b") as file, closing(server_end), closing(client_end):
        file.truncate(FILE_BYTES)
        app: Any = FileApp(file)
        transport = FullTransport(server_end)
        transport.protocol = protocol = RegistryProtocol(
            WorkerContext(app, loop, ServerLimits(), UnsentBudget(1 << 30, 0.1, loop.time))
        )
        protocol.connection_made(transport)
        request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
        protocol.get_buffer(-1)[: len(request)] = request
        protocol.buffer_updated(len(request))
        await wait_until(lambda: transport.is_waiting)
        transport.is_lost = True
        protocol.connection_lost(None)
        await wait_until(lambda: bool(app.ends))
    assert (app.ends[0].is_complete, app.ends[0].sent_bytes) == (False, 3)
