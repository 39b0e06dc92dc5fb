"""How much memory the TLS connections of a worker may use: how many there may be, and how many of them may have large
buffers."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from registry.server.connection.context import WorkerContext
from registry.server.connection.protocol import RegistryProtocol
from registry.server.connection.unsent_budget import UnsentBudget
from registry.server.gate.connection_limit import MAX_CONNECTIONS, EvictionCandidate
from registry.server.gate.tls_memory import (
    LARGE_CONNECTION_BYTES,
    LARGE_READ_BYTES,
    MAX_EXAMINED,
    TLS_CONNECTION_BYTES,
    LargeBufferLimit,
    tls_limits,
)
from registry.server.memory_limit import memory_limit
from registry.server.server_limits import ServerLimits
from tests.unit.registry.conftest import wait_until
from tests.unit.registry.server.test_connection_memory import GET, RecordingTransport, app

GIB = 1 << 30


class FakeConnection:
    """A connection that is idle or has a request in progress."""

    def __init__(self, *, is_idle: bool) -> None:
        self.is_idle, self.is_evicted, self.examined = is_idle, False, 0

    def eviction_candidate(self, now: float) -> EvictionCandidate | None:
        self.examined += 1
        return EvictionCandidate("idle", now, None) if self.is_idle else None

    def evict(self) -> None:
        self.is_evicted = True


class TlsTransport(RecordingTransport):
    """A transport that says that it uses TLS."""

    def __init__(self, sock: socket.socket | None = None) -> None:
        super().__init__()
        self.is_aborted = self.is_being_closed = False
        self.sock = sock

    def is_closing(self) -> bool:
        return self.is_being_closed

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"sslcontext": object(), "socket": self.sock}.get(name) or default

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Does nothing: nothing is ever in the buffer."""

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Does nothing: the connection is lost."""

    def abort(self) -> None:
        self.is_aborted = True


def fake_connections(count: int, *, is_idle: bool) -> list[FakeConnection]:
    return [FakeConnection(is_idle=is_idle) for _ in range(count)]


@pytest.mark.parametrize("memory_bytes", [2 * GIB, 16 * GIB, 64 * GIB])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_tls_connections_use_at_most_a_quarter_of_the_memory(memory_bytes: int, workers: int) -> None:
    """All TLS connections of all workers together use at most a quarter of the memory, even if as many of them have
    large buffers as may. Each worker may have at least 512."""
    connections, large = tls_limits(memory_bytes, workers)
    assert 512 <= connections <= MAX_CONNECTIONS
    per_worker = connections * TLS_CONNECTION_BYTES + large * LARGE_CONNECTION_BYTES
    assert per_worker * workers <= memory_bytes // 4


def test_a_small_machine_has_a_few_hundred_tls_connections() -> None:
    """With little memory, a worker may still have 512 TLS connections, and 64 of them with large buffers."""
    assert tls_limits(GIB // 4, 4) == (512, 64)


def test_an_unknown_amount_of_memory_sets_no_limit() -> None:
    """If the amount of memory is unknown, the limits of the connections are those of a large machine."""
    assert tls_limits(0, 4)[0] == MAX_CONNECTIONS


def test_memory_of_a_container_is_that_of_its_control_group(tmp_path: Path) -> None:
    """The memory is limited by the control group of the process and by those above it, of version 1 or 2. A group
    without a limit changes nothing."""
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    (proc / "self").mkdir(parents=True)
    (groups / "memory/docker/1").mkdir(parents=True)
    (groups / "system.slice/entrepot.service").mkdir(parents=True)
    everything = memory_limit(proc, groups)
    assert everything > 0
    (proc / "self/cgroup").write_text("0::/system.slice/entrepot.service\n")
    (groups / "system.slice/entrepot.service/memory.max").write_text("max\n")
    assert memory_limit(proc, groups) == everything
    (groups / "system.slice/memory.max").write_text("50000000\n")
    assert memory_limit(proc, groups) == 50_000_000
    (groups / "system.slice/entrepot.service/memory.max").write_text("40000000\n")
    assert memory_limit(proc, groups) == 40_000_000
    (proc / "self/cgroup").write_text("5:cpu:/\n4:memory:/docker/1\n")
    (groups / "memory/memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert memory_limit(proc, groups) == everything
    (groups / "memory/docker/1/memory.limit_in_bytes").write_text("30000000\n")
    assert memory_limit(proc, groups) == 30_000_000


def test_a_container_sees_only_its_own_control_group(tmp_path: Path) -> None:
    """In a container, the path of the control group can be one of the host, while the limit is at the root of what the
    container sees."""
    (tmp_path / "self").mkdir()
    (tmp_path / "self/cgroup").write_text("0::/../../kubepods/pod1\n")
    (tmp_path / "memory.max").write_text("60000000\n")
    assert memory_limit(tmp_path, tmp_path) == 60_000_000


def test_odd_control_groups_do_not_stop_the_start(tmp_path: Path) -> None:
    """A line of an unknown form is ignored. The name of a control group may contain two dots, and bytes that are not
    UTF-8."""
    group = tmp_path / os.fsdecode(b"a..b\xff")
    group.mkdir()
    (tmp_path / "self").mkdir()
    (tmp_path / "self/cgroup").write_bytes(b"odd\n7:memory\n\n1:memory://x\n0::/a..b\xff\n")
    (group / "memory.max").write_text("70000000\n")
    assert memory_limit(tmp_path, tmp_path) == 70_000_000


def test_idle_connections_with_large_buffers_are_closed_first() -> None:
    """If too many connections have large buffers, one that is idle is closed, even if others are counted for longer."""
    limit = LargeBufferLimit(3, lambda: 0.0)
    busy, idle = fake_connections(3, is_idle=False), fake_connections(1, is_idle=True)
    for connection in (busy[0], busy[1], idle[0], busy[2]):
        limit.add(connection, "a")
    assert [connection.is_evicted for connection in (*busy, *idle)] == [False, False, False, True]
    assert limit.count == 3


def test_the_address_with_most_large_buffers_loses_one() -> None:
    """If all connections with large buffers have requests in progress, one of the address that has most of them is
    closed. An IPv6 network of 64 bits counts as one address. Connections of trusted proxies, whose address is None, are
    closed last."""
    limit = LargeBufferLimit(7, lambda: 0.0)
    proxied, others, many = (fake_connections(count, is_idle=False) for count in (4, 1, 3))
    for connections, address in ((proxied, None), (others, "192.0.2.1"), (many, "2001:db8::")):
        for number, connection in enumerate(connections):
            limit.add(connection, f"{address}{number}" if connections is many else address)
    assert sum(connection.is_evicted for connection in many) == 1
    assert not any(connection.is_evicted for connection in (*proxied, *others))


def test_a_connection_that_is_closed_no_longer_counts() -> None:
    """A connection counts once, until it is lost."""
    limit = LargeBufferLimit(1, lambda: 0.0)
    first, second = fake_connections(2, is_idle=True)
    for _ in range(3):
        limit.add(first, "a")
    limit.discard(first)
    limit.discard(first)
    limit.add(second, "a")
    assert not first.is_evicted
    assert not second.is_evicted


def test_no_busy_connection_is_closed_while_another_is_idle() -> None:
    """A connection with a request in progress stays open as long as one of the others is idle, however many are
    examined before that one."""
    limit = LargeBufferLimit(2 * MAX_EXAMINED + 1, lambda: 0.0)
    busy, idle = fake_connections(2 * MAX_EXAMINED + 1, is_idle=False), fake_connections(1, is_idle=True)
    for connection in (*busy[:-1], *idle, busy[-1]):
        limit.add(connection, "a")
    assert idle[0].is_evicted
    assert not any(connection.is_evicted for connection in busy)


def test_a_connection_that_is_being_closed_is_closed_before_a_busy_one() -> None:
    """If no connection is silent, one that is being closed is closed first. Its client may have vanished, and has
    nothing to send."""
    limit = LargeBufferLimit(3, lambda: 0.0)
    busy, closing = fake_connections(3, is_idle=False), fake_connections(2, is_idle=False)
    for connection in busy:
        limit.add(connection, "a")
    for connection in closing:
        limit.add(connection, "b", is_closing=True)
    assert all(connection.is_evicted for connection in closing)
    assert not any(connection.is_evicted for connection in busy)


def test_each_new_large_buffer_costs_a_limited_search() -> None:
    """For one connection too many, a limited number of others is examined, except four times a second. The next search
    examines others, so an idle one is found in the end."""
    limit = LargeBufferLimit(3 * MAX_EXAMINED, lambda: 0.0)
    connections = fake_connections(3 * MAX_EXAMINED, is_idle=False)
    for connection in connections:
        limit.add(connection, None)
    limit.add(FakeConnection(is_idle=False), None)
    examined_at_first = sum(connection.examined for connection in connections)
    connections[-1].is_idle = True
    for number in range(1, 5):
        limit.add(FakeConnection(is_idle=False), None)
        assert sum(connection.examined for connection in connections) <= examined_at_first + number * MAX_EXAMINED
    assert connections[-1].is_evicted


async def receive(connection: RegistryProtocol, size_hint: int) -> None:
    """Lets the connection receive one request, with `size_hint` bytes in the buffers of its transport."""
    connection.get_buffer(size_hint)[: len(GET)] = GET
    connection.buffer_updated(len(GET))
    for _ in range(10):
        await asyncio.sleep(0)


async def test_large_reads_over_tls_are_counted() -> None:
    """A TLS connection counts as one with large buffers when it has received many bytes at once. If too many have, the
    one that is idle is closed. Connections that received little and plain ones stay open."""
    loop = asyncio.get_running_loop()
    worker = WorkerContext(app, loop, ServerLimits(large_tls_connections=1), UnsentBudget(0, 0.1, loop.time))
    transports: list[TlsTransport | RecordingTransport] = [TlsTransport(), RecordingTransport(), TlsTransport()]
    connections = [RegistryProtocol(worker) for _ in transports]
    for connection, transport in zip(connections, transports, strict=True):
        connection.connection_made(transport)
    await receive(connections[0], LARGE_READ_BYTES)
    await receive(connections[1], 10 * LARGE_READ_BYTES)
    assert worker.large_buffers.count == 0
    await receive(connections[0], LARGE_READ_BYTES + 1)
    await receive(connections[0], LARGE_READ_BYTES + 1)
    assert worker.large_buffers.count == 1
    await receive(connections[2], LARGE_READ_BYTES + 1)
    assert [transport.is_aborted for transport in transports if isinstance(transport, TlsTransport)] == [True, False]
    for connection in connections:
        connection.connection_lost(None)
    assert worker.large_buffers.count == 0


async def test_a_long_pause_over_tls_is_counted() -> None:
    """While the server reads nothing from a TLS connection, the client can fill the buffers unseen. So a connection
    counts as one with large buffers when two checks in a row find it in the same pause."""
    loop, may_answer = asyncio.get_running_loop(), asyncio.Event()

    async def waiting_app(scope: Any, receive: Any, send: Any) -> None:
        await may_answer.wait()
        await app(scope, receive, send)

    worker = WorkerContext(waiting_app, loop, ServerLimits(), UnsentBudget(0, 0.1, loop.time))
    connection = RegistryProtocol(worker)
    connection.connection_made(TlsTransport())
    await receive(connection, len(GET))
    await receive(connection, len(GET))  # a second request, which waits for the response to the first one
    connection.check_timeouts(loop.time())
    await asyncio.sleep(0)
    assert worker.large_buffers.count == 0
    connection.check_timeouts(loop.time())
    await asyncio.sleep(0)
    assert worker.large_buffers.count == 1
    may_answer.set()
    connection.connection_lost(None)


async def test_a_connection_that_is_being_closed_is_counted() -> None:
    """While a TLS connection is being closed, the transport discards what the client still sends, and its buffers can
    grow unseen. So a connection that a check finds in this state counts as one with large buffers."""
    loop = asyncio.get_running_loop()
    worker = WorkerContext(app, loop, ServerLimits(), UnsentBudget(0, 0.1, loop.time))
    connection, transport = RegistryProtocol(worker), TlsTransport()
    connection.connection_made(transport)
    await receive(connection, len(GET))
    for is_closing in (False, True):
        transport.is_being_closed = is_closing
        connection.check_timeouts(loop.time())
        await asyncio.sleep(0)
        assert worker.large_buffers.count == is_closing
    connection.connection_lost(None)


async def test_a_connection_with_a_response_in_flight_is_not_idle() -> None:
    """The end of a response can be in the TLS transport's second buffer while the transport says that its buffer is
    empty. So a connection is not idle, and cannot be evicted, until the client's kernel has all sent bytes."""
    loop = asyncio.get_running_loop()
    worker = WorkerContext(app, loop, ServerLimits(), UnsentBudget(0, 0.1, loop.time))
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as peer:
        sock, _ = listener.accept()
        with sock:
            connection = RegistryProtocol(worker)
            connection.connection_made(TlsTransport(sock))
            sock.setblocking(False)
            await receive(connection, len(GET))
            with suppress(BlockingIOError):
                while True:
                    sock.send(bytes(65536))
            connection.check_timeouts(loop.time())
            assert connection.eviction_candidate(loop.time()) is None
            peer.setblocking(False)

            def is_idle() -> bool:
                with suppress(BlockingIOError):
                    peer.recv(1 << 20)
                candidate = connection.eviction_candidate(loop.time())
                return candidate is not None and candidate.kind == "idle"

            await wait_until(is_idle)
            connection.connection_lost(None)


