"""How long a connection may wait for one thing.

Nothing on the way of a byte sets a timer: once a second each connection is asked what it waits for, and what it waits
for includes how far it has come, so that any progress starts the time anew. Headers are the exception: there it is the
whole that counts, or a byte a minute would do.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Literal

from registry.server.refusal import Refused

if TYPE_CHECKING:
    from registry.server.protocol import RegistryProtocol

What = Literal["send", "linger", "body", "half", "work", "drain", "head", "fresh", "idle"]


class Patience:
    """One connection's: what it was waiting for when last asked, and since when."""

    def __init__(self) -> None:
        self._waits: tuple[What, int, int] | None = None
        self._since = 0.0

    def check(self, connection: RegistryProtocol, now: float) -> None:
        """Ends the connection in the way fit for what it waits for, once that has taken too long."""
        waits, seconds = waiting_for(connection)
        if waits != self._waits:
            self._waits = waits
            self._since = now
        elif now - self._since >= seconds:
            end(connection, waits[0])


def waiting_for(connection: RegistryProtocol) -> tuple[tuple[What, int, int], float]:
    """What a connection waits for and how far it has come, and how long it may stay there, in seconds."""
    limits = connection.limits
    active = connection.active
    unsent = connection.transport.get_write_buffer_size()
    if unsent:
        return ("send", active.moved if active is not None else 0, unsent), limits.send_idle_seconds
    if active is not None and active.sending is not None and active.sending.blocked:
        return ("send", active.moved, active.sending.untaken()), limits.send_idle_seconds
    if connection.lingering:
        return ("linger", 0, 0), limits.linger_seconds
    if active is not None:
        if active.receiving:
            return ("body", connection.begun, active.moved), limits.body_idle_seconds
        if connection.half_closed:
            return ("half", connection.begun, active.moved), limits.half_close_seconds
        return ("work", 0, 0), float("inf")
    if connection.latest is not None and connection.latest.more_body:
        return ("drain", connection.begun, connection.latest.rest or 0), limits.body_idle_seconds
    if connection.in_head or connection.unfinished:
        return ("head", connection.begun, 0), limits.header_seconds
    if not connection.begun:
        return ("fresh", 0, 0), limits.header_seconds
    return ("idle", connection.begun, 0), limits.keep_alive_seconds


def end(connection: RegistryProtocol, what: What) -> None:
    if what == "head":
        connection.refuse(Refused(HTTPStatus.REQUEST_TIMEOUT, "the headers did not come in time"))
    elif what == "body":
        connection.refuse(Refused(HTTPStatus.REQUEST_TIMEOUT, "the body stopped coming"))
    elif what in ("send", "linger"):
        connection.transport.abort()
    else:
        connection.transport.close()
