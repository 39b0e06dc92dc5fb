"""Responses without an end of their own, such as streams of events, when the client shuts down its sending side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from registry.asgi import ENDS_ON_HALF_CLOSE, Receive, Scope, Send
from registry.server.connection.context import WorkerContext
from registry.server.connection.protocol import RegistryProtocol
from registry.server.connection.unsent_budget import UnsentBudget
from registry.server.server_limits import ServerLimits
from tests.unit.registry.conftest import wait_until


class EndlessApp:
    """An application that starts a response when `start` is set, sends one part, and then waits until the client has
    disconnected. `is_called`: whether it got the request. `has_started`: whether it has sent the part.
    `saw_disconnect`: whether it was told that the client has disconnected."""

    def __init__(self, *, ends_on_half_close: bool) -> None:
        self._ends_on_half_close = ends_on_half_close
        self.start = asyncio.Event()
        self.is_called = self.has_started = self.saw_disconnect = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.is_called = True
        await self.start.wait()
        await send({"type": "http.response.start", "status": 200, ENDS_ON_HALF_CLOSE: self._ends_on_half_close})
        await send({"type": "http.response.body", "body": b"part", "more_body": True})
        self.has_started = True
        while (await receive())["type"] != "http.disconnect":
            pass
        self.saw_disconnect = True


@asynccontextmanager
async def serving(app: EndlessApp) -> AsyncIterator[tuple[WorkerContext, asyncio.StreamReader, asyncio.StreamWriter]]:
    """Serves `app`, and yields the worker and a connection of a client that has sent a request."""
    loop = asyncio.get_running_loop()
    worker = WorkerContext(app, loop, ServerLimits(), UnsentBudget(1 << 20, 0.1, loop.time))
    listening = await loop.create_server(lambda: RegistryProtocol(worker), "127.0.0.1", 0)
    async with listening, asyncio.timeout(60):
        reader, writer = await asyncio.open_connection(*listening.sockets[0].getsockname())
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await wait_until(lambda: app.is_called)
        yield worker, reader, writer
        writer.close()


async def end_input(worker: WorkerContext, writer: asyncio.StreamWriter) -> None:
    """Shuts down the client's sending side. Returns when the server has noticed it."""
    (connection,) = worker.state.connections
    writer.write_eof()
    await wait_until(lambda: connection._is_half_closed)  # type: ignore[attr-defined]


async def check_timeouts(worker: WorkerContext, *times: float) -> None:
    """Checks the timeouts as the worker does, at these numbers of seconds from now."""
    now = asyncio.get_running_loop().time()
    for connection in tuple(worker.state.connections):
        for seconds in times:
            connection.check_timeouts(now + seconds)


async def test_the_response_ends_with_the_input() -> None:
    """If the response ends with the client's input, the server takes the end of the input for the end of the
    connection, and tells the application at once. It could tell one from the other only by sending something."""
    app = EndlessApp(ends_on_half_close=True)
    app.start.set()
    async with serving(app) as (worker, reader, writer):
        await wait_until(lambda: app.has_started)
        await end_input(worker, writer)
        assert (await reader.read()).endswith(b"part\r\n")
        await wait_until(lambda: not worker.state.tasks)
    assert app.saw_disconnect


@pytest.mark.parametrize(("ends_on_half_close", "seconds"), [(True, 1.0), (False, ServerLimits().half_close_seconds)])
async def test_the_response_starts_after_the_end_of_the_input(ends_on_half_close: bool, seconds: float) -> None:
    """If the input ends before the response starts, the application is told at the second check of the timeouts if the
    response ends with the input. For any other response, it is told after a timeout."""
    app = EndlessApp(ends_on_half_close=ends_on_half_close)
    async with serving(app) as (worker, _, writer):
        await end_input(worker, writer)
        app.start.set()
        await wait_until(lambda: app.has_started)
        await check_timeouts(worker, 0.0, seconds - 0.1)
        assert ends_on_half_close or worker.state.connections
        await check_timeouts(worker, seconds)
        await wait_until(lambda: not worker.state.tasks)
    assert app.saw_disconnect
