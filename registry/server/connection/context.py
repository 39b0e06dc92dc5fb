"""The objects that all parts of one connection share (`ConnectionContext`), and the objects that all connections of a
worker process share (`WorkerContext`)."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from registry.asgi import AsgiApp
from registry.client_addresses import plain_address
from registry.memory_budget import MemoryBudget
from registry.server.connection.flow_control import FlowControl
from registry.server.connection.head_cache import HeadCache
from registry.server.connection.receive_buffers import HEAD_BUFFER_BYTES, IncomingBodies
from registry.server.connection.request_reports import RequestReports
from registry.server.connection.unsent_budget import UnsentBudget, UnsentShare, new_piece_memory
from registry.server.gate.connection_limit import ConnectionLimit, EvictableConnection
from registry.server.gate.tls_memory import LargeBufferLimit
from registry.server.gate.trusted_proxies import TrustedProxies
from registry.server.http1.response_head import Headers
from registry.server.server_limits import ServerLimits


class OpenConnection(EvictableConnection, Protocol):
    """The methods of a connection that its worker calls."""

    def check_timeouts(self, now: float) -> None:
        """If a timeout has passed, closes the connection or refuses its request. `now` is in seconds of the event
        loop's clock."""
        ...

    def shutdown(self) -> None:
        """Closes the connection after the responses to the requests received so far. May be called repeatedly."""
        ...

    def retire(self) -> None:
        """Makes the connection close after a response with the header `Connection: close`. This is the first response
        that meets both conditions:

        - The response has not started yet.
        - No later request has arrived on the connection. (A client can send several requests before it has the first
          response.)

        An idle connection stays open until its next response. May be called repeatedly."""
        ...

    def abort(self) -> None:
        """Closes the connection immediately, even in the middle of a response."""
        ...


@dataclass(slots=True)
class WorkerState:
    """The connections and requests of one worker process. The attributes have the same names as those of Uvicorn's
    `ServerState`, which can be used instead of this class."""

    connections: set[OpenConnection] = field(default_factory=set)
    """The open connections. Each connection adds and removes itself."""
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    """The tasks of the requests in progress."""
    default_headers: Headers = field(default_factory=list)
    """The first headers of every response. The only one is the Date header, which the worker updates."""
    total_requests: int = 0
    """Number of completed requests."""


class Retirement:
    """Tells whether the worker *retires*. A worker retires when another process has taken its place, and then closes
    each connection after one more response."""

    __slots__ = ("_event", "has_begun")

    def __init__(self) -> None:
        self.has_begun = False
        self._event = asyncio.Event()

    def begin(self) -> None:
        self.has_begun = True
        self._event.set()

    async def wait(self) -> None:
        """Waits until the retirement has begun."""
        await self._event.wait()


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """The objects that all connections of one worker process share."""

    app: AsgiApp
    loop: asyncio.AbstractEventLoop
    limits: ServerLimits
    unsent_budget: UnsentBudget
    """The memory budget for large responses that clients have not received yet."""
    state: WorkerState = field(default_factory=WorkerState)
    lifespan_state: dict[str, Any] = field(default_factory=dict)
    """The values that the application stored when it started (ASGI: lifespan state). Each request gets a copy."""
    proxies: TrustedProxies | None = None
    """None: no reverse proxy is trusted."""
    connection_limit: ConnectionLimit | None = None
    """None: the number of connections is not limited."""
    retirement: Retirement = field(default_factory=Retirement)
    incoming_bodies: IncomingBodies = field(default_factory=IncomingBodies)
    """Counts the request bodies that are being received."""
    large_buffers: LargeBufferLimit = field(init=False)
    """Counts the TLS connections that may have large buffers. Closes one of them when there are too many."""
    piece_memory: MemoryBudget = field(default_factory=new_piece_memory)
    """The memory budget for files that are sent over TLS. A file is read into memory in small pieces."""
    reports: RequestReports = field(init=False)
    """Reports the end of each request to the application."""
    head_cache: HeadCache = field(default_factory=HeadCache)
    """Maps the bytes of a request's head to the parsed head."""
    head_buffer: memoryview = field(default_factory=lambda: memoryview(bytearray(HEAD_BUFFER_BYTES)))
    """The memory that receives the heads of requests. All connections can share this memory, because the bytes of each
    read are copied before the next read."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "reports", RequestReports(self.app))
        large_buffers = LargeBufferLimit(self.limits.large_tls_connections, self.loop.time)
        object.__setattr__(self, "large_buffers", large_buffers)


@dataclass(frozen=True, slots=True)
class ConnectionContext:
    """What the objects of one connection share."""

    worker: WorkerContext
    transport: asyncio.Transport
    flow: FlowControl
    unsent: UnsentShare
    """The connection's part of the worker's `unsent_budget`."""
    is_tls: bool
    sendfile_socket: socket.socket | None
    """The socket for sendfile(2). None if the connection uses TLS or the system is not Linux."""
    server: tuple[str, int] | None
    """Address and port of this end. None: unknown."""
    client: tuple[str, int] | None
    """Address and port of the peer. None: unknown. An IPv4 address has the form 192.0.2.1, even on an IPv6 socket."""
    proxies: TrustedProxies | None
    """The worker's `proxies`, if the peer counts as a trusted proxy: the peer is one of `proxies`, or the peer's
    address is unknown. None if the peer does not count as one. The X-Forwarded headers of requests are then ignored."""

    @property
    def address_for_limits(self) -> str | None:
        """The IP address by which limits per client count this connection. None if the address is unknown, or if the
        peer is a trusted proxy, because a proxy serves many clients."""
        return None if self.proxies is not None or self.client is None else self.client[0]

    @property
    def can_send_files(self) -> bool:
        """Whether the application can pass a file to the server instead of the file's bytes."""
        return sys.platform == "linux" and (self.is_tls or self.sendfile_socket is not None)

    @classmethod
    def for_transport(
        cls, worker: WorkerContext, transport: asyncio.Transport, connection: EvictableConnection
    ) -> Self:
        """Returns the context of the new connection `connection`. When the unsent budget is used up, the budget may
        evict connections whose clients receive nothing. `connection` can be one of them."""
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
            flow=FlowControl(transport, is_tls=is_tls),
            unsent=UnsentShare(worker.unsent_budget, connection, transport, is_tls=is_tls),
            is_tls=is_tls,
            sendfile_socket=None if is_tls or sys.platform != "linux" else sock,
            server=None if sock is None else _address(sock.getsockname),
            client=client,
            proxies=proxies,
        )


def _address(get_name: Callable[[], Any]) -> tuple[str, int] | None:
    """Returns address and port of one end of a TCP connection. Returns None if the connection is closed or does not use
    TCP."""
    try:
        name = get_name()
    except (OSError, ValueError):  # uvloop raises ValueError
        return None
    return (str(name[0]), int(name[1])) if isinstance(name, tuple) else None
