"""The acceptor of a worker: how it counts connections that are closed before they are set up, and which it evicts."""

from __future__ import annotations

import asyncio
import socket

import pytest
import uvloop

from registry.server.gate.acceptor import Acceptor, PendingConnection
from registry.server.gate.connection_limit import ConnectionLimit
from registry.server.gate.listener import ListenerOptions, bind
from registry.server.gate.per_address_limit import PerAddressLimit
from registry.server.server_limits import ServerLimits


class NewConnections(set[PendingConnection]):
    """The worker's set of connections that have no protocol object yet. This fake evicts each connection as soon as it
    is added, before the task that sets the connection up has run."""

    def add(self, connection: PendingConnection) -> None:
        super().add(connection)
        connection.evict()


async def test_an_evicted_connection_is_no_longer_counted() -> None:
    """A connection that is evicted (closed in favour of other connections) before it is set up no longer counts for the
    limit of its client's address."""
    loop = asyncio.get_running_loop()
    pending = NewConnections()
    per_address = PerAddressLimit(1, workers=1)
    per_address.set_own_column(per_address.claim_column())
    listening = bind("127.0.0.1:0")
    acceptor = Acceptor(
        loop,
        listening,
        lambda _: pytest.fail("the connection was set up"),
        ListenerOptions(per_address_limit=per_address),
        ServerLimits(),
        ConnectionLimit(set(), pending, set(), loop.time, max_open_files=400),
        pending,
    )
    try:
        for _ in range(3):  # if an evicted connection still counted, the limit would refuse the next one
            with socket.create_connection(listening.getsockname()) as client:
                client.setblocking(False)
                async with asyncio.timeout(5):
                    assert await loop.sock_recv(client, 1) == b""
            assert not pending
            per_address.admit("127.0.0.1").release()
    finally:
        acceptor.close()


class OpenConnection(asyncio.Protocol):
    """A connection that has a protocol object. As soon as it has one, the worker evicts up to ten connections, as it
    does when a request starts and descriptors are short."""

    def __init__(self, limit: ConnectionLimit) -> None:
        self._limit = limit
        self.is_made = asyncio.Event()
        self.is_lost = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._limit.evict_connections(10)
        self.is_made.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost.set()


def test_an_open_connection_is_not_evicted_as_a_new_one() -> None:
    """A connection without TLS that has just got its protocol object is not evicted as a connection without one: uvloop
    would close it without calling `connection_lost`, and the worker would count it for ever."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_evict_while_a_connection_is_made())


async def _evict_while_a_connection_is_made() -> None:
    loop = asyncio.get_running_loop()
    pending: set[PendingConnection] = set()
    limit = ConnectionLimit(set(), pending, set(), loop.time, max_open_files=400)
    opened = OpenConnection(limit)
    listening = bind("127.0.0.1:0")
    acceptor = Acceptor(loop, listening, lambda _: opened, ListenerOptions(), ServerLimits(), limit, pending)
    try:
        async with asyncio.timeout(5):
            with socket.create_connection(listening.getsockname()):
                await opened.is_made.wait()
            await opened.is_lost.wait()
    finally:
        acceptor.close()
