"""Timeouts of one connection.

A connection starts no timers when it reads and writes. Once a second it reports what it is waiting for, and a measure
of its progress. If neither has changed for too long, the timeout has passed. So any progress restarts the time. A
request's head is an exception: its measure of progress never changes, so its time runs from the head's first byte.
Otherwise a client could keep a connection by sending one byte a minute.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from registry.client_addresses import network_of
from registry.server.gate.connection_limit import STALLED_SECONDS, EvictionCandidate, EvictionKind

WaitReason = Literal["send", "linger", "body", "half_closed", "application", "drain", "head", "first_byte", "idle"]
"""What a connection is waiting for:

- `first_byte`: the first byte of a new connection.
- `head`: the rest of a request's head.
- `body`: the next part of a request's body, which the application has asked for.
- `application`: the application's response. It has no timeout.
- `half_closed`: the application's response to a client that has shut down its sending side.
- `send`: the client, which has to receive more of a response.
- `drain`: the rest of a request's body after the response was sent. The server discards it.
- `idle`: the next request.
- `linger`: the client, which has to close the connection after the last response.
"""


class Wait(NamedTuple):
    """What a connection is waiting for at one moment."""

    reason: WaitReason
    progress: tuple[int, int]
    """Two numbers, at least one of which changes with any progress. Their meaning depends on the reason."""
    timeout_seconds: float
    """How long the connection may wait without progress."""


class ConnectionTimeouts:
    """Remembers what one connection was waiting for at the last check, and since when."""

    def __init__(self, wait: Wait, now: float) -> None:
        """`wait` is what the new connection is waiting for. `now` is in seconds of the event loop's clock, here and in
        the methods."""
        self._opened = self._since = now
        self._wait = wait

    def check(self, wait: Wait, now: float) -> WaitReason | None:
        """Records what the connection is waiting for now. Returns the reason if it has waited for that too long; None
        if it may wait on."""
        if wait != self._wait:
            self._wait = wait
            self._since = now
        elif now - self._since >= wait.timeout_seconds:
            return wait.reason
        return None

    def eviction_candidate(
        self, wait: Wait, now: float, *, requests_begun: int, client: str | None
    ) -> EvictionCandidate | None:
        """Returns why the connection may be closed to make room for another one. Returns None if it must stay open,
        because the application is working on its request, or because the client has sent or received something in the
        last seconds.

        `requests_begun` is how many requests have begun on the connection. `client` is the client's address; None for a
        trusted proxy.
        """
        since = self._since if wait == self._wait else now
        kind: EvictionKind
        if wait.reason == "linger":
            kind = "lingering"
        elif wait.reason in ("first_byte", "head") and requests_begun <= 1:
            kind, since = "new", self._opened
        elif wait.reason in ("idle", "head"):
            kind = "idle"
        elif wait.reason != "application" and now - since >= STALLED_SECONDS:
            kind = "stalled"
        else:
            return None
        return EvictionCandidate(kind, since, None if client is None else network_of(client))
