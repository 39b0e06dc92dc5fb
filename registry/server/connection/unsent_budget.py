"""Memory budget of a worker process for large responses that clients have not received yet.

asyncio's transport keeps written bytes in memory until the kernel accepts them, and the kernel accepts them only as
fast as the client receives. The budget limits this memory for response bodies of more than 64 KiB that the application
sends in one message. Bodies that it sends in several messages are not counted: after each message the application has
to wait until the client has received most of the bytes written so far. Files that are sent over TLS are counted by
another budget (`new_piece_memory`).
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
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
    than `limit_bytes` is accepted while nothing else in the budget is unsent.

    Nothing tells the budget that bytes were sent. It looks at the shares only when the reserved bytes reach the limit,
    and only until it has found enough bytes that were sent. So a reservation takes the same time whatever the number of
    connections. If the clients do not receive, it looks at as many shares as fit into the budget: 512 of 64 KiB."""

    def __init__(self, limit_bytes: int, clock: Callable[[], float]) -> None:
        """`clock` is the event loop's, in seconds."""
        self._limit_bytes = limit_bytes
        self._clock = clock
        self._shares: OrderedDict[UnsentShare, None] = OrderedDict()
        """The shares that have reserved bytes. Those that the budget has not looked at for the longest time come
        first."""
        self._reserved_bytes = 0
        """The sum of the bytes that the shares have reserved. Some of these bytes may have been sent already."""

    def try_reserve(self, share: UnsentShare, size: int) -> bool:
        """Sets the number of reserved bytes of `share` to `size` and returns True if `size` more bytes fit into the
        budget. If they do not fit, first closes connections whose clients have received nothing for a while, and checks
        once more. Otherwise changes nothing and returns False."""
        max_reserved_bytes = max(self._limit_bytes - size, 0)
        if self._reserved_bytes > max_reserved_bytes and not self._release_sent(max_reserved_bytes):
            self._evict_stalled()
            if not self._release_sent(max_reserved_bytes):
                return False
        self.release(share)
        share.reserved_bytes = size
        self._shares[share] = None
        self._reserved_bytes += size
        return True

    def release(self, share: UnsentShare) -> None:
        """Sets the number of reserved bytes of `share` to 0. May be called repeatedly."""
        if share.reserved_bytes:
            self._reserved_bytes -= share.reserved_bytes
            share.reserved_bytes = 0
            del self._shares[share]

    def _release_sent(self, max_reserved_bytes: int) -> bool:
        """Releases shares whose bytes were sent until at most `max_reserved_bytes` are reserved. Returns whether that
        succeeded. Looks at each share at most once."""
        for _ in range(len(self._shares)):
            if self._reserved_bytes <= max_reserved_bytes:
                break
            share = next(iter(self._shares))
            if share.unsent_bytes():
                self._shares.move_to_end(share)
            else:
                self.release(share)
        return self._reserved_bytes <= max_reserved_bytes

    def _evict_stalled(self) -> None:
        """Closes connections whose clients have received nothing for a while, at most `MAX_EVICTIONS`. All shares have
        unsent bytes when this is called."""
        now, count = self._clock(), 0
        for share in list(self._shares):
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
        """How many bytes of the budget the connection uses. Only the budget changes this number."""

    def reserve(self, size: int) -> bool:
        """Sets the number of reserved bytes to `size` and returns True. Returns False, and leaves the number unchanged,
        if `size` more bytes do not fit into the budget. In this check, bytes that this connection has reserved before
        count until they are sent."""
        return self._budget.try_reserve(self, size)

    def release(self) -> None:
        """Returns the reserved bytes to the budget. May be called repeatedly."""
        self._budget.release(self)

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
