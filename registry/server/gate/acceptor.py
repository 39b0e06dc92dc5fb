"""Taking connections from the one listening socket that all workers share.

One connection per turn of the loop: asyncio and libuv take all that wait, so the first worker to wake would get a whole
burst, and a client's sixteen connections would be served by one core. A worker that is busy comes back later and so
takes fewer. The socket stays with every worker, so nothing that waits in it is lost when one of them dies.

Handshakes begin one a turn as well: the first step of each takes a millisecond or two, and those of hundreds of clients
that come at once would hold the loop for that much longer.
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

# How long to take no connections when the system has no descriptors or memory left for them.
_PAUSE_SECONDS = 0.5
_SHED_COUNT = 16
"""Silent connections that are closed then."""
_QUIET_SECONDS = 60.0
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_TRANSIENT = (
    *(errno.EAGAIN, errno.EINTR, errno.ECONNABORTED, errno.EPERM, errno.EPROTO, errno.ENOPROTOOPT, errno.EOPNOTSUPP),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ETIMEDOUT),
)
"""Another worker was quicker, the client left, or its network failed: see accept(2), "Error handling"."""
# Ending a TLS connection takes as long as the client takes what was written; `registry.server.connection.timeouts`
# bounds that.
_SHUTDOWN_SECONDS = 600.0
_TLS_FIRST_BYTE = b"\x16"  # a TLS record's first byte (RFC 8446, 5.1)
_TLS_EXPECTED = "this port speaks TLS: use https://"


class Handshake:
    """A connection that was accepted and has no protocol yet. `address`: None where it is a trusted proxy's."""

    def __init__(self, address: str | None, since: float) -> None:
        self._silence = EvictionCandidate("new", since, address)
        self.task: asyncio.Task[None] | None = None

    def eviction_candidate(self, now: float) -> EvictionCandidate | None:
        return None if self.task is None or self.task.cancelling() else self._silence

    def drop(self) -> None:
        if self.task is not None:
            self.task.cancel()


class Acceptor:
    """Accepts on one socket until `close`."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        connection: ProtocolFactory,
        door: ListenerOptions,
        limits: ServerLimits,
        connection_limit: ConnectionLimit,
        handshakes: set[Handshake],
    ) -> None:
        """`connection` is given what to call once when it is lost; None: nothing. `handshakes` is where
        `connection_limit` finds them."""
        self._loop = loop
        self._sock = sock
        self._connection = connection
        self._listener_options = door
        self._limits = limits
        self._connection_limit = connection_limit
        self._handshakes = handshakes
        self._start = asyncio.Lock()  # of a handshake
        self._said = -_QUIET_SECONDS
        self._timer: asyncio.TimerHandle | None = None
        self._resume()

    def close(self) -> None:
        """Takes no more connections; closes this process's copy of the socket. Handshakes are given up: as on any other
        connection without a request, there is nothing to wait for."""
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
        if wait := self._connection_limit.wait():
            self._pause(wait)
            return
        try:
            sock, peer = self._sock.accept()
        except OSError as error:
            self._on_error(error)
            return
        trusted = self._listener_options.proxies is not None and self._listener_options.proxies.trusts(peer[0])
        try:
            seat = (
                None if self._listener_options.crowd is None or trusted else self._listener_options.crowd.enter(peer[0])
            )
        except TooManyConnections:
            sock.close()
            return
        sock.setblocking(False)
        handshake = Handshake(None if trusted else network_of(plain_address(peer[0])), self._loop.time())
        handshake.task = self._loop.create_task(self._greet(sock, seat))
        self._handshakes.add(handshake)
        handshake.task.add_done_callback(lambda _: self._handshakes.discard(handshake))

    def _on_error(self, error: OSError) -> None:
        if error.errno in _TRANSIENT:
            return
        if error.errno in _EXHAUSTED:
            self._connection_limit.shed(_SHED_COUNT)
        now = self._loop.time()
        if now - self._said >= _QUIET_SECONDS:
            self._said = now
            log.error("cannot take connections: %s; tries again each %g s", error.strerror or error, _PAUSE_SECONDS)
        self._pause(_PAUSE_SECONDS)

    async def _greet(self, sock: socket.socket, seat: CountedConnection | None) -> None:
        leave = None if seat is None else seat.leave
        try:
            if self._listener_options.certificates is None:
                await self._loop.connect_accepted_socket(lambda: self._connection(leave), sock)
            else:
                await self._set_up_tls(sock, leave, self._listener_options.certificates)
        except OSError as error:
            log.debug("no connection came about: %s", error)
            sock.close()  # gone before we could say anything
            if leave is not None:
                leave()
        except BaseException:  # a cancellation too must leave neither the socket open nor the seat taken
            sock.close()
            if leave is not None:
                leave()
            raise

    async def _set_up_tls(self, sock: socket.socket, leave: OnLost | None, certificates: Certificates) -> None:
        """Raises OSError: the handshake failed, took too long, or is none."""
        seconds = self._limits.handshake_seconds
        async with asyncio.timeout(seconds):
            first = await self._first_byte(sock)
        if first != _TLS_FIRST_BYTE:
            _answer_plain_http(sock, first)
            raise ConnectionAbortedError("it did not begin with a TLS handshake")
        async with self._start:
            await asyncio.sleep(0)
        transport, _ = await self._loop.connect_accepted_socket(
            lambda: self._connection(leave),
            sock,
            ssl=certificates.context,
            ssl_handshake_timeout=seconds,
            ssl_shutdown_timeout=_SHUTDOWN_SECONDS,
        )
        if transport.is_closing() and leave is not None:
            leave()  # the client went during the handshake: asyncio may not have told the connection that it began

    async def _first_byte(self, sock: socket.socket) -> bytes:
        """The client's first, left where it is; none if it sends nothing more."""
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
    """To who speaks HTTP here, without TLS. Raises OSError."""
    if first.isalpha():
        sock.recv(
            64 * 1024
        )  # what is left unread when a socket is closed resets the connection, and our answer with it
        sock.send(error_response(RefusedRequest(HTTPStatus.BAD_REQUEST, _TLS_EXPECTED), []))
        sock.shutdown(socket.SHUT_WR)
