"""Decides which slow download must give up its connection slot while a request waits for a slot (`SlotHolders`).

A *connection slot* is a permit for one connection to an upstream (`registry.mirror.fill.slots`). Two kinds of downloads
could keep a slot for hours:

- A *pass-through* sends a blob to one client without storing it. The client may receive the blob slowly.
- A *fill* stores a blob. The upstream may send the blob slowly. A fill for which a client waits is rarely cut off.

While a request waits for a slot, a download is cut off if it needs more seconds for 256 KiB than the *limit*. When a
request has waited for `LONG_WAIT_SECONDS`, the limit begins to fall from `SLOW_SLOT_SECONDS` to 0. The falling limit
first reaches the slowest download. So the slowest download is cut off even if it needs fewer seconds than
`SLOW_SLOT_SECONDS`. A request that gets no slot within 25 s fails.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from storage.errors import RegistryError

SLOW_SLOT_SECONDS: Final = 15.0
"""The limit before it begins to fall. It is less than the 25 s after which a waiting request fails."""
LONG_WAIT_SECONDS: Final = 10.0
"""Time that a request waits for a slot before the limit begins to fall."""
LOWERING_SECONDS: Final = 6.0
"""Time in which the limit falls to 0. Each process with downloads checks every `SLOW_POLL_SECONDS` whether a request of
any process has waited for `LONG_WAIT_SECONDS`. So the limit begins to fall in all these processes at almost the same
time, and the slowest download of all processes is cut off first. `LONG_WAIT_SECONDS` and `LOWERING_SECONDS` together
are less than 25 s."""
SLOW_POLL_SECONDS: Final = 0.25
"""Time between two checks whether a request waits for a slot. Each check cuts off at most one download of a process,
because the waiting request needs some milliseconds to take the slot."""


class SlotHolder(Protocol):
    """A download that holds a slot: a pass-through, or one request of a fill."""

    def slowness(self) -> float:
        """Returns how many seconds the download needs for 256 KiB, or 0 if the download must not be cut off:

        - A pass-through returns 0 if the upstream is slower than the client.
        - A fill for which a client waits returns 0 in most cases (`RunningRequest.slowness`).
        - A fill for which no client waits returns a multiple of the real seconds, so that it is cut off sooner."""
        ...

    def cut_off(self) -> None:
        """Ends the download, which then gives its slot back."""
        ...


class SlotHolders:
    """The downloads of one process that hold slots of one upstream."""

    def __init__(self, has_waiting_request: Callable[[], bool], has_long_waiting_request: Callable[[], bool]) -> None:
        """`has_waiting_request`: returns whether a request of any process waits for a slot. `has_long_waiting_request`:
        returns whether a request of any process has waited for `LONG_WAIT_SECONDS`. Both may raise a RegistryError."""
        self._has_waiting_request = has_waiting_request
        self._has_long_waiting_request = has_long_waiting_request
        self._holders: set[SlotHolder] = set()
        self._timer: asyncio.TimerHandle | None = None  # for the next call of `_check`
        self._lowering_since: float | None = None
        """Time at which the limit began to fall, in seconds of the event loop's clock. None: the limit is
        `SLOW_SLOT_SECONDS`."""

    @contextmanager
    def holding(self, holder: SlotHolder) -> Iterator[None]:
        """Registers `holder` as a holder of a slot until the `with` block ends."""
        self._holders.add(holder)
        if self._timer is None:
            self._start_timer()
        try:
            yield
        finally:
            self._holders.discard(holder)
            if not self._holders and self._timer is not None:
                self._timer.cancel()
                self._timer = self._lowering_since = None

    def _start_timer(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(SLOW_POLL_SECONDS, self._check)

    def _check(self) -> None:
        """If a request waits for a slot, cuts off the slowest holder if it is slower than the limit allows."""
        self._timer = None
        if not self._holders:  # all holders were cut off, but have not yet left `holding`
            self._lowering_since = None
            return
        self._start_timer()
        slowest = max(self._holders, key=lambda holder: holder.slowness())
        if not slowest.slowness():
            # No holder may be cut off now, so the limit goes back to `SLOW_SLOT_SECONDS`.
            self._lowering_since = None
            return
        try:
            limit_seconds = self._limit_seconds()
        except RegistryError:
            return  # the waiting requests report the error
        if limit_seconds is None or slowest.slowness() <= limit_seconds:
            return
        if self._lowering_since is not None:  # the limit goes back to `SLOW_SLOT_SECONDS` and falls again
            self._lowering_since = asyncio.get_running_loop().time()
        self._holders.discard(slowest)
        slowest.cut_off()

    def _limit_seconds(self) -> float | None:
        """Returns the present limit in seconds. Returns None if no request waits. Raises the errors of
        `has_waiting_request` and `has_long_waiting_request`."""
        now = asyncio.get_running_loop().time()
        if not self._has_long_waiting_request():
            self._lowering_since = None
            return SLOW_SLOT_SECONDS if self._has_waiting_request() else None
        if self._lowering_since is None:
            self._lowering_since = now
        return SLOW_SLOT_SECONDS * max(0.0, 1.0 - (now - self._lowering_since) / LOWERING_SECONDS)
