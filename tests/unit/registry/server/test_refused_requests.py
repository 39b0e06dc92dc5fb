"""The server refuses some requests without calling the application. It reports each of them to the application's
request recorder, which writes the log and counts metrics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

import pytest

from registry.asgi import Receive, Scope, Send
from registry.server.connection.context import WorkerContext
from registry.server.connection.protocol import RegistryProtocol
from registry.server.connection.request_reports import RequestEnd, RequestReports
from registry.server.connection.unsent_budget import UnsentBudget
from registry.server.gate.acceptor import Acceptor
from registry.server.gate.connection_limit import ConnectionLimit
from registry.server.gate.listener import ListenerOptions, bind
from registry.server.gate.per_address_limit import PerAddressLimit
from registry.server.server_limits import ServerLimits

RequestReport = tuple[str, bytes, int, str]
"""The method, path, status and reason of a request."""


async def until(condition: Callable[[], bool]) -> None:
    """Waits until the condition holds."""
    while True:
        if condition():
            return
        await asyncio.sleep(0.001)


class App:
    """An application that reads the body and sends a response. It is its own request recorder: it keeps the reports of
    refused requests and of requests that have ended."""

    def __init__(self) -> None:
        self.request_recorder = self
        self.refused: list[RequestReport] = []
        self.ended: list[RequestReport] = []
        self.agents: list[list[tuple[bytes, bytes]]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        while (message := await receive()).get("more_body"):
            pass
        if message["type"] == "http.request":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body"})

    def on_refused(self, scope: Scope, end: RequestEnd) -> None:
        assert scope["client"][0] == "127.0.0.1"
        self.agents.append([header for header in scope["headers"] if header[0] == b"user-agent"])
        self.refused.append((scope["method"], scope["raw_path"], end.status, end.reason))

    def on_request_end(self, scope: Scope, end: RequestEnd) -> None:
        self.ended.append((scope["method"], scope["raw_path"], end.status, end.reason))


class ListeningServer:
    """A listening server. It does not check timeouts by itself: the tests call `check_timeouts`."""

    def __init__(self, app: App, worker: WorkerContext, port: int) -> None:
        self.app = app
        self.worker = worker
        self.port = port

    async def talk(self, sent: bytes) -> bytes:
        """Sends `sent` over a new connection, and returns all bytes that the server sends until it closes the
        connection."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(sent)
        answer = await reader.read()
        writer.close()
        return answer

    async def until_received(self) -> RegistryProtocol:
        """Waits until the server has received a part of a request, and returns the connection."""
        while True:
            for connection in self.worker.state.connections:
                assert isinstance(connection, RegistryProtocol)
                if connection._requests_started:
                    return connection
            await asyncio.sleep(0.001)


@pytest.fixture
async def server() -> AsyncIterator[ListeningServer]:
    loop, app = asyncio.get_running_loop(), App()
    worker = WorkerContext(app, loop, ServerLimits(head_bytes=2000), UnsentBudget(1 << 20, 0.1, loop.time))
    server = await loop.create_server(lambda: RegistryProtocol(worker), "127.0.0.1", 0)
    async with server, asyncio.timeout(60):
        yield ListeningServer(app, worker, server.sockets[0].getsockname()[1])
        for connection in list(worker.state.connections):
            connection.abort()


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (b"\x16\x03\x01\r\n\r\n", ("", b"", 400, "this is not a valid HTTP/1.1 request")),
        (b"GET /a b HTTP/1.1\r\n\r\n", ("GET", b"/a", 400, "this is not a valid HTTP/1.1 request")),
        (b"PUT /v2/a HTTP/1.1\r\n\r\n", ("PUT", b"/v2/a", 400, "the request must have one Host header")),
        (b"GET http://me:secret@x/ HTTP/1.1\r\nHost: x\r\n\r\n", ("GET", b"", 400, "the request target is not a path")),
        (b"GET /a?token=secret HTTP/1.1\r\nX: " + b"x" * 2000, ("GET", b"/a", 431, "the headers are too large")),
        (b"GET /" + b"x" * 2500, ("GET", b"/" + b"x" * 2500, 414, "the request target is too long")),
        (
            b"POST /b HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n",
            ("POST", b"/b", 400, "the only supported transfer coding is chunked"),
        ),
    ],
    ids=["no HTTP", "request line", "no host", "password in the target", "long head", "long target", "coding"],
)
async def test_a_malformed_head(server: ListeningServer, sent: bytes, expected: RequestReport) -> None:
    """A request with a malformed head is reported once. The report has the method and the path as far as they are
    known, and no secrets from the request."""
    assert (await server.talk(sent)).startswith(f"HTTP/1.1 {expected[2]} ".encode())
    ((method, path, status, reason),) = server.app.refused
    assert (method, path, status) == expected[:3]
    assert reason.startswith(expected[3])
    assert server.app.ended == []


