"""Decides which slow download has to give up its connection slot, when other requests wait for a slot (`SlotHolders`).

A *connection slot* is a permit for one connection to an upstream (`registry.mirror.fill.slots`). Two kinds of downloads
could keep a slot for hours. A *pass-through* sends a blob to one client without storing it, and holds its slot while
this client receives the blob. A *fill* stores a blob, and the upstream may send the blob slowly. A fill is *unattended*
if all its clients have left; other fills are rarely cut off.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from storage.errors import RegistryError

SLOW_SLOT_SECONDS: Final = 15.0
"""Usual value of the *limit*: the seconds that a download may need for 256 KiB while another request waits for a
connection slot. A download that needs more is cut off. The value is less than the 25 s after which the other request
would fail."""
LONG_WAIT_SECONDS: Final = 10.0
"""Time that a request waits for a slot before the limit begins to fall from `SLOW_SLOT_SECONDS` to 0. So the request
gets the slot of the slowest download, even if that download is faster than `SLOW_SLOT_SECONDS` allows."""
LOWERING_SECONDS: Final = 6.0
"""Time in which the limit falls to 0. It falls in all processes at the same time, so the slowest download of all
processes is cut off first. `LONG_WAIT_SECONDS` and this time together are shorter than the 25 s after which the request
would fail."""
SLOW_POLL_SECONDS: Final = 0.25
"""Seconds between two checks whether a request waits for a slot. At most one download of a process is cut off in each
check, because the waiting request needs some milliseconds to take the slot."""


class SlotHolder(Protocol):
    """A pass-through, or a request of a fill, that holds a slot."""

    def slow_seconds(self) -> float:
        """Returns how many seconds the download needs for 256 KiB. For an unattended fill, returns a multiple of them,
        so that it is cut off sooner. Returns 0 if the download must not be cut off. That is so for a pass-through that
        is slow because of the upstream, not because of its client. It is also so for most fills for which a client
        waits; `RunningRequest.slow_seconds` gives the exceptions."""
        ...

    def cut_off(self) -> None:
        """Ends the pass-through or the request, so that it gives its slot back."""
        ...


class SlotHolders:
    """The downloads of one process that hold slots of one upstream."""

    def __init__(self, has_waiting_request: Callable[[], bool], has_long_waiting_request: Callable[[], bool]) -> None:
        """`has_waiting_request`: returns whether a request of any process waits for a slot. `has_long_waiting_request`:
        returns whether one has waited for `LONG_WAIT_SECONDS`. Both may raise a RegistryError."""
        self._has_waiting_request = has_waiting_request
        self._has_long_waiting_request = has_long_waiting_request
        self._holders: set[SlotHolder] = set()
        self._timer: asyncio.TimerHandle | None = None  # for the next call of `_check`
        self._lowering_since: float | None = None
        """The event loop's time since which the limit falls; None: it does not fall."""

    @contextmanager
    def holding(self, holder: SlotHolder) -> Iterator[None]:
        """Registers `holder` inside the `with` block, in which it holds a slot."""
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
        """Cuts off the slowest holder if a request waits and this holder is too slow."""
        self._timer = None
        if not self._holders:  # all were cut off, but have not left `holding` yet
            self._lowering_since = None
            return
        self._start_timer()
        slowest = max(self._holders, key=lambda holder: holder.slow_seconds())
        if not slowest.slow_seconds():
            # No holder may be cut off now. The next limit begins at `SLOW_SLOT_SECONDS` again.
            self._lowering_since = None
            return
        try:
            allowed_seconds = self._allowed_seconds()
        except RegistryError:
            return  # the requests that wait get the error themselves
        if allowed_seconds is None or slowest.slow_seconds() <= allowed_seconds:
            return
        if self._lowering_since is not None:  # the limit begins to fall again from `SLOW_SLOT_SECONDS`
            self._lowering_since = asyncio.get_running_loop().time()
        self._holders.discard(slowest)
        slowest.cut_off()

    def _allowed_seconds(self) -> float | None:
        """Returns the limit: how many seconds a download may need for 256 KiB now; None: no request waits, so there is
        no limit."""
        now = asyncio.get_running_loop().time()
        if not self._has_long_waiting_request():
            self._lowering_since = None
            return SLOW_SLOT_SECONDS if self._has_waiting_request() else None
        if self._lowering_since is None:
            self._lowering_since = now
        return SLOW_SLOT_SECONDS * max(0.0, 1.0 - (now - self._lowering_since) / LOWERING_SECONDS)
