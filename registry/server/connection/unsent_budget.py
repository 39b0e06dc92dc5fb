"""Memory budget of a worker process for large responses that clients have not received yet.

asyncio's transport keeps written bytes in memory until the kernel accepts them, and the kernel accepts them only as
fast as the client receives. The budget limits this memory for response bodies of more than 64 KiB that the application
sends in one message. Bodies that it sends in several messages are not counted: after each message the application has
to wait until the client has received most of the bytes written so far. Another budget counts files that are sent over
TLS (`new_piece_memory`).
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from registry.memory_budget import MIB, MemoryBudget
from registry.server.gate.connection_limit import MAX_CONNECTIONS, MAX_EVICTIONS, EvictableConnection
from registry.server.kernel import tcp_progress

RESPONSE_SLICE_BYTES = 256 * 1024
"""A large body is written in slices of this size, one slice in each iteration of the event loop. A larger slice would
take more memory. Over TLS its encryption would also delay the other connections."""
PIECES_BUDGET_BYTES = 48 * MIB
"""Size of a worker's budget for the pieces of files that are sent over TLS. Each piece reserves 128 KiB
(`encrypted_file_sender.RESERVED_BYTES`). Reservations of more than 64 KiB may together use only three quarters of the
budget (`MemoryBudget`), here 36 MiB. 36 MiB are enough for 288 pieces at the same time, one for each client."""
_CHECK_INTERVAL_SECONDS = 0.25
"""While a response waits for memory, the budget checks at this interval whether reserved bytes have been sent
(`_make_room_for_waiting`)."""
_WAITING_FACTOR = 2
"""The bodies of all responses that wait for memory may together have this many times the size of the budget. A response
that would exceed this limit is refused at once."""
_SLOW_CLIENT_SECONDS = 8.0
"""A client that takes longer than this to receive one piece of a file over TLS may be cut off. Clients are cut off only
while another piece waits for memory of the same budget (`PIECES_BUDGET_BYTES`)."""
_MAX_WAIT_SECONDS = 600.0
"""Longest time that a client waits for memory to receive a file over TLS. The time may be long, because slow clients
lose their memory after `_SLOW_CLIENT_SECONDS`."""


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
    """The budget of one worker process: all its connections together may reserve at most `limit_bytes`. The part of the
    budget that one connection has reserved is its *share* (`UnsentShare`). A reservation of more than `limit_bytes` is
    granted only when no other bytes are reserved.

    A response that is written in slices reserves the bytes of one slice, and keeps them at least until its last slice
    is written. If all slices written so far have been sent, the response still keeps the reservation, because its next
    slice needs the memory.

    Responses that do not fit wait in a queue, each for at most `wait_seconds`. The bodies of all responses that wait
    may together have at most `_WAITING_FACTOR` times `limit_bytes`.

    The transport does not report when the last bytes of a response are sent. So when a reservation does not fit, the
    budget looks for shares whose bytes were sent, until it has found enough bytes. Each share with reserved bytes has
    more than 64 KiB, so with `limit_bytes` of 32 MiB the budget looks at fewer than 512 shares."""

    def __init__(self, limit_bytes: int, wait_seconds: float, clock: Callable[[], float]) -> None:
        """`clock` is the event loop's clock, in seconds."""
        self._limit_bytes = limit_bytes
        self._wait_seconds = wait_seconds
        self._clock = clock
        self._shares: OrderedDict[UnsentShare, None] = OrderedDict()
        """The shares that have reserved bytes. The share that the budget has not looked at for the longest time comes
        first."""
        self._reserved_bytes = 0
        """The sum of the bytes that the shares have reserved. Some of these bytes may have been sent already."""
        self._waiting: dict[UnsentShare, _PendingReservation] = {}  # a queue, in the order of arrival
        self._waiting_bytes = 0  # the size of the bodies of all responses that wait
        self._timer: asyncio.TimerHandle | None = None  # for the next call of `_make_room_for_waiting`

    async def reserve(self, share: UnsentShare, size: int, body_bytes: int) -> bool:
        """Reserves `size` bytes for `share` and returns True. Waits until the bytes fit into the budget. Returns False
        if the bytes do not fit in time, if too many responses wait, or if the connection is lost.

        `share` may still have an earlier reservation. During the wait, the earlier reservation counts against the
        budget until its bytes are sent. When the new reservation is granted, it replaces the earlier one.

        `body_bytes` is the memory that the response takes while it waits. If the call is cancelled, the share may have
        reserved the bytes, so the caller must call `release`. Do not call this method while an earlier call for `share`
        waits."""
        if not self._waiting and self._make_room(size):
            self._grant(share, size)
            return True
        if self._waiting and self._waiting_bytes + body_bytes > _WAITING_FACTOR * self._limit_bytes:
            return False
        reservation = _PendingReservation(size, body_bytes, asyncio.get_running_loop().create_future())
        self._waiting[share] = reservation
        self._waiting_bytes += body_bytes
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_CHECK_INTERVAL_SECONDS, self._make_room_for_waiting)
        try:
            async with asyncio.timeout(self._wait_seconds):
                return await reservation.granted
        except TimeoutError:
            # The wait may have ended just before the timeout.
            return not reservation.granted.cancelled() and reservation.granted.result()
        finally:
            if share in self._waiting:
                self._stop_waiting(share)
                self._grant_to_waiting()  # the next share in the queue may need less than `share`, and fit now

    def release(self, share: UnsentShare) -> None:
        """Gives the reserved bytes of `share` back to the budget, and grants the reservations that fit now. May be
        called repeatedly."""
        self._remove(share)
        self._grant_to_waiting()

    def close(self, share: UnsentShare) -> None:
        """Releases the bytes of `share`. If a call of `reserve` waits for `share`, it returns False. May be called
        repeatedly."""
        if share in self._waiting:
            reservation = self._stop_waiting(share)
            if not reservation.granted.done():
                reservation.granted.set_result(False)
        self.release(share)

    def _remove(self, share: UnsentShare) -> None:
        if share.reserved_bytes:
            self._reserved_bytes -= share.reserved_bytes
            share.reserved_bytes, share.is_writing = 0, False
            del self._shares[share]

    def _grant(self, share: UnsentShare, size: int) -> None:
        self._remove(share)
        share.reserved_bytes, share.is_writing = size, True
        self._shares[share] = None
        self._reserved_bytes += size

    def _stop_waiting(self, share: UnsentShare) -> _PendingReservation:
        reservation = self._waiting.pop(share)
        self._waiting_bytes -= reservation.body_bytes
        return reservation

    def _grant_to_waiting(self) -> None:
        """Grants the waiting reservations in the order of arrival. Stops at the first one that does not fit."""
        while self._waiting:
            share, reservation = next(iter(self._waiting.items()))
            # If `granted` is done already, the wait was cancelled or timed out, and `reserve` has not continued yet.
            if not reservation.granted.done():
                if self._reserved_bytes > self._max_reserved_bytes(reservation.size):
                    return
                self._grant(share, reservation.size)
                reservation.granted.set_result(True)
            self._stop_waiting(share)

    def _make_room_for_waiting(self) -> None:
        """Makes room for the shares that wait (`_make_room`), and grants the reservations that fit. Repeats this every
        `_CHECK_INTERVAL_SECONDS` while a share waits."""
        self._timer = None
        if self._waiting:
            self._make_room(sum(reservation.size for reservation in self._waiting.values()))
            self._grant_to_waiting()
        if self._waiting:
            self._timer = asyncio.get_running_loop().call_later(_CHECK_INTERVAL_SECONDS, self._make_room_for_waiting)

    def _max_reserved_bytes(self, size: int) -> int:
        """Returns how many bytes may be reserved already so that a reservation of `size` more bytes is granted. Returns
        0 if `size` is larger than the budget: such a reservation is granted only when no other bytes are reserved."""
        return max(self._limit_bytes - size, 0)

    def _make_room(self, size: int) -> bool:
        """Returns whether `size` more bytes fit into the budget. If they do not fit, first releases the bytes that were
        sent. If they still do not fit, closes connections whose clients have received nothing for a while, and checks
        once more."""
        max_reserved_bytes = self._max_reserved_bytes(size)
        if self._reserved_bytes <= max_reserved_bytes or self._release_sent(max_reserved_bytes):
            return True
        self._evict_stalled()
        return self._release_sent(max_reserved_bytes)

    def _release_sent(self, max_reserved_bytes: int) -> bool:
        """Releases shares whose bytes were sent, until at most `max_reserved_bytes` are reserved. Looks at each share
        at most once. Returns whether at most `max_reserved_bytes` are reserved now."""
        for _ in range(len(self._shares)):
            if self._reserved_bytes <= max_reserved_bytes:
                break
            share = next(iter(self._shares))
            if share.has_unsent_bytes():
                self._shares.move_to_end(share)
            else:
                self._remove(share)
        return self._reserved_bytes <= max_reserved_bytes

    def _evict_stalled(self) -> None:
        """Closes up to `MAX_EVICTIONS` connections whose clients have received nothing for a while. Call it when all
        shares have unsent bytes."""
        now, count = self._clock(), 0
        for share in list(self._shares):
            count += share.evict_if_stalled(now)
            if count == MAX_EVICTIONS:
                break


