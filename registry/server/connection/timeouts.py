"""How long a connection may wait for one thing.

Nothing on the way of a byte sets a timer: once a second each connection is asked what it waits for, and what it waits
for includes how far it has come, so that any progress starts the time anew. Headers are the exception: there it is the
whole that counts, or a byte a minute would do.
"""

from __future__ import annotations

import asyncio
import fcntl
import socket
import struct
import sys
import termios
from collections.abc import Collection
from http import HTTPStatus
from typing import TYPE_CHECKING, Literal

from registry.client_addresses import network_of
from registry.server.gate.connection_limit import STALLED_SECONDS, EvictionCandidate, EvictionKind
from registry.server.http1.error_responses import RefusedRequest

if TYPE_CHECKING:
    from registry.server.connection.protocol import RegistryProtocol

_ACKED = struct.Struct("@120xQ")  # tcpi_bytes_acked in struct tcp_info
_COUNT = struct.Struct("@i")
WaitReason = Literal["send", "linger", "body", "half", "work", "drain", "head", "fresh", "idle"]


class ConnectionTimeouts:
    """One connection's: what it was waiting for when last asked, and since when."""

    def __init__(self, now: float) -> None:
        """Of a connection that has just been made."""
        self._opened = now
        self._waits: tuple[WaitReason, int, int] = ("fresh", 0, 0)
        self._since = now

    def check(self, connection: RegistryProtocol, now: float) -> None:
        """Ends the connection in the way fit for what it waits for, once that has taken too long."""
        waits, seconds = waiting_for(connection)
        if waits != self._waits:
            self._waits = waits
            self._since = now
        elif now - self._since >= seconds:
            end_after_timeout(connection, waits[0])

    def eviction_candidate(self, connection: RegistryProtocol, now: float) -> EvictionCandidate | None:
        """As what the connection may be closed for another one; None: its client or the application is at work, or it
        is gone already."""
        if connection not in connection.connections or (connection.transport.is_closing() and not connection.secret):
            return None
        waits, _ = waiting_for(connection)
        since = self._since if waits == self._waits else now
        kind: EvictionKind
        if waits[0] == "linger":
            kind = "lingering"
        elif waits[0] in ("fresh", "head") and connection.begun <= 1:
            kind, since = "new", self._opened
        elif waits[0] in ("idle", "head"):
            kind = "idle"
        elif waits[0] != "work" and now - since >= STALLED_SECONDS:
            kind = "stalled"
        else:
            return None
        client = None if connection.proxies is not None else connection.client
        return EvictionCandidate(kind, since, None if client is None else network_of(client[0]))


def waiting_for(connection: RegistryProtocol) -> tuple[tuple[WaitReason, int, int], float]:
    """What a connection waits for and how far it has come, and how long it may stay there, in seconds."""
    limits = connection.limits
    active = connection.active
    unsent = connection.transport.get_write_buffer_size()
    if connection.secret and (unsent or connection.is_lingering or connection.transport.is_closing()):
        return waiting_for_over_tls(connection, unsent)
    if unsent:
        return ("send", active.moved if active is not None else 0, unsent), limits.send_idle_seconds
    if active is not None and active.sending is not None and active.sending.is_blocked:
        return ("send", active.moved, active.sending.unacknowledged()), limits.send_idle_seconds
    if connection.is_lingering:
        return ("linger", 0, 0), limits.linger_seconds
    if active is not None:
        if active.receiving:
            return ("body", connection.begun, active.moved), limits.body_idle_seconds
        if connection.half_closed:
            return ("half", connection.begun, active.moved), limits.half_close_seconds
        return ("work", 0, 0), float("inf")
    if connection.latest is not None and connection.latest.more_body:
        return ("drain", connection.begun, connection.latest.rest or 0), limits.body_idle_seconds
    if connection.is_in_head or connection.unfinished:
        return ("head", connection.begun, 0), limits.header_seconds
    if not connection.begun:
        return ("fresh", 0, 0), limits.header_seconds
    return ("idle", connection.begun, 0), limits.keep_alive_seconds


def waiting_for_over_tls(connection: RegistryProtocol, unsent: int) -> tuple[tuple[WaitReason, int, int], float]:
    """The same over TLS, while something is to be sent or the connection ends. What was encrypted lies in a buffer of
    which nobody tells the size, so what counts is how much of it the client's side has acknowledged."""
    taken, left = tcp_progress(connection.transport)
    if unsent or left:
        return ("send", taken, left), connection.limits.send_idle_seconds
    return ("linger", taken, 0), connection.limits.linger_seconds


def tcp_progress(transport: asyncio.BaseTransport) -> tuple[int, int]:
    """Bytes that the other side has acknowledged, and those in the kernel that it has not. See tcp(7), TCP_INFO and
    SIOCOUTQ; (0, 0) where neither is to be had."""
    sock = transport.get_extra_info("socket")
    if sys.platform != "linux" or sock is None:
        return 0, 0
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ACKED.size)
        left = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))
        return _ACKED.unpack(info)[0], _COUNT.unpack(left)[0]
    except (OSError, struct.error):  # gone already
        return 0, 0


def held_bytes(connection: RegistryProtocol) -> int:
    """Bytes of a whole answer that are kept in this process's memory since the client has not taken them."""
    if not connection.held_unsent_bytes:
        return 0
    if connection.transport.get_write_buffer_size() or (connection.secret and tcp_progress(connection.transport)[1]):
        return connection.held_unsent_bytes
    return 0


def make_room_for_response(connections: Collection[RegistryProtocol], size: int, limit: int, now: float) -> bool:
    """Whether `size` more bytes may wait for a client. Where they do not fit, connections whose clients have taken
    nothing for a while are dropped first."""
    waiting = [each for each in connections if held_bytes(each)]
    most = max(limit - size, 0)
    if sum(map(held_bytes, waiting)) <= most:
        return True
    for each in waiting:
        silence = each.eviction_candidate(now)
        if silence is not None and silence.kind == "stalled":
            each.drop()
    return sum(map(held_bytes, waiting)) <= most


def end_after_timeout(connection: RegistryProtocol, what: WaitReason) -> None:
    if what == "head":
        connection.refuse(RefusedRequest(HTTPStatus.REQUEST_TIMEOUT, "the headers did not come in time"))
    elif what == "body":
        connection.refuse(RefusedRequest(HTTPStatus.REQUEST_TIMEOUT, "the body stopped coming"))
    elif what == "linger" and connection.secret and not connection.transport.is_closing():
        connection.close()  # TLS says that all has been said; the client has the same time again
    elif what in ("send", "linger"):
        connection.transport.abort()
    else:
        connection.close()