async def test_a_stop_does_not_cut_a_response_in_flight() -> None:
    """A worker that stops does not wait for the client's close_notify, but it waits until the client's kernel has all
    bytes of the last response, also those in the second buffer of the TLS transport."""
    loop = asyncio.get_running_loop()
    worker = WorkerContext(app, loop, ServerLimits(), UnsentBudget(0, 0.1, loop.time))
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as peer:
        sock, _ = listener.accept()
        with sock:
            connection, transport = RegistryProtocol(worker), TlsTransport(sock)
            connection.connection_made(transport)
            sock.setblocking(False)
            with suppress(BlockingIOError):
                while True:
                    sock.send(bytes(65536))
            transport.is_being_closed = True
            connection.shutdown()
            assert not transport.is_aborted
            peer.setblocking(False)

            def is_aborted() -> bool:
                with suppress(BlockingIOError):
                    peer.recv(1 << 20)
                connection.shutdown()
                return transport.is_aborted

            await wait_until(is_aborted)
            connection.connection_lost(None)


async def test_large_responses_leave_small_buffers() -> None:
    """A large response is written over TLS in parts of up to 64 KiB, each in an iteration of the event loop of its own.
    The transport encrypts each write as a whole into a buffer that does not shrink."""
    loop, body = asyncio.get_running_loop(), b"x" * 300_000

    async def large_app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})

    written_sizes: list[int] = []

    class SizesTransport(TlsTransport):
        def write(self, data: bytes | bytearray | memoryview) -> None:
            super().write(bytes(data))
            if len(data) > 1000:
                written_sizes.append(len(data))

    worker = WorkerContext(large_app, loop, ServerLimits(), UnsentBudget(1 << 20, 0.1, loop.time))
    connection, transport = RegistryProtocol(worker), SizesTransport()
    connection.connection_made(transport)
    await receive(connection, len(GET))
    await wait_until(lambda: transport.written.endswith(body))
    assert len(written_sizes) == 5
    assert max(written_sizes) < 66 * 1024
    connection.connection_lost(None)
