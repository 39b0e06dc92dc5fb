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
from dataclasses import dataclass

from registry.memory_budget import MIB, MemoryBudget
from registry.server.gate.connection_limit import MAX_CONNECTIONS, MAX_EVICTIONS, EvictableConnection
from registry.server.kernel import tcp_progress

RESPONSE_SLICE_BYTES = 256 * 1024
"""Size of the slices in which a large body is written, one in each iteration of the event loop. A slice is limited
because the transport keeps it in memory and, over TLS, encrypts it while the worker's other connections wait."""
PIECES_BUDGET_BYTES = 48 * MIB
"""Size of a worker's budget for the pieces of files that are sent over TLS. It is enough for 288 clients at the same
time. While a client receives a piece, it uses 128 KiB (`encrypted_file_sender.RESERVED_BYTES`). A quarter of each
`MemoryBudget` is kept for shares of at most 64 KiB, so 36 MiB remain for these clients: 36 MiB / 128 KiB = 288."""
_CHECK_INTERVAL_SECONDS = 0.25
"""While a response waits for memory, the budget checks at this interval whether reserved bytes have been sent
(`_make_room_for_waiting`)."""
_WAITING_FACTOR = 2
"""The bodies of all responses that wait for memory may together have this many times the size of the budget. A further
response is refused at once."""
_SLOW_CLIENT_SECONDS = 8.0
"""While another client waits for memory, a client that takes longer than this for one piece is cut off."""
_MAX_WAIT_SECONDS = 600.0
"""Longest time that a client waits for memory. The time may be long because the queue keeps moving: slow clients lose
their memory after `_SLOW_CLIENT_SECONDS`."""


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
    """The budget of one worker process: at most `limit_bytes` over all its connections. The part of the budget that one
    connection has reserved is its *share* (`UnsentShare`). A reservation of more than `limit_bytes` is granted only
    when all other reserved bytes are sent.

    A response that is written in slices reserves the bytes of one slice, and keeps them at least until its last slice
    is written. It keeps them even while all slices written so far are sent. That is so at the start of every response,
    because the kernel accepts the first slices at once. If a response released its bytes then, too many responses could
    begin at once, and their next slices together would exceed the limit.

    A response that does not fit waits, in the order of arrival, for at most `wait_seconds`. Its body is in memory
    meanwhile. So the bodies of all responses that wait may together have at most `_WAITING_FACTOR` times `limit_bytes`.

    The transport does not report that the last bytes of a response were sent, so the budget has to look at the shares.
    It does so only if a reservation does not fit, and only until it has found enough bytes that were sent. So the time
    for a reservation usually does not depend on the number of connections. It takes longest if no client receives,
    because the budget then looks at all shares with reserved bytes. Each of these has reserved more than 64 KiB, so
    with `limit_bytes` of 32 MiB there are fewer than 512."""

    def __init__(self, limit_bytes: int, wait_seconds: float, clock: Callable[[], float]) -> None:
        """`clock` is the event loop's, in seconds."""
        self._limit_bytes = limit_bytes
        self._wait_seconds = wait_seconds
        self._clock = clock
        self._shares: OrderedDict[UnsentShare, None] = OrderedDict()
        """The shares that have reserved bytes. Those that the budget has not looked at for the longest time come
        first."""
        self._reserved_bytes = 0
        """The sum of the bytes that the shares have reserved. Some of these bytes may have been sent already."""
        self._waiting: dict[UnsentShare, _PendingReservation] = {}  # a queue, in the order of arrival
        self._waiting_bytes = 0  # the size of the bodies of all responses that wait
        self._timer: asyncio.TimerHandle | None = None  # for the next call of `_make_room_for_waiting`

    async def reserve(self, share: UnsentShare, size: int, body_bytes: int) -> bool:
        """Waits until `size` more bytes fit into the budget, sets `share.reserved_bytes` to `size`, and returns True.
        Returns False if the bytes do not fit in time, if too many shares wait, or if the connection is lost. During the
        wait, bytes that `share` reserved earlier take room in the budget too, as long as they are not sent.
        `body_bytes`: the memory that the response takes while it waits. If the call is cancelled, the share may have
        reserved the bytes, so the caller must call `release`. A share may wait only once at a time."""
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
                self._grant_to_waiting()  # the next share may fit now, if it needs less than this one

    def release(self, share: UnsentShare) -> None:
        """Sets the number of reserved bytes of `share` to 0, and gives them to the shares that wait. May be called
        repeatedly."""
        self._remove(share)
        self._grant_to_waiting()

    def close(self, share: UnsentShare) -> None:
        """Releases the bytes of `share`. If `share` waits in `reserve`, that call returns False. May be called
        repeatedly."""
        if share in self._waiting:
            reservation = self._stop_waiting(share)
            if not reservation.granted.done():
                reservation.granted.set_result(False)
        self.release(share)

    def _remove(self, share: UnsentShare) -> None:
        if share.reserved_bytes:
            self._reserved_bytes -= share.reserved_bytes
            share.reserved_bytes, share.may_write_more = 0, False
            del self._shares[share]

    def _grant(self, share: UnsentShare, size: int) -> None:
        self._remove(share)
        share.reserved_bytes, share.may_write_more = size, True
        self._shares[share] = None
        self._reserved_bytes += size

    def _stop_waiting(self, share: UnsentShare) -> _PendingReservation:
        reservation = self._waiting.pop(share)
        self._waiting_bytes -= reservation.body_bytes
        return reservation

    def _grant_to_waiting(self) -> None:
        """Reserves the bytes of the shares that wait, in the order of arrival, as long as they fit."""
        while self._waiting:
            share, reservation = next(iter(self._waiting.items()))
            # If `granted` is done here, the wait was cancelled or timed out, and its task has not run since.
            if not reservation.granted.done():
                if self._reserved_bytes > self._max_reserved_bytes(reservation.size):
                    return
                self._grant(share, reservation.size)
                reservation.granted.set_result(True)
            self._stop_waiting(share)

    def _make_room_for_waiting(self) -> None:
        """Makes room for the shares that wait (`_make_room`), and reserves the bytes of those that fit. Is called again
        every `_CHECK_INTERVAL_SECONDS` while a share waits."""
        self._timer = None
        if self._waiting:
            self._make_room(sum(reservation.size for reservation in self._waiting.values()))
            self._grant_to_waiting()
        if self._waiting:
            self._timer = asyncio.get_running_loop().call_later(_CHECK_INTERVAL_SECONDS, self._make_room_for_waiting)

    def _max_reserved_bytes(self, size: int) -> int:
        """Returns how many bytes may be reserved if `size` more bytes are to fit into the budget."""
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
        """Looks at one share after another, at each at most once, and releases it if its bytes were sent. Stops when
        at most `max_reserved_bytes` are still reserved. Returns whether that was achieved."""
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
        """Closes connections whose clients have received nothing for a while, at most `MAX_EVICTIONS`. All shares have
        unsent bytes when this is called."""
        now, count = self._clock(), 0
        for share in list(self._shares):
            count += share.evict_if_stalled(now)
            if count == MAX_EVICTIONS:
                break


