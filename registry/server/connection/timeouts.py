"""Timeouts of one connection.

A connection starts no timers when it reads and writes. Instead the worker checks once a second what the connection is
waiting for, and a measure of its progress. If neither has changed for too long, the timeout has passed. So any progress
restarts the timeout. The wait for a request's head is an exception: its measure of progress never changes, so its
timeout runs from the head's first byte. Otherwise a client could keep a connection open by sending one byte of a head
per minute.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from registry.client_addresses import network_of
from registry.server.gate.connection_limit import STALLED_SECONDS, EvictionCandidate, EvictionKind

WaitReason = Literal["send", "linger", "body", "half_closed", "application", "drain", "head", "first_byte", "idle"]
"""What a connection is waiting for:

- `first_byte`: the first byte of a new connection.
- `head`: the rest of a request's head.
- `body`: the next part of a request's body, because the application is waiting for it.
- `application`: the response, or its next part, from the application. There is no timeout.
- `half_closed`: the same as `application`, but with a timeout, because the client has shut down its sending side.
- `send`: the client has to receive more of a response.
- `drain`: the rest of a request's body, which the server reads and discards after it has sent the response.
- `idle`: the next request.
- `linger`: the last response was sent, and the client has to receive it and close the connection.
"""


class Wait(NamedTuple):
    """What a connection is waiting for when it is checked."""

    reason: WaitReason
    progress: tuple[int, int]
    """The measure of progress: two numbers whose meaning depends on `reason`. Progress changes at least one of them."""
    timeout_seconds: float
    """How long `reason` and `progress` may stay the same."""


class ConnectionTimeouts:
    """Remembers what one connection was waiting for at the last check, and since when."""

    def __init__(self, wait: Wait, now: float) -> None:
        """`wait` is what the new connection is waiting for. `now` is in seconds of the event loop's clock, here and in
        the methods below."""
        self._opened = self._since = now
        self.last_wait = wait
        """What the connection was waiting for at the last check."""

    def check(self, wait: Wait, now: float) -> WaitReason | None:
        """Records what the connection is waiting for now. Returns the reason of the wait if its timeout has passed;
        otherwise None."""
        if wait != self.last_wait:
            self.last_wait = wait
            self._since = now
        elif now - self._since >= wait.timeout_seconds:
            return wait.reason
        return None

    def eviction_candidate(
        self, wait: Wait, now: float, *, requests_started: int, client: str | None
    ) -> EvictionCandidate | None:
        """Describes the connection as a candidate for eviction. A connection is evicted if it is closed to make room
        for another one. Returns None if the connection must stay open. This is so if it waits for the `application`, or
        if its wait for `send`, `body`, `half_closed` or `drain` has made progress in the last `STALLED_SECONDS`.

        `wait` is what the connection is waiting for now. `requests_started` is the number of requests of which at least
        one byte was received. `client` is the client's address; None for a trusted proxy.
        """
        since = self._since if wait == self.last_wait else now
        kind: EvictionKind
        if wait.reason == "linger":
            kind = "lingering"
        elif wait.reason in ("first_byte", "head") and requests_started <= 1:
            kind, since = "new", self._opened
        elif wait.reason in ("idle", "head"):
            kind = "idle"
        elif wait.reason != "application" and now - since >= STALLED_SECONDS:
            kind = "stalled"
        else:
            return None
        return EvictionCandidate(kind, since, None if client is None else network_of(client))
