"""Accepts connections from the listening socket that all workers share.

Accepts one connection per turn of the loop. asyncio and libuv accept all that wait, so the first worker to wake would
get a whole burst, and one core would serve all sixteen connections of a client. A busy worker comes back later and so
accepts fewer. Every worker holds the socket, so connections that wait in it survive the death of a worker.

TLS handshakes start one per turn as well: the first step of each takes a millisecond or two, and a burst of hundreds
would hold up the loop.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable
from http import HTTPStatus

from registry.client_addresses import network_of, plain_address
from registry.server.gate.certificates import Certificates
from registry.server.gate.connection_limit import ConnectionLimit, EvictionCandidate
from registry.server.gate.listener import ListenerOptions
from registry.server.gate.per_address_limit import CountedConnection, TooManyConnections
from registry.server.http1.error_responses import RefusedRequest, error_response
from registry.server.server_limits import ServerLimits
from registry.server.server_log import log

OnLost = Callable[[], None]
ProtocolFactory = Callable[[OnLost | None], asyncio.BaseProtocol]

_PAUSE_SECONDS = 0.5
"""How long to accept nothing when the system has no descriptors or memory left."""
_SHED_COUNT = 16
"""How many silent connections to close then."""
_QUIET_SECONDS = 60.0
"""The shortest time between two log lines about it."""
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_TRANSIENT = (
    *(errno.EAGAIN, errno.EINTR, errno.ECONNABORTED, errno.EPERM, errno.EPROTO, errno.ENOPROTOOPT, errno.EOPNOTSUPP),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ETIMEDOUT),
)
"""Errors of one connection: another worker was quicker, the client left, or its network failed. See accept(2), "Error
handling"."""
_SHUTDOWN_SECONDS = 600.0
"""For the event loop to end a TLS connection. `registry.server.connection.timeouts` sets the limit that matters."""
_TLS_FIRST_BYTE = b"\x16"
"""First byte of a TLS handshake record (RFC 8446, 5.1)."""
_TLS_EXPECTED = "this port speaks TLS: use https://"


class Handshake:
    """An accepted connection that has no protocol yet."""

    def __init__(self, address: str | None, since: float) -> None:
        """`address` is None for a trusted proxy; `since` is the event loop's time."""
        self._candidate = EvictionCandidate("new", since, address)
        self.task: asyncio.Task[None] | None = None

    def eviction_candidate(self, now: float) -> EvictionCandidate | None:
        """Returns this as a new connection; None if it ends already."""
        return None if self.task is None or self.task.cancelling() else self._candidate

    def drop(self) -> None:
        """Gives up the handshake and closes the connection."""
        if self.task is not None:
            self.task.cancel()


class Acceptor:
    """Accepts on one socket until `close`."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        connection: ProtocolFactory,
        listener_options: ListenerOptions,
        limits: ServerLimits,
        connection_limit: ConnectionLimit,
        handshakes: set[Handshake],
    ) -> None:
        """`connection` makes a protocol; its argument is what to call once when the connection is lost. `handshakes` is
        the set that `connection_limit` counts."""
        self._loop = loop
        self._sock = sock
        self._connection = connection
        self._listener_options = listener_options
        self._limits = limits
        self._connection_limit = connection_limit
        self._handshakes = handshakes
        self._handshake_start = asyncio.Lock()
        self._logged_at = -_QUIET_SECONDS
        self._timer: asyncio.TimerHandle | None = None
        self._resume()

    def close(self) -> None:
        """Accepts no more connections, closes this process's copy of the socket, and gives up handshakes in progress:
        no request is waiting on them."""
        if self._timer is not None:
            self._timer.cancel()
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock)
            self._sock.close()
        if self._listener_options.certificates is not None:
            for handshake in self._handshakes:
                handshake.drop()

    def _resume(self) -> None:
        self._timer = None
        self._loop.add_reader(self._sock, self._accept)

    def _pause(self, seconds: float) -> None:
        self._loop.remove_reader(self._sock)
        self._timer = self._loop.call_later(seconds, self._resume)

    def _accept(self) -> None:
        if delay := self._connection_limit.accept_delay():
            self._pause(delay)
            return
        try:
            sock, peer = self._sock.accept()
        except OSError as error:
            self._on_error(error)
            return
        options = self._listener_options
        trusted = options.proxies is not None and options.proxies.trusts(peer[0])
        try:
            limit = None if trusted else options.per_address_limit
            counted = None if limit is None else limit.admit(peer[0])
        except TooManyConnections:
            sock.close()
            return
        sock.setblocking(False)
        handshake = Handshake(None if trusted else network_of(plain_address(peer[0])), self._loop.time())
        handshake.task = self._loop.create_task(self._set_up(sock, counted))
        self._handshakes.add(handshake)
        handshake.task.add_done_callback(lambda _: self._handshakes.discard(handshake))

    def _on_error(self, error: OSError) -> None:
        if error.errno in _TRANSIENT:
            return
        if error.errno in _EXHAUSTED:
            self._connection_limit.shed(_SHED_COUNT)
        now = self._loop.time()
        if now - self._logged_at >= _QUIET_SECONDS:
            self._logged_at = now
            log.error("cannot take connections: %s; tries again each %g s", error.strerror or error, _PAUSE_SECONDS)
        self._pause(_PAUSE_SECONDS)

    async def _set_up(self, sock: socket.socket, counted: CountedConnection | None) -> None:
        on_lost = None if counted is None else counted.release
        try:
            if self._listener_options.certificates is None:
                await self._loop.connect_accepted_socket(lambda: self._connection(on_lost), sock)
            else:
                await self._set_up_tls(sock, on_lost, self._listener_options.certificates)
        except OSError as error:
            log.debug("no connection came about: %s", error)
            sock.close()
            if on_lost is not None:
                on_lost()
        except BaseException:  # a cancellation too must close the socket and give back its count
            sock.close()
            if on_lost is not None:
                on_lost()
            raise

    async def _set_up_tls(self, sock: socket.socket, on_lost: OnLost | None, certificates: Certificates) -> None:
        """Performs the TLS handshake. Raises OSError if it fails or times out, or the client does not speak TLS."""
        seconds = self._limits.handshake_seconds
        async with asyncio.timeout(seconds):
            first = await self._first_byte(sock)
        if first != _TLS_FIRST_BYTE:
            _answer_plain_http(sock, first)
            raise ConnectionAbortedError("it did not begin with a TLS handshake")
        async with self._handshake_start:
            await asyncio.sleep(0)
        transport, _ = await self._loop.connect_accepted_socket(
            lambda: self._connection(on_lost),
            sock,
            ssl=certificates.context,
            ssl_handshake_timeout=seconds,
            ssl_shutdown_timeout=_SHUTDOWN_SECONDS,
        )
        if transport.is_closing() and on_lost is not None:
            on_lost()  # the client left during the handshake: asyncio may never have called connection_made

    async def _first_byte(self, sock: socket.socket) -> bytes:
        """Returns the client's first byte without consuming it; empty if the client sends nothing."""
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


def _set_result(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _answer_plain_http(sock: socket.socket, first: bytes) -> None:
    """Answers a client that speaks HTTP without TLS with an error. Raises OSError."""
    if first.isalpha():
        sock.recv(64 * 1024)  # closing a socket with unread data resets the connection, and the response could be lost
        sock.send(error_response(RefusedRequest(HTTPStatus.BAD_REQUEST, _TLS_EXPECTED), []))
        sock.shutdown(socket.SHUT_WR)
