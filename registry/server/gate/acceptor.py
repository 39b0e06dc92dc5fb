"""Accepts connections from the listening socket that all workers share.

Connections wait in the kernel until a worker accepts them. Every worker has the listening socket open, so waiting
connections are not lost if a worker dies.

Each iteration of a worker's event loop accepts at most one connection. This spreads connections over the workers: a
busy worker has longer iterations, and accepts fewer connections. (The servers of asyncio and libuv accept all waiting
connections at once, so one worker could get all of them.)

Each iteration starts at most one TLS handshake. The start of a handshake blocks the event loop for one or two
milliseconds."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable
from functools import partial
from http import HTTPStatus

from registry.client_addresses import network_of, plain_address
from registry.server.gate.certificates import Certificates
from registry.server.gate.connection_limit import ConnectionLimit, EvictionCandidate
from registry.server.gate.listener import ListenerOptions
from registry.server.gate.per_address_limit import AdmittedConnection, TooManyConnections
from registry.server.http1.error_responses import RefusedRequest, error_response
from registry.server.server_limits import ServerLimits
from registry.server.server_log import log

OnLost = Callable[[], None]
"""Called when a connection is lost. It may be called twice for one connection."""
OnRefused = Callable[[tuple[str, int], bytes, int, str], None]
"""Called in two cases:

- A client has sent plain HTTP to a TLS port.
- A connection was closed because the client's address has too many connections. To keep the log small, not every such
  connection leads to a call.

The arguments are the client's address and port, the bytes that the client has sent, the status of the response (0: no
response), and the reason in one line."""
ProtocolFactory = Callable[[OnLost | None], asyncio.BaseProtocol]
"""Creates the protocol object of a new connection. The argument is the function that the protocol object calls when the
connection is lost, or None."""

_ERROR_PAUSE_SECONDS = 0.5
"""How long the worker accepts no connections after an error other than `_CONNECTION_ERRORS`."""
_EXHAUSTED_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
"""Errors which mean that no file descriptors or no memory are left."""
_EXHAUSTED_EVICTIONS = 16
"""Largest number of connections that the worker closes after one of `_EXHAUSTED_ERRORS`. It closes only silent
connections: those without a request, and those whose request makes no progress."""
_LOG_INTERVAL_SECONDS = 60.0
"""Shortest time between two log lines about errors."""
_CONNECTION_ERRORS = (
    *(errno.EAGAIN, errno.EINTR, errno.ECONNABORTED, errno.EPERM, errno.EPROTO, errno.ENOPROTOOPT, errno.EOPNOTSUPP),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ETIMEDOUT),
)
"""Errors that concern only one connection (accept(2), "Error handling"). EAGAIN means that another worker has accepted
the connection."""
_TLS_SHUTDOWN_SECONDS = 600.0
"""The event loop's timeout for closing a TLS connection. The timeouts in `registry.server.connection.timeouts` are
shorter, and take effect before it."""
_TLS_FIRST_BYTE = b"\x16"
"""First byte of a TLS handshake record (RFC 8446, 5.1)."""
_TLS_EXPECTED = "this port speaks TLS: use https://"
_TOO_MANY_CONNECTIONS = "the client's address has too many connections"


class PendingConnection:
    """An accepted connection that has no protocol object yet, usually because its TLS handshake is in progress."""

    def __init__(self, network: str | None, accepted_at: float, *, is_tls: bool) -> None:
        """`network`: the client's IPv4 address, or the /64 network of its IPv6 address; None if the client is a trusted
        proxy. `accepted_at`: when the connection was accepted, in seconds of the event loop's clock."""
        self._candidate = EvictionCandidate("new", accepted_at, network) if is_tls else None
        self.task: asyncio.Task[None] | None = None
        """The task that sets up the connection. The acceptor assigns it right after creating this object."""

    def eviction_candidate(self, now: float) -> EvictionCandidate | None:
        """Returns the description of this connection if the worker may *evict* it, which means to close it to make room
        for another connection. The interface `EvictableConnection` requires the argument `now`, which this class does
        not need. Returns None if the worker must not evict the connection:

        - The connection is being closed already.
        - The connection does not use TLS. If `evict` cancelled `task` while uvloop creates the protocol object, uvloop
          would close the transport without calling `connection_lost`.
        """
        return None if self.task is None or self.task.cancelling() else self._candidate

    def evict(self) -> None:
        """Cancels `task`, which then closes the connection."""
        if self.task is not None:
            self.task.cancel()


