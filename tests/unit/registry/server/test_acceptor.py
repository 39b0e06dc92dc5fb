"""The acceptor of a worker: how it counts connections that are closed before they are set up."""

from __future__ import annotations

import asyncio
import socket

import pytest

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
    per_address.use_column(per_address.claim_column())
    listening = bind("127.0.0.1:0")
    acceptor = Acceptor(
        loop,
        listening,
        lambda _: pytest.fail("the connection was set up"),
        ListenerOptions(per_address_limit=per_address),
        ServerLimits(),
        ConnectionLimit(set(), pending, set(), loop.time, limit=400),
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
