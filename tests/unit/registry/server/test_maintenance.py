"""A worker that checks, retires or closes all of its connections handles other events in between."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from registry.asgi import Receive, Scope, Send
from registry.server.connection.context import WorkerContext
from registry.server.connection.protocol import RegistryProtocol
from registry.server.connection.unsent_budget import UnsentBudget
from registry.server.gate.connection_limit import ConnectionLimit
from registry.server.process.maintenance import CONNECTIONS_PER_STEP, Maintenance, visit_in_steps
from registry.server.server_limits import ServerLimits


class CountingTransport(asyncio.Transport):
    """A transport that keeps what is written, and counts responses of all transports with the same `answered`."""

    def __init__(self, answered: list[bytes]) -> None:
        super().__init__()
        self._answered = answered

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._answered.append(bytes(data))

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return False

    def can_write_eof(self) -> bool:
        return False


async def no_app(scope: Scope, receive: Receive, send: Send) -> None:
    pytest.fail("the application was called")


async def test_timeouts_of_many_connections_leave_time_for_other_events() -> None:
    """When 1,000 connections time out at the same moment, the worker refuses at most 200 requests in one iteration of
    the event loop. The other events wait only for these, not for all connections. All requests are refused in the
    end."""
    loop = asyncio.get_running_loop()
    limits = replace(ServerLimits(), header_seconds=0.0, timeout_check_seconds=0.001)
    worker = WorkerContext(no_app, loop, limits, UnsentBudget(0, loop.time))
    answered: list[bytes] = []
    for _ in range(1000):
        connection = RegistryProtocol(worker)
        connection.connection_made(CountingTransport(answered))
        connection.get_buffer(-1)[:1] = b"G"
        connection.buffer_updated(1)
    connections = worker.state.connections
    maintenance = Maintenance(loop, worker.state, limits, ConnectionLimit(connections, set(), set(), loop.time), None)
    maintenance.start()
    most_in_one_iteration, seen = 0, 0
    async with asyncio.timeout(60):
        while len(answered) < 1000:
            await asyncio.sleep(0)
            most_in_one_iteration, seen = max(most_in_one_iteration, len(answered) - seen), len(answered)
    maintenance.stop()
    assert most_in_one_iteration <= 200
    assert all(answer.startswith(b"HTTP/1.1 408 ") for answer in answered)


async def test_connection_that_is_lost_between_two_steps_is_not_visited() -> None:
    """If a connection is lost before its step comes, it is skipped. Its memory is no longer valid."""
    connections = set(range(3 * CONNECTIONS_PER_STEP))
    visited: list[int] = []
    visiting = asyncio.create_task(visit_in_steps(connections, visited.append))
    await asyncio.sleep(0)
    assert len(visited) == CONNECTIONS_PER_STEP
    lost = set(sorted(connections - set(visited))[:10])
    connections -= lost
    await visiting
    assert sorted(visited) == sorted(connections)