class Acceptor:
    """Accepts connections on one listening socket, from its creation until `close`."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        make_protocol: ProtocolFactory,
        listener_options: ListenerOptions,
        limits: ServerLimits,
        connection_limit: ConnectionLimit,
        pending: set[PendingConnection],
        on_refused: OnRefused = lambda *_: None,
    ) -> None:
        """`sock` must be listening; the method `close` closes it. `pending` is the set of all connections of the worker
        that have no protocol object yet. The acceptor updates `pending`, and `connection_limit` counts its members."""
        self._loop = loop
        self._sock = sock
        self._make_protocol = make_protocol
        self._listener_options = listener_options
        self._limits = limits
        self._connection_limit = connection_limit
        self._pending = pending
        self._on_refused = on_refused
        self._handshake_start_lock = asyncio.Lock()
        self._logged_at = -_LOG_INTERVAL_SECONDS
        self._resume_timer: asyncio.TimerHandle | None = None
        self._resume()

    def close(self) -> None:
        """Stops accepting connections, and closes this process's copy of the listening socket. Connections that are
        being set up continue. May be called repeatedly."""
        if self._resume_timer is not None:
            self._resume_timer.cancel()
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock)
            self._sock.close()

    def _resume(self) -> None:
        self._resume_timer = None
        self._loop.add_reader(self._sock, self._accept)

    def _pause(self, seconds: float) -> None:
        self._loop.remove_reader(self._sock)
        self._resume_timer = self._loop.call_later(seconds, self._resume)

    def _accept(self) -> None:
        """Accepts one connection and starts a task that sets it up."""
        if delay := self._connection_limit.make_room_for_connection():
            self._pause(delay)
            return
        try:
            sock, peer = self._sock.accept()
        except OSError as error:
            self._on_error(error)
            return
        options = self._listener_options
        is_trusted_proxy = options.proxies is not None and options.proxies.trusts(peer[0])
        try:
            limit = None if is_trusted_proxy else options.per_address_limit
            admission = None if limit is None else limit.admit(peer[0])
        except TooManyConnections as refusal:
            sock.close()
            if refusal.is_logged:
                self._on_refused((plain_address(peer[0]), peer[1]), b"", 0, _TOO_MANY_CONNECTIONS)
            return
        sock.setblocking(False)
        connection = PendingConnection(
            None if is_trusted_proxy else network_of(plain_address(peer[0])),
            self._loop.time(),
            is_tls=options.certificates is not None,
        )
        connection.task = self._loop.create_task(self._set_up(sock, admission))
        self._pending.add(connection)
        connection.task.add_done_callback(partial(self._on_set_up_done, connection, sock, admission))

    def _on_set_up_done(
        self,
        connection: PendingConnection,
        sock: socket.socket,
        admission: AdmittedConnection | None,
        task: asyncio.Task[None],
    ) -> None:
        """Removes the connection from the pending ones. If `task` was cancelled, also closes the socket and releases
        `admission`. `_set_up` cannot do this, because a task that is cancelled before its first step runs no code."""
        self._pending.discard(connection)
        if task.cancelled():
            sock.close()
            if admission is not None:
                admission.release()

    def _on_error(self, error: OSError) -> None:
        """Handles an error of accept(2). Ignores an error that concerns only one connection. After any other error,
        accepts no connections for a while. After one of `_EXHAUSTED_ERRORS`, also closes silent connections."""
        if error.errno in _CONNECTION_ERRORS:
            return
        if error.errno in _EXHAUSTED_ERRORS:
            self._connection_limit.evict_connections(_EXHAUSTED_EVICTIONS)
        now = self._loop.time()
        if now - self._logged_at >= _LOG_INTERVAL_SECONDS:
            self._logged_at = now
            log.error(
                "cannot accept connections: %s; retrying every %g s", error.strerror or error, _ERROR_PAUSE_SECONDS
            )
        self._pause(_ERROR_PAUSE_SECONDS)

    async def _set_up(self, sock: socket.socket, admission: AdmittedConnection | None) -> None:
        """Creates the protocol object of an accepted connection. On a TLS port, first performs the handshake. After an
        error, closes the socket and releases `admission`. After a cancellation, `_on_set_up_done` does both.
        `admission`: counts the connection against the limit of the client's address; None if that limit does not
        apply."""
        on_lost = None if admission is None else admission.release
        try:
            if self._listener_options.certificates is None:
                await self._loop.connect_accepted_socket(lambda: self._make_protocol(on_lost), sock)
            else:
                await self._set_up_tls(sock, on_lost, self._listener_options.certificates)
        except OSError as error:
            log.debug("closed an accepted connection before its first request: %s", error)
            sock.close()
            if on_lost is not None:
                on_lost()
        except Exception:
            sock.close()
            if on_lost is not None:
                on_lost()
            raise

    async def _set_up_tls(self, sock: socket.socket, on_lost: OnLost | None, certificates: Certificates) -> None:
        """Performs the TLS handshake and creates the protocol object. Raises OSError if the handshake fails or times
        out, or if the client does not speak TLS."""
        timeout_seconds = self._limits.handshake_seconds
        async with asyncio.timeout(timeout_seconds):
            first_byte = await self._wait_for_first_byte(sock)
        if first_byte != _TLS_FIRST_BYTE:
            self._answer_plain_http(sock, first_byte)
            raise ConnectionAbortedError("the client did not start a TLS handshake")
        # A task holds the lock until the event loop's next iteration. It then releases the lock and starts its
        # handshake. The next task takes the lock in this iteration at the earliest, so it starts its handshake in a
        # later iteration.
        async with self._handshake_start_lock:
            await asyncio.sleep(0)
        transport, _ = await self._loop.connect_accepted_socket(
            lambda: self._make_protocol(on_lost),
            sock,
            ssl=certificates.context,
            ssl_handshake_timeout=timeout_seconds,
            ssl_shutdown_timeout=_TLS_SHUTDOWN_SECONDS,
        )
        if transport.is_closing() and on_lost is not None:
            # The client disconnected during the handshake. asyncio may then not call `connection_lost`, which calls
            # `on_lost`. A second call of `on_lost` does no harm.
            on_lost()

    async def _wait_for_first_byte(self, sock: socket.socket) -> bytes:
        """Waits for the client's first byte and returns it, but leaves it in the socket's buffer. Returns b"" if the
        client closes the connection before it sends a byte."""
        while True:
            try:
                return sock.recv(1, socket.MSG_PEEK)
            except (BlockingIOError, InterruptedError):
                readable = self._loop.create_future()
                self._loop.add_reader(sock, _set_result, readable)
                try:
                    await readable
                finally:
                    self._loop.remove_reader(sock)

    def _answer_plain_http(self, sock: socket.socket, first_byte: bytes) -> None:
        """Sends an error response if the first byte is a letter, as in every HTTP request. Raises OSError if the
        connection fails."""
        if first_byte.isalpha():
            peer = sock.getpeername()
            # Reads the request: if unread data were left when the socket is closed, the kernel would reset the
            # connection, and the client could lose the response.
            received = sock.recv(64 * 1024)
            sock.send(error_response(RefusedRequest(HTTPStatus.BAD_REQUEST, _TLS_EXPECTED), []))
            self._on_refused((plain_address(peer[0]), peer[1]), received, HTTPStatus.BAD_REQUEST, _TLS_EXPECTED)
            sock.shutdown(socket.SHUT_WR)


def _set_result(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