@dataclass(frozen=True, slots=True, eq=False)
class _PendingReservation:
    """A reservation of `size` bytes for which a share waits. `body_bytes`: size of the response's body. The result of
    `granted` says whether the share has reserved the bytes."""

    size: int
    body_bytes: int
    granted: asyncio.Future[bool]


class UnsentShare:
    """The part of a worker's budget that one connection uses."""

    __slots__ = ("_budget", "_connection", "_is_tls", "_transport", "may_write_more", "reserved_bytes")

    def __init__(
        self, budget: UnsentBudget, connection: EvictableConnection, transport: asyncio.Transport, *, is_tls: bool
    ) -> None:
        """`connection` is closed if its client receives nothing and the budget is used up. `transport` is the
        connection's transport."""
        self._budget = budget
        self._connection: EvictableConnection | None = connection
        self._transport = transport
        self._is_tls = is_tls
        self.may_write_more = False
        """Whether the application may write more bytes of the response to the transport. The budget sets this to True
        when it reserves bytes."""
        self.reserved_bytes = 0
        """How many bytes of the budget the connection uses. Only the budget changes this number."""

    async def reserve(self, size: int, body_bytes: int) -> bool:
        """Waits until `size` more bytes fit into the budget, sets the number of reserved bytes to `size` and returns
        True. Returns False, and leaves the number unchanged, if they do not fit in time, if too many other responses
        wait, or if the connection is lost. The bytes that this connection has reserved for an earlier response also
        take room in the budget, as long as they are not sent.

        The bytes count as unsent until `finish` or `release` is called. If the call is cancelled, the bytes may be
        reserved, so the caller must call one of the two."""
        return await self._budget.reserve(self, size, body_bytes)

    def finish(self) -> None:
        """Called when nothing more of the response will be written: from now on its bytes count only until they are
        sent. May be called repeatedly."""
        self.may_write_more = False
        # Over TLS, the bytes may have left the write buffer only for the transport's second buffer, so the budget finds
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
        return False, and removes the reference to the connection, so that its memory can be freed."""
        self._budget.close(self)
        self._connection = None

    def has_unsent_bytes(self) -> bool:
        """Returns whether the response is still being written, or the transport may still hold some of its bytes in
        memory. Without TLS, these are the bytes in the transport's write buffer. With TLS, the transport has a second
        buffer, of unknown size. So with TLS the result is False only when the client's kernel has acknowledged all
        bytes."""
        if self.may_write_more or self._transport.get_write_buffer_size():
            return True
        return self._is_tls and bool(self._unacknowledged())

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