async def test_the_report_has_the_headers_that_have_arrived(server: ListeningServer) -> None:
    """The report of a malformed request has the headers that have arrived, such as User-Agent, so that the log line
    has them as well."""
    await server.talk(b"GET / HTTP/1.1\r\nUser-Agent: docker/29\r\nAccept: */*\r\nbad\r\n\r\n")
    assert server.app.agents == [[(b"user-agent", b"docker/29")]]


async def test_a_malformed_request_after_a_good_one(server: ListeningServer) -> None:
    """If a malformed request follows a good one on the same connection, the good one is answered first. Then the
    malformed request is refused and reported."""
    answer = await server.talk(b"GET /good HTTP/1.1\r\nHost: x\r\n\r\nGET /bad HTTP/1.1\r\n\r\n")
    assert (answer.count(b"HTTP/1.1 200 "), answer.count(b"HTTP/1.1 400 ")) == (1, 1)
    assert server.app.ended == [("GET", b"/good", 200, "")]
    assert [report[:3] for report in server.app.refused] == [("GET", b"/bad", 400)]


@pytest.mark.parametrize(
    ("sent", "is_refused", "reason"),
    [
        (b"GET /a HTTP/1.1\r\nHost", True, "the headers were not received in time"),
        (
            b"PUT /a HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc",
            False,
            "the rest of the request's body was not received in time",
        ),
    ],
    ids=["head", "body"],
)
async def test_a_request_that_does_not_come_in_time(
    server: ListeningServer, sent: bytes, is_refused: bool, reason: str
) -> None:
    """If the head of a request does not arrive in time, the request is reported as refused. If only its body is
    missing, the application was called already, so the request is reported as ended."""
    talk = asyncio.create_task(server.talk(sent))
    connection = await server.until_received()
    await until(lambda: is_refused or (connection._active is not None and connection._active.body.is_awaited))
    now = server.worker.loop.time()
    connection.check_timeouts(now)  # notices that the connection waits
    connection.check_timeouts(now + 1000)
    assert (await talk).startswith(b"HTTP/1.1 408 ")
    method = "GET" if is_refused else "PUT"
    expected = [(method, b"/a", 408, reason)]
    await until(lambda: bool(server.app.refused or server.app.ended))
    assert (server.app.refused, server.app.ended) == ((expected, []) if is_refused else ([], expected))


async def test_a_connection_that_is_closed_in_the_middle_of_a_head(server: ListeningServer) -> None:
    """If the server closes a connection in the middle of a head, in favour of other connections, the request is
    reported."""
    talk = asyncio.create_task(server.talk(b"GET /a HTTP/1.1\r\nHost"))
    (await server.until_received()).evict()
    with suppress(ConnectionResetError):
        assert await talk == b""
    ((method, path, status, reason),) = server.app.refused
    assert (method, path, status) == ("GET", b"/a", 0)
    assert reason.endswith("to make room for another one")


async def test_an_address_with_too_many_connections() -> None:
    """The first connection beyond the limit of its address is reported. The next ones are not reported for ten seconds,
    so that a client cannot fill the log."""
    loop, app, limit = asyncio.get_running_loop(), App(), PerAddressLimit(1, workers=1)
    limit.set_own_column(limit.claim_column())
    limit.admit("127.0.0.1")
    listening = bind("127.0.0.1:0")
    address = listening.getsockname()
    acceptor = Acceptor(
        loop,
        listening,
        lambda _: pytest.fail("the connection was set up"),
        ListenerOptions(per_address_limit=limit),
        ServerLimits(),
        ConnectionLimit(set(), set(), set(), loop.time, max_open_files=400),
        set(),
        RequestReports(app).report_refused_connection,
    )
    try:
        async with asyncio.timeout(60):
            for _ in range(5):
                reader, writer = await asyncio.open_connection(*address)
                assert await reader.read() == b""
                writer.close()
    finally:
        acceptor.close()
    assert app.refused == [("", b"", 0, "the client's address has too many connections")]
