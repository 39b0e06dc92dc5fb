"""The server reports to the application each request that it refuses without calling the application."""

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

Seen = tuple[str, bytes, int, str]
"""Method, path, status and reason."""


async def until(condition: Callable[[], bool]) -> None:
    """Waits until the condition holds."""
    while True:
        if condition():
            return
        await asyncio.sleep(0.001)


class App:
    """An application that reads the body, sends a response, and keeps the reports of refused requests."""

    def __init__(self) -> None:
        self.request_recorder = self
        self.refused: list[Seen] = []
        self.ended: list[Seen] = []
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


class Site:
    """A listening server. The test checks the timeouts itself, at the time that the clock of the site shows."""

    def __init__(self, app: App, worker: WorkerContext, port: int) -> None:
        self.app = app
        self.worker = worker
        self.port = port

    async def talk(self, sent: bytes) -> bytes:
        """Sends bytes, and returns all bytes that the server sends until it ends the connection."""
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
async def site() -> AsyncIterator[Site]:
    loop, app = asyncio.get_running_loop(), App()
    worker = WorkerContext(app, loop, ServerLimits(header_bytes=2000), UnsentBudget(1 << 20, loop.time))
    server = await loop.create_server(lambda: RegistryProtocol(worker), "127.0.0.1", 0)
    async with server, asyncio.timeout(60):
        yield Site(app, worker, server.sockets[0].getsockname()[1])
        for connection in list(worker.state.connections):
            connection.abort()


@pytest.mark.parametrize(
    ("sent", "seen"),
    [
        (b"\x16\x03\x01\r\n\r\n", ("", b"", 400, "this is not a valid HTTP/1.1 request")),
        (b"GET /a b HTTP/1.1\r\n\r\n", ("GET", b"/a", 400, "this is not a valid HTTP/1.1 request")),
        (b"PUT /v2/a HTTP/1.1\r\n\r\n", ("PUT", b"/v2/a", 400, "the request must have one Host header")),
        (b"GET http://me:secret@x/ HTTP/1.1\r\nHost: x\r\n\r\n", ("GET", b"", 400, "the request target is not a path")),
        (b"GET /a?token=secret HTTP/1.1\r\nX: " + b"x" * 2000, ("GET", b"/a", 431, "the headers are too large")),
        (b"GET /" + b"x" * 2500, ("GET", b"/" + b"x" * 1999, 414, "the request target is too long")),
        (
            b"POST /b HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n",
            ("POST", b"/b", 400, "the only supported transfer coding is chunked"),
        ),
    ],
    ids=["no HTTP", "request line", "no host", "password in the target", "long head", "long target", "coding"],
)
async def test_a_malformed_head(site: Site, sent: bytes, seen: Seen) -> None:
    """A malformed head is reported once, with the method and the path as far as they are known, and without secrets."""
    assert (await site.talk(sent)).startswith(f"HTTP/1.1 {seen[2]} ".encode())
    ((method, path, status, reason),) = site.app.refused
    assert (method, path[:2000], status) == (seen[0], path[:2000] if seen[2] == 414 else seen[1], seen[2])
    assert reason.startswith(seen[3])
    assert site.app.ended == []


async def test_the_headers_that_came_are_known(site: Site) -> None:
    """The report has the headers that have arrived, so that the log line has the client's program and the request
    id."""
    await site.talk(b"GET / HTTP/1.1\r\nUser-Agent: docker/29\r\nAccept: */*\r\nbad\r\n\r\n")
    assert site.app.agents == [[(b"user-agent", b"docker/29")]]


async def test_a_request_in_a_queue(site: Site) -> None:
    """A malformed request after a good one on the same connection is reported after the response to the good one."""
    answer = await site.talk(b"GET /good HTTP/1.1\r\nHost: x\r\n\r\nGET /bad HTTP/1.1\r\n\r\n")
    assert (answer.count(b"HTTP/1.1 200 "), answer.count(b"HTTP/1.1 400 ")) == (1, 1)
    assert site.app.ended == [("GET", b"/good", 200, "")]
    assert [seen[:3] for seen in site.app.refused] == [("GET", b"/bad", 400)]


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
async def test_a_request_that_does_not_come_in_time(site: Site, sent: bytes, is_refused: bool, reason: str) -> None:
    """A request that does not arrive in time is reported with this reason. If only its body is missing, the application
    was called already, and is told that the request has ended."""
    talk = asyncio.create_task(site.talk(sent))
    connection = await site.until_received()
    await until(lambda: is_refused or (connection._active is not None and connection._active.body.is_awaited))
    now = site.worker.loop.time()
    connection.check_timeouts(now)
    connection.check_timeouts(now + 1000)
    assert (await talk).startswith(b"HTTP/1.1 408 ")
    method = "GET" if is_refused else "PUT"
    seen = [(method, b"/a", 408, reason)]
    await until(lambda: bool(site.app.refused or site.app.ended))
    assert (site.app.refused, site.app.ended) == ((seen, []) if is_refused else ([], seen))


async def test_a_request_that_makes_room_for_others(site: Site) -> None:
    """If a connection is closed in the middle of a head, to make room for others, its request is reported."""
    talk = asyncio.create_task(site.talk(b"GET /a HTTP/1.1\r\nHost"))
    (await site.until_received()).evict()
    with suppress(ConnectionResetError):
        assert await talk == b""
    ((method, path, status, reason),) = site.app.refused
    assert (method, path, status) == ("GET", b"/a", 0)
    assert reason.endswith("to make room for another one")


async def test_an_address_with_too_many_connections() -> None:
    """Each connection beyond the limit of its address is reported."""
    loop, app, limit = asyncio.get_running_loop(), App(), PerAddressLimit(1, workers=1)
    limit.use_column(limit.claim_column())
    limit.admit("127.0.0.1")
    listening = bind("127.0.0.1:0")
    address = listening.getsockname()
    acceptor = Acceptor(
        loop,
        listening,
        lambda _: pytest.fail("the connection was set up"),
        ListenerOptions(per_address_limit=limit),
        ServerLimits(),
        ConnectionLimit(set(), set(), set(), loop.time, limit=400),
        set(),
        RequestReports(app).report_refused_connection,
    )
    try:
        async with asyncio.timeout(60):
            reader, writer = await asyncio.open_connection(*address)
            assert await reader.read() == b""
            writer.close()
    finally:
        acceptor.close()
    assert app.refused == [("", b"", 0, "the client's address has too many connections")]
