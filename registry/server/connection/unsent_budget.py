"""Memory budget of a worker process for large responses that clients have not received yet.

asyncio's transport keeps written bytes in memory until the kernel accepts them, and the kernel accepts them only as
fast as the client receives. The budget limits this memory for response bodies of more than 64 KiB that the application
sends in one message. Bodies that it sends in several messages are not counted: after each message the application has
to wait until the client has received most of the bytes written so far. Files that are sent over TLS are counted by
another budget (`new_piece_memory`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from registry.memory_budget import MIB, MemoryBudget
from registry.server.gate.connection_limit import MAX_CONNECTIONS, MAX_EVICTIONS, EvictableConnection
from registry.server.kernel import tcp_progress

PIECES_BUDGET_BYTES = 48 * MIB
"""Size of a worker's budget for the pieces of files that are sent over TLS. Three quarters of it are for shares of more
than 64 KiB (see `MemoryBudget`), so 288 clients have a piece at the same time."""
_SLOW_CLIENT_SECONDS = 8.0
"""While another client waits for memory, a client that takes longer than this for one piece (64 KiB) is cut off."""
_MAX_WAIT_SECONDS = 600.0
"""How long a client waits for memory. The time is so long because the memory of slow clients becomes free after
`_SLOW_CLIENT_SECONDS`, and each client that waits gets its turn."""


def new_piece_memory() -> MemoryBudget:
    """Returns a budget for the pieces of files that one worker sends over TLS."""
    return MemoryBudget(
        PIECES_BUDGET_BYTES,
        "parts of blobs",
        wait_seconds=_MAX_WAIT_SECONDS,
        slow_seconds=_SLOW_CLIENT_SECONDS,
        max_waiting=MAX_CONNECTIONS,
    )


class UnsentBudget:
    """The budget of one worker process: at most `limit_bytes` over all its connections. A single reservation of more
    than `limit_bytes` is accepted while nothing else in the budget is unsent."""

    def __init__(self, limit_bytes: int, clock: Callable[[], float]) -> None:
        """`clock` is the event loop's, in seconds."""
        self._limit_bytes = limit_bytes
        self._clock = clock
        self._shares: set[UnsentShare] = set()
        """The shares that have reserved bytes."""

    def try_add(self, share: UnsentShare, size: int) -> bool:
        """Returns whether `size` more bytes fit into the budget. If they do, adds `share` to the shares that the budget
        counts; the caller then sets the number of its bytes. If they do not fit, first closes connections whose clients
        have received nothing for a while, and checks once more."""
        max_used_bytes = max(self._limit_bytes - size, 0)
        if self._unsent_bytes() > max_used_bytes:
            self._evict_stalled()
            if self._unsent_bytes() > max_used_bytes:
                return False
        self._shares.add(share)
        return True

    def remove(self, share: UnsentShare) -> None:
        """Stops counting `share`. May be called repeatedly."""
        self._shares.discard(share)

    def _unsent_bytes(self) -> int:
        return sum([share.unsent_bytes() for share in self._shares])

    def _evict_stalled(self) -> None:
        """Closes connections whose clients have received nothing for a while, at most `MAX_EVICTIONS`."""
        now, count = self._clock(), 0
        for share in [share for share in self._shares if share.unsent_bytes()]:
            count += share.evict_if_stalled(now)
            if count == MAX_EVICTIONS:
                break


class UnsentShare:
    """The part of a worker's budget that one connection uses."""

    __slots__ = ("_budget", "_connection", "_is_tls", "_transport", "reserved_bytes")

    def __init__(
        self, budget: UnsentBudget, connection: EvictableConnection, transport: asyncio.Transport, *, is_tls: bool
    ) -> None:
        """`connection` is closed if its client receives nothing and the budget is used up. `transport` is the
        connection's transport."""
        self._budget = budget
        self._connection: EvictableConnection | None = connection
        self._transport = transport
        self._is_tls = is_tls
        self.reserved_bytes = 0
        """How many bytes of the budget the connection uses."""

    def reserve(self, size: int) -> bool:
        """Sets the number of reserved bytes to `size` and returns True. Returns False, and leaves the number unchanged,
        if `size` more bytes do not fit into the budget. In this check, bytes that this connection has reserved before
        count until they are sent."""
        if not self._budget.try_add(self, size):
            return False
        self.reserved_bytes = size
        return True

    def release(self) -> None:
        """Returns the reserved bytes to the budget. May be called repeatedly."""
        if self.reserved_bytes:
            self.reserved_bytes = 0
            self._budget.remove(self)

    def release_if_sent(self) -> None:
        """Returns the reserved bytes to the budget if the transport's write buffer is empty."""
        if not self._transport.get_write_buffer_size():
            self.release()

    def close(self) -> None:
        """Called when the connection is lost: returns the reserved bytes to the budget, and removes the reference to
        the connection, so that its memory can be freed."""
        self.release()
        self._connection = None

    def unsent_bytes(self) -> int:
        """Returns the number of reserved bytes, or 0 if the transport has no written bytes in memory any more. With TLS
        the transport has a second buffer, of unknown size. So with TLS the result is 0 only when the client's kernel
        has acknowledged all bytes."""
        if not self.reserved_bytes:
            return 0
        is_unsent = self._transport.get_write_buffer_size() or (self._is_tls and self._unacknowledged())
        return self.reserved_bytes if is_unsent else 0

    def evict_if_stalled(self, now: float) -> bool:
        """Closes the connection if its client has received nothing for a while. Returns whether it did. `now` is in
        seconds of the event loop's clock."""
        candidate = None if self._connection is None else self._connection.eviction_candidate(now)
        if self._connection is None or candidate is None or candidate.kind != "stalled":
            return False
        self._connection.evict()
        return True

    def _unacknowledged(self) -> int:
        return tcp_progress(self._transport.get_extra_info("socket"))[1]
