"""A running request of a fill (`RunningRequest`), which can be cancelled so that its connection serves another purpose.

A *fill* is the work of one process to get one blob. A *connection slot* is a permit for one connection to an upstream
(`registry.mirror.fill.slots`).
"""

from __future__ import annotations

import asyncio
from typing import Final

from registry.mirror.fill.demand import Demand
from registry.mirror.fill.sinks import PieceSink, WholeSink
from registry.mirror.fill.slot_holders import SLOW_SLOT_SECONDS

UNATTENDED_FACTOR: Final = 3.0
"""While another request waits for a connection, a request is too slow if it needs more than 15 s for 256 KiB
(`SLOW_SLOT_SECONDS`). If no client waits for its blob, its time is multiplied by this factor before it is compared with
the 15 s, so that the request is too slow if it needs more than 5 s."""


class RunningRequest:
    """A request that is running, and holds a connection slot. Implements the Protocol `SlotHolder`.

    - `sink`: receives the response.
    - `is_new_connection`: whether the request is the first one of its connection.
    - `has_share`: whether the request holds one of the limited shares of its repository
      (`ConnectionSlots.repository_share`). A request with a share is not cut off while a client waits for its blob.
    - `cancel_scope`: a timeout around the request. The request is cancelled by setting the deadline of this timeout to
      now."""

    def __init__(
        self,
        sink: PieceSink | WholeSink,
        demand: Demand,
        is_new_connection: bool,
        has_share: bool,
        cancel_scope: asyncio.Timeout,
    ) -> None:
        self.is_new_connection = is_new_connection
        self.cancel_scope = cancel_scope
        self._has_share = has_share
        self._sink = sink
        self._demand = demand
        self._sent_at = asyncio.get_running_loop().time()

    def slowness(self) -> float:
        """Returns how many seconds the request needs for 256 KiB.

        - If no client waits for the blob, the seconds are multiplied by `UNATTENDED_FACTOR`.
        - If a client waits, returns 0 for a request that must not be cut off: it has a share, it is not slower than
          `SLOW_SLOT_SECONDS`, or all of its bytes would have to be requested again."""
        elapsed = asyncio.get_running_loop().time() - self._sent_at
        seconds = elapsed / max(self._sink.new_bytes / (256 * 1024), 1.0)
        if not self._demand.has_clients:
            return UNATTENDED_FACTOR * seconds
        if self._has_share or seconds <= SLOW_SLOT_SECONDS or isinstance(self._sink, WholeSink):
            return 0.0
        return seconds

    def cut_off(self) -> None:
        """Cancels the request. Its missing bytes are requested again later. If all clients have left, and the later
        request would begin at the same byte as this request, gives up the fill. Otherwise the same bytes could be
        requested and cut off again and again."""
        if not self._sink.new_bytes or isinstance(self._sink, WholeSink):
            self._demand.give_up()
        self.cancel()

    def cancel(self) -> None:
        """Cancels the request. Its missing bytes are requested again."""
        if not self.cancel_scope.expired():
            self.cancel_scope.reschedule(asyncio.get_running_loop().time())
