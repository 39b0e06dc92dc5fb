"""What the parts of a connection share: the objects of its worker, its transport, and what is known of that."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from registry.asgi import AsgiApp
from registry.client_addresses import plain_address
from registry.server.connection.flow_control import FlowControl
from registry.server.connection.receive_buffers import HEAD_BUFFER_BYTES, IncomingBodies
from registry.server.connection.unsent_budget import UnsentBudget, UnsentShare
from registry.server.gate.connection_limit import ConnectionLimit, EvictableConnection
from registry.server.gate.trusted_proxies import TrustedProxies
from registry.server.http1.response_head import Headers
from registry.server.server_limits import ServerLimits


class OpenConnection(EvictableConnection, Protocol):
    """A connection as its worker sees it."""

    def check(self, now: float) -> None:
        """Ends the connection if it has waited too long for one thing. To be called once a second."""
        ...

    def shutdown(self) -> None:
        """Ends the connection after the requests received so far. May be called repeatedly."""
        ...

    def abort(self) -> None:
        """Closes the connection at once."""
        ...


@dataclass(slots=True)
class WorkerState:
    """The connections and requests of one worker. `uvicorn.Server` keeps an object with the same attributes."""

    connections: set[OpenConnection] = field(default_factory=set)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    """Requests in progress."""
    default_headers: Headers = field(default_factory=list)
    """Headers that every response starts with: the date."""
    total_requests: int = 0
    """Completed requests."""


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """What all connections of one worker share."""

    app: AsgiApp
    loop: asyncio.AbstractEventLoop
    limits: ServerLimits
    unsent_budget: UnsentBudget
    state: WorkerState = field(default_factory=WorkerState)
    lifespan_state: dict[str, Any] = field(default_factory=dict)
    """What the application left in its lifespan's scope; each request gets a copy."""
    proxies: TrustedProxies | None = None
    connection_limit: ConnectionLimit | None = None
    incoming_bodies: IncomingBodies = field(default_factory=IncomingBodies)
    head_buffer: memoryview = field(default_factory=lambda: memoryview(bytearray(HEAD_BUFFER_BYTES)))
    """Where the heads of requests are received."""


@dataclass(frozen=True, slots=True)
class ConnectionContext:
    """What the parts of one connection share."""

    worker: WorkerContext
    transport: asyncio.Transport
    flow: FlowControl
    unsent: UnsentShare
    is_tls: bool
    sendfile_socket: socket.socket | None
    """The socket that files can be sent to; None: they go through the transport."""
    server: tuple[str, int] | None
    client: tuple[str, int] | None
    """The peer. An IPv4 client's address is written as such, whatever the listening socket is."""
    proxies: TrustedProxies | None
    """The trusted proxies, if the peer is one of them."""

    @classmethod
    def of(cls, worker: WorkerContext, transport: asyncio.Transport, connection: EvictableConnection) -> Self:
        """Makes it for a connection that was just made."""
        is_tls = transport.get_extra_info("sslcontext") is not None
        sock: socket.socket | None = transport.get_extra_info("socket")
        client = None if sock is None else _address(sock.getpeername)
        proxies = worker.proxies
        if client is not None:
            if proxies is not None and not proxies.trusts(client[0]):
                proxies = None
            client = (plain_address(client[0]), client[1])
        return cls(
            worker,
            transport,
            FlowControl(transport),
            UnsentShare(worker.unsent_budget, connection, transport, is_tls=is_tls),
            is_tls,
            None if is_tls or sys.platform != "linux" else sock,
            None if sock is None else _address(sock.getsockname),
            client,
            proxies,
        )


def _address(name: Callable[[], Any]) -> tuple[str, int] | None:
    """Returns host and port of one end of a TCP connection; None if it is gone already, or not TCP."""
    try:
        found = name()
    except OSError:
        return None
    return (str(found[0]), int(found[1])) if isinstance(found, tuple) else None
