"""Timeouts of one connection.

A connection has no timers. Instead, the worker checks once a second what the connection is waiting for and how far
this wait has progressed. The timeout passes when neither has changed for too long. So any progress restarts the
timeout.

The wait for a request's head is an exception: its timeout runs from the head's first byte, and progress does not
restart it. So a client cannot keep a connection open by sending the head very slowly.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from registry.client_addresses import network_of
from registry.server.gate.connection_limit import STALLED_SECONDS, EvictionCandidate, SilentConnectionKind

WaitReason = Literal["send", "linger", "body", "half_closed", "application", "drain", "head", "first_byte", "idle"]
"""What a connection is waiting for:

- `first_byte`: the client's first byte on a new connection.
- `head`: the rest of a request's head.
- `body`: the next part of a request's body, because the application is waiting for it.
- `application`: the next part of the response, which the application has to produce. This wait has no timeout.
- `half_closed`: the next part of the response, after the client has shut down its sending side. This wait has a
  timeout.
- `send`: the client, which has to receive more of a response.
- `drain`: the rest of a request's body, which the server reads and discards after it has sent the response.
- `idle`: the next request.
- `linger`: the client, which has to receive the last response and close the connection.
"""


class Wait(NamedTuple):
    """States why a connection waits, and for how long it may wait without progress. Each check of timeouts reads the
    current value."""

    reason: WaitReason
    progress: tuple[int, int]
    """How far the wait has progressed: two numbers whose meaning depends on `reason`. Progress changes at least one
    number."""
    timeout_seconds: float
    """The timeout passes when `reason` and `progress` have stayed the same for this long."""


class ConnectionTimeouts:
    """Decides whether the timeout of one connection has passed. Remembers what the connection was waiting for at the
    last check, and since when."""

    def __init__(self, wait: Wait, now: float) -> None:
        """`wait` is what the new connection is waiting for. In all methods, `now` is the time of the event loop's clock
        in seconds."""
        self._opened_at = self._waiting_since = now
        self._last_wait = wait

    def has_changed(self, wait: Wait) -> bool:
        """Returns whether `wait` differs from what the connection was waiting for at the last check."""
        return wait != self._last_wait

    def check(self, wait: Wait, now: float) -> WaitReason | None:
        """Records what the connection is waiting for now. Returns the reason of the wait if the timeout has passed;
        otherwise None."""
        if wait != self._last_wait:
            self._last_wait = wait
            self._waiting_since = now
        elif now - self._waiting_since >= wait.timeout_seconds:
            return wait.reason
        return None

    def eviction_candidate(
        self, wait: Wait, now: float, *, requests_started: int, client: str | None
    ) -> EvictionCandidate | None:
        """Describes the connection if the worker may evict it. To *evict* a connection is to close it, to make room for
        another one. Only *silent* connections may be evicted. The connection is not silent, and this method returns
        None, in two cases:

        - The reason of the wait is `application`.
        - The reason is `send`, `body`, `half_closed` or `drain`, and the wait has progressed in the last
          `STALLED_SECONDS`.

        `wait`: what the connection is waiting for now. `requests_started`: the number of requests of which the server
        has received at least one byte. `client`: the client's address; None for a trusted proxy.
        """
        since = self._waiting_since if wait == self._last_wait else now
        kind: SilentConnectionKind
        if wait.reason == "linger":
            kind = "lingering"
        elif wait.reason in ("first_byte", "head") and requests_started <= 1:
            kind, since = "new", self._opened_at
        elif wait.reason in ("idle", "head"):
            kind = "idle"
        elif wait.reason != "application" and now - since >= STALLED_SECONDS:
            kind = "stalled"
        else:
            return None
        return EvictionCandidate(kind, since, None if client is None else network_of(client))
