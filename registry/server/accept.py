"""Taking connections from the one listening socket that all workers share.

One connection per turn of the loop: asyncio and libuv take all that wait, so the first worker to wake would get a whole
burst, and a client's sixteen connections would be served by one core. A worker that is busy comes back later and so
takes fewer. The socket stays with every worker, so nothing that waits in it is lost when one of them dies.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from http import HTTPStatus

from registry.server.certificates import Certificates
from registry.server.crowd import Crowded, Seat
from registry.server.door import Door
from registry.server.limits import ServerLimits
from registry.server.logs import log
from registry.server.refusal import Refused, error_response

Leave = Callable[[], None]
MakeConnection = Callable[[Leave | None], asyncio.BaseProtocol]

# How long to take no connections when the system has no descriptors or memory left for them.
_PAUSE_SECONDS = 0.5
# Ending a TLS connection takes as long as the client takes what was written; `registry.server.patience` bounds that.
_SHUTDOWN_SECONDS = 600.0
_HANDSHAKE = b"\x16"  # a TLS record's first byte (RFC 8446, 5.1)
_PLAIN = "this port speaks TLS: use https://"


class Acceptor:
    """Accepts on one socket until `close`."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        connection: MakeConnection,
        door: Door,
        limits: ServerLimits,
    ) -> None:
        """`connection` is given what to call once when it is lost; None: nothing."""
        self._loop = loop
        self._sock = sock
        self._connection = connection
        self._door = door
        self._limits = limits
        self._greetings: set[asyncio.Task[None]] = set()
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
        if self._door.certificates is not None:
            for greeting in self._greetings:
                greeting.cancel()

    def _resume(self) -> None:
        self._timer = None
        self._loop.add_reader(self._sock, self._accept)

    def _accept(self) -> None:
        try:
            sock, peer = self._sock.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return  # another worker was quicker, or the client left
        except OSError as error:
            log.error("cannot take connections for %g s: %s", _PAUSE_SECONDS, error)
            self._loop.remove_reader(self._sock)
            self._timer = self._loop.call_later(_PAUSE_SECONDS, self._resume)
            return
        try:
            seat = None if self._door.crowd is None else self._seat(peer[0])
        except Crowded:
            sock.close()
            return
        sock.setblocking(False)
        task = self._loop.create_task(self._greet(sock, seat))
        self._greetings.add(task)
        task.add_done_callback(self._greetings.discard)

    def _seat(self, address: str) -> Seat | None:
        """Raises Crowded. A proxy of ours has all its clients' connections."""
        assert self._door.crowd is not None
        if self._door.proxies is not None and self._door.proxies.trusts(address):
            return None
        return self._door.crowd.enter(address)

    async def _greet(self, sock: socket.socket, seat: Seat | None) -> None:
        leave = None if seat is None else seat.leave
        try:
            if self._door.certificates is None:
                await self._loop.connect_accepted_socket(lambda: self._connection(leave), sock)
            else:
                await self._greet_secretly(sock, leave, self._door.certificates)
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

    async def _greet_secretly(self, sock: socket.socket, leave: Leave | None, certificates: Certificates) -> None:
        """Raises OSError: the handshake failed, took too long, or is none."""
        seconds = self._limits.handshake_seconds
        async with asyncio.timeout(seconds):
            first = await self._first_byte(sock)
        if first != _HANDSHAKE:
            _say_what_is_spoken(sock, first)
            raise ConnectionAbortedError("it did not begin with a TLS handshake")
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
                self._loop.add_reader(sock, _set, readable)
                try:
                    await readable
                finally:
                    self._loop.remove_reader(sock)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _say_what_is_spoken(sock: socket.socket, first: bytes) -> None:
    """To who speaks HTTP here, without TLS. Raises OSError."""
    if first.isalpha():
        sock.recv(
            64 * 1024
        )  # what is left unread when a socket is closed resets the connection, and our answer with it
        sock.send(error_response(Refused(HTTPStatus.BAD_REQUEST, _PLAIN), []))
        sock.shutdown(socket.SHUT_WR)
