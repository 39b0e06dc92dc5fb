"""A worker that checks, retires or closes all of its connections handles other events in between, and an error in one
step of its maintenance does not end the maintenance."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from registry.asgi import Receive, Scope, Send
from registry.server.connection.context import WorkerContext
from registry.server.connection.protocol import RegistryProtocol
from registry.server.connection.unsent_budget import UnsentBudget
from registry.server.gate.certificates import CertificateFiles, Certificates
from registry.server.gate.connection_limit import ConnectionLimit
from registry.server.process.maintenance import CONNECTIONS_PER_STEP, Maintenance, visit_in_steps
from registry.server.server_limits import ServerLimits
from tests.fakes.app_in_process import until
from tests.fakes.certificate_authority import CertificateAuthority


class CountingTransport(asyncio.Transport):
    """A transport that adds each written response to `answered`. Several transports can share this list."""

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


class BrokenTransport(CountingTransport):
    """A transport that cannot write."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        raise RuntimeError("the transport is broken")


async def no_app(scope: Scope, receive: Receive, send: Send) -> None:
    pytest.fail("the application was called")


def open_connection(worker: WorkerContext, transport: asyncio.Transport) -> None:
    """Opens a connection whose client has sent only the first byte of a request."""
    connection = RegistryProtocol(worker)
    connection.connection_made(transport)
    connection.get_buffer(-1)[:1] = b"G"
    connection.buffer_updated(1)


async def test_timeouts_of_many_connections_leave_time_for_other_events() -> None:
    """When 1,000 connections time out at the same moment, the worker refuses at most 200 requests in one iteration of
    the event loop. Other events need not wait for all connections. All requests are refused in the end."""
    loop = asyncio.get_running_loop()
    limits = replace(ServerLimits(), head_seconds=0.0, timeout_check_seconds=0.001)
    worker = WorkerContext(no_app, loop, limits, UnsentBudget(0, 0.1, loop.time))
    answered: list[bytes] = []
    for _ in range(1000):
        open_connection(worker, CountingTransport(answered))
    connections = worker.state.connections
    maintenance = Maintenance(loop, worker.state, limits, ConnectionLimit(connections, set(), set(), loop.time), None)
    maintenance.start()
    most_in_one_iteration, answered_before = 0, 0
    async with asyncio.timeout(60):
        while len(answered) < 1000:
            await asyncio.sleep(0)
            most_in_one_iteration = max(most_in_one_iteration, len(answered) - answered_before)
            answered_before = len(answered)
    maintenance.stop()
    assert most_in_one_iteration <= 200
    assert all(answer.startswith(b"HTTP/1.1 408 ") for answer in answered)


async def test_errors_do_not_end_the_maintenance(tmp_path: Path) -> None:
    """The transport of one connection fails, and each check of the certificate fails. The worker reports both errors to
    the event loop. It still checks the timeouts of the other connections, and updates the Date header."""
    loop = asyncio.get_running_loop()
    reported: list[str] = []
    loop.set_exception_handler(lambda _, context: reported.append(str(context["exception"])))
    limits = replace(ServerLimits(), head_seconds=0.0, timeout_check_seconds=0.001, certificate_check_seconds=0.0)
    worker = WorkerContext(no_app, loop, limits, UnsentBudget(0, 0.1, loop.time))
    answered: list[bytes] = []
    for transport in (BrokenTransport(answered), CountingTransport(answered)):
        open_connection(worker, transport)
    times = [time.time()]  # the clock fails at the second call
    pair = CertificateAuthority(tmp_path).sign("server")
    certificates = Certificates(CertificateFiles(pair.certificate, pair.key), clock=times.pop)
    os.utime(pair.certificate, (0, 0))
    connections = worker.state.connections
    limit = ConnectionLimit(connections, set(), set(), loop.time)
    maintenance = Maintenance(loop, worker.state, limits, limit, certificates)
    maintenance.start()
    await until(lambda: bool(answered) and len(set(reported)) == 2)
    headers = worker.state.default_headers
    await until(lambda: worker.state.default_headers is not headers)
    maintenance.stop()
    assert set(reported) == {"the transport is broken", "pop from empty list"}


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