@dataclass(frozen=True, slots=True, eq=False)
class _PendingReservation:
    """A reservation of `size` bytes for which a share waits. `body_bytes` is the size of the response's body. The
    result of `granted` is True when the bytes are reserved, and False if the connection is lost."""

    size: int
    body_bytes: int
    granted: asyncio.Future[bool]


class UnsentShare:
    """The part of a worker's budget that one connection uses."""

    __slots__ = ("_budget", "_connection", "_is_tls", "_transport", "is_writing", "reserved_bytes")

    def __init__(
        self, budget: UnsentBudget, connection: EvictableConnection, transport: asyncio.Transport, *, is_tls: bool
    ) -> None:
        """`transport` is the transport of `connection`. The budget closes `connection` if the budget is used up and the
        connection's client has received nothing for a while."""
        self._budget = budget
        self._connection: EvictableConnection | None = connection
        self._transport = transport
        self._is_tls = is_tls
        self.is_writing = False
        """Whether the response is still being written to the transport: True after a reservation, until `finish`,
        `release` or `close` is called."""
        self.reserved_bytes = 0
        """How many bytes of the budget the connection uses. Only the budget changes this number."""

    async def reserve(self, size: int, body_bytes: int) -> bool:
        """Reserves `size` bytes and returns True. Waits until the bytes fit into the budget. Returns False and reserves
        nothing if the bytes do not fit in time, if too many other responses wait, or if the connection is lost.

        The connection may still have a reservation for an earlier response. During the wait, the earlier reservation
        counts against the budget until its bytes are sent. When the new reservation is granted, it replaces the earlier
        one.

        The reserved bytes count as unsent until `finish` or `release` is called. If the call is cancelled, the bytes
        may be reserved, so the caller must call `finish` or `release`."""
        return await self._budget.reserve(self, size, body_bytes)

    def finish(self) -> None:
        """Called after the last byte of the response is written to the transport. From now on the reserved bytes count
        only until they are sent. May be called repeatedly."""
        self.is_writing = False
        # Over TLS, bytes that have left the write buffer may be in the transport's second buffer. So the budget finds
        # out later whether they were sent (`has_unsent_bytes`).
        if not self._is_tls:
            self.release_if_sent()

    def release(self) -> None:
        """Gives the reserved bytes back to the budget. May be called repeatedly."""
        self._budget.release(self)

    def release_if_sent(self) -> None:
        """Gives the reserved bytes back to the budget if the transport's write buffer is empty."""
        if not self._transport.get_write_buffer_size():
            self.release()

    def close(self) -> None:
        """Called when the connection is lost: gives the reserved bytes back to the budget, makes a waiting `reserve`
        return False, and removes the reference to the connection, so that the connection's memory can be freed."""
        self._budget.close(self)
        self._connection = None

    def has_unsent_bytes(self) -> bool:
        """Returns whether the response is still being written, or the transport may still hold some of its bytes in
        memory. Over TLS, the transport has a second buffer besides the write buffer. The size of the second buffer is
        unknown, so over TLS the method returns True until the client's kernel has acknowledged all bytes."""
        if self.is_writing or self._transport.get_write_buffer_size():
            return True
        return self._is_tls and bool(self._unacknowledged_bytes())

    def evict_if_stalled(self, now: float) -> bool:
        """Closes the connection if its client has received nothing for a while. Returns whether it has closed the
        connection. `now` is in seconds of the event loop's clock."""
        candidate = None if self._connection is None else self._connection.eviction_candidate(now)
        if self._connection is None or candidate is None or candidate.kind != "stalled":
            return False
        self._connection.evict()
        return True

    def _unacknowledged_bytes(self) -> int:
        return tcp_progress(self._transport.get_extra_info("socket"))[1]
