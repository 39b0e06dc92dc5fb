"""Memory budget for large responses that clients have not taken yet.

A transport keeps what was written to it until the client has taken it. A worker bounds what whole responses of more
than 64 KiB hold in this way. Pieces of a streamed response do not count: their sender waits for the client.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from registry.server.gate.connection_limit import EvictableConnection
from registry.server.kernel import tcp_progress


class UnsentBudget:
    """The budget of one worker: at most `limit` bytes over all its connections."""

    def __init__(self, limit: int, clock: Callable[[], float]) -> None:
        """`clock` is in seconds: the event loop's."""
        self._limit = limit
        self._clock = clock
        self._shares: set[UnsentShare] = set()

    def add(self, share: UnsentShare, size: int) -> bool:
        """Counts `share` and returns True if `size` more bytes fit. If they do not, first drops connections whose
        clients have taken nothing for a while."""
        most = max(self._limit - size, 0)
        if self._unsent_bytes() > most:
            self._drop_stalled()
            if self._unsent_bytes() > most:
                return False
        self._shares.add(share)
        return True

    def remove(self, share: UnsentShare) -> None:
        """Counts `share` no longer. May be called repeatedly."""
        self._shares.discard(share)

    def _unsent_bytes(self) -> int:
        return sum([share.unsent_bytes() for share in self._shares])

    def _drop_stalled(self) -> None:
        now = self._clock()
        for share in [share for share in self._shares if share.unsent_bytes()]:
            share.drop_if_stalled(now)


class UnsentShare:
    """The bytes of the budget that one connection uses: `size`, until the client has taken them."""

    __slots__ = ("_budget", "_connection", "_is_tls", "_transport", "size")

    def __init__(
        self, budget: UnsentBudget, connection: EvictableConnection, transport: asyncio.Transport, *, is_tls: bool
    ) -> None:
        self._budget = budget
        self._connection: EvictableConnection | None = connection
        self._transport = transport
        self._is_tls = is_tls
        self.size = 0

    def hold(self, size: int) -> bool:
        """Takes `size` bytes of the budget in place of those held before. Returns False if they do not fit."""
        if not self._budget.add(self, size):
            return False
        self.size = size
        return True

    def release(self) -> None:
        """Gives back what the connection holds. May be called repeatedly."""
        if self.size:
            self.size = 0
            self._budget.remove(self)

    def release_if_taken(self) -> None:
        """Gives back what the connection holds if the transport has nothing left to write."""
        if not self._transport.get_write_buffer_size():
            self.release()

    def close(self) -> None:
        """Gives back what the connection holds, and forgets the connection. To be called when it is lost."""
        self.release()
        self._connection = None

    def unsent_bytes(self) -> int:
        """Returns the bytes held, or 0 once the client has taken all that was written."""
        if self.size and (self._transport.get_write_buffer_size() or (self._is_tls and self._unacknowledged())):
            return self.size
        return 0

    def drop_if_stalled(self, now: float) -> None:
        """Drops the connection if its client has taken nothing for a while."""
        candidate = None if self._connection is None else self._connection.eviction_candidate(now)
        if self._connection is not None and candidate is not None and candidate.kind == "stalled":
            self._connection.drop()

    def _unacknowledged(self) -> int:
        return tcp_progress(self._transport.get_extra_info("socket"))[1]
