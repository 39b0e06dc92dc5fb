"""Decides which slow download has to give up its connection slot, when other requests wait for a slot (`SlotHolders`).

A *connection slot* is a permit for one connection to an upstream (`registry.mirror.fill.slots`). Two kinds of downloads
could keep a slot for hours. A *pass-through* sends a blob to one client without storing it, and holds its slot while
this client receives the blob. An *unattended* fill stores a blob whose clients have all left, and the upstream may send
the blob slowly.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from storage.errors import RegistryError

SLOW_SLOT_SECONDS: Final = 15.0
"""While another request waits for a connection slot, a download that takes longer than this for 256 KiB is cut off. It
is shorter than the 25 s after which the other request would fail."""
LONG_WAIT_SECONDS: Final = 10.0
"""A request that has waited for a slot for this long gets the slot of the slowest download, also if this is faster than
`SLOW_SLOT_SECONDS` says."""
LOWERING_SECONDS: Final = 6.0
"""Time in which the allowed seconds for 256 KiB fall from `SLOW_SLOT_SECONDS` to 0, while a request waits for a long
time. All processes begin at the same moment, so the download that is slowest over all processes is cut off first. The
sum with `LONG_WAIT_SECONDS` is shorter than the 25 s after which the request would fail."""
SLOW_POLL_SECONDS: Final = 0.25
"""Seconds between two checks whether a request waits for a slot. At most one download of a process is cut off in each
check, because the waiting request needs some milliseconds to take the slot."""


class SlotHolder(Protocol):
    """A pass-through, or a request of a fill, that holds a slot."""

    def slow_seconds(self) -> float:
        """Returns how many seconds the download needs for 256 KiB. Returns 0 if it must not be cut off: if a client
        waits for a fill, or if a pass-through is slow because of the upstream and not of its client."""
        ...

    def cut_off(self) -> None:
        """Ends the pass-through or the request, so that it gives its slot back."""
        ...


class SlotHolders:
    """The downloads of one process that hold slots of one upstream."""

    def __init__(self, is_waited_for: Callable[[], bool], is_waited_for_long: Callable[[], bool]) -> None:
        """`is_waited_for`: returns whether a request of any process waits for a slot. `is_waited_for_long`: returns
        whether one has waited for `LONG_WAIT_SECONDS`. Both may raise a RegistryError."""
        self._is_waited_for = is_waited_for
        self._is_waited_for_long = is_waited_for_long
        self._holders: set[SlotHolder] = set()
        self._timer: asyncio.TimerHandle | None = None  # for the next call of `_check`
        self._lowering_since: float | None = None
        """The event loop's time since which the allowed seconds fall; None: no request has waited for long."""

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
        if not slowest.slow_seconds():  # none may be cut off; later, the seconds fall from `SLOW_SLOT_SECONDS` again
            self._lowering_since = None
            return
        try:
            allowed_seconds = self._allowed_seconds()
        except RegistryError:
            return  # the requests that wait get the error themselves
        if allowed_seconds is None or slowest.slow_seconds() <= allowed_seconds:
            return
        if self._lowering_since is not None:  # the allowed seconds begin to fall again from `SLOW_SLOT_SECONDS`
            self._lowering_since = asyncio.get_running_loop().time()
        self._holders.discard(slowest)
        slowest.cut_off()

    def _allowed_seconds(self) -> float | None:
        """Returns how many seconds a download may need for 256 KiB now; None: any number, as no request waits."""
        now = asyncio.get_running_loop().time()
        if not self._is_waited_for_long():
            self._lowering_since = None
            return SLOW_SLOT_SECONDS if self._is_waited_for() else None
        if self._lowering_since is None:
            self._lowering_since = now
        return SLOW_SLOT_SECONDS * max(0.0, 1.0 - (now - self._lowering_since) / LOWERING_SECONDS)
