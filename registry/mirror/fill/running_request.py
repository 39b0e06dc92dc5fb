"""`RunningRequest`: a running request of a fill, which can be cancelled.

A *fill* is the work of one process to download one blob. A *connection slot* is a permit for one connection to an
upstream (`registry.mirror.fill.slots`).
"""

from __future__ import annotations

import asyncio
from typing import Final

from registry.mirror.fill.demand import Demand
from registry.mirror.fill.sinks import PieceSink, WholeSink
from registry.mirror.fill.slot_holders import SLOW_SLOT_SECONDS

UNATTENDED_FACTOR: Final = 3.0
"""If no client waits for the blob, the slowness of a request is multiplied by this factor. So the limit for the request
is 5 s for 256 KiB instead of 15 s (`SLOW_SLOT_SECONDS`)."""


class RunningRequest:
    """A running request that holds a connection slot. Implements the Protocol `SlotHolder`.

    - `sink`: receives the response.
    - `is_new_connection`: whether the request is the first one of its connection.
    - `has_share`: whether the request holds a *share* of its repository (`ConnectionSlots.repository_share`). Each
      repository has a limited number of shares, so that slow requests to one repository cannot keep all slots.
    - `cancel_scope`: a timeout around the request. `cancel` makes this timeout expire."""

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
        """Returns how many seconds the request needs for 256 KiB; 0 if the request must not be cut off.

        - If no client waits for the blob: the seconds times `UNATTENDED_FACTOR`.
        - If a client waits for the blob: 0 if the request has a share, needs at most `SLOW_SLOT_SECONDS`, or would have
          to begin again at the first byte (`WholeSink`). Otherwise, the seconds."""
        elapsed = asyncio.get_running_loop().time() - self._sent_at
        seconds = elapsed / max(self._sink.new_bytes / (256 * 1024), 1.0)
        if not self._demand.has_clients:
            return UNATTENDED_FACTOR * seconds
        if self._has_share or seconds <= SLOW_SLOT_SECONDS or isinstance(self._sink, WholeSink):
            return 0.0
        return seconds

    def cut_off(self) -> None:
        """Cancels the request. The fill requests the missing bytes again later.

        Also calls `Demand.give_up`, which ends the fill if all clients have left, in these two cases:

        - This request has received no new byte.
        - The fill has to begin again at the first byte (`WholeSink`).

        In both cases, the later request would begin at the same byte as this request. Without `give_up`, the same bytes
        could be requested and cut off again and again."""
        if not self._sink.new_bytes or isinstance(self._sink, WholeSink):
            self._demand.give_up()
        self.cancel()

    def cancel(self) -> None:
        """Cancels the request. The fill requests the missing bytes again."""
        if not self.cancel_scope.expired():
            self.cancel_scope.reschedule(asyncio.get_running_loop().time())
