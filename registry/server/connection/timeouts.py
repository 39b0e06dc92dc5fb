"""How long a connection may wait for one thing.

Reads and writes set no timers. Once a second each connection says what it waits for and how far that has come; any
progress starts its time anew. A request's head is the exception: its time runs from its first byte, since otherwise a
client could send a byte a minute.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from registry.client_addresses import network_of
from registry.server.gate.connection_limit import STALLED_SECONDS, EvictionCandidate, EvictionKind

WaitReason = Literal["send", "linger", "body", "half_closed", "application", "drain", "head", "first_byte", "idle"]


class Wait(NamedTuple):
    """What a connection waits for."""

    reason: WaitReason
    progress: tuple[int, int]
    """Counts that change with any progress."""
    seconds: float
    """How long it may wait without progress."""


class ConnectionTimeouts:
    """What one connection waited for when it was last checked, and since when."""

    def __init__(self, wait: Wait, now: float) -> None:
        """For a connection that was just made, and waits for its first byte. `now` is the event loop's time."""
        self._opened = self._since = now
        self._wait = wait

    def check(self, wait: Wait, now: float) -> WaitReason | None:
        """Returns what the connection has waited too long for; None: it may go on waiting."""
        if wait != self._wait:
            self._wait = wait
            self._since = now
        elif now - self._since >= wait.seconds:
            return wait.reason
        return None

    def eviction_candidate(
        self, wait: Wait, now: float, *, requests_begun: int, client: str | None
    ) -> EvictionCandidate | None:
        """Returns what the connection may be closed as to make room for another one; None if it may not, since the
        application works for it or its client has just sent or taken something.

        `client` is its address; None for a trusted proxy.
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
