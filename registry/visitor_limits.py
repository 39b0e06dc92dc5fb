"""`VisitorLimits`: limits how many pages and similar answers a process makes at the same time, in total and for each
visitor.

A page, or an answer with the details of an image, needs more time than a pull of a manifest, because it reads more from
the store. Without limits, one visitor with many browser tabs, or a program that follows all links, would slow the
registry down.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from storage.errors import TooManyRequests

_RETRY_SECONDS: Final = 2
"""The value of Retry-After in a refusal."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one process. A *piece of work* makes one page or answer. It is *running* while it is in progress,
    and *pending* while it waits or is in progress. `max_running`, `max_pending`: largest number of running and of
    pending pieces. `max_running_per_visitor`, `max_pending_per_visitor`: the same for one visitor."""

    max_running: int
    max_running_per_visitor: int
    max_pending: int
    max_pending_per_visitor: int


class _Visitor:
    """The work for one visitor. `pieces`: number of pieces of work that are in progress or wait. `slots`: each piece in
    progress holds one."""

    def __init__(self, max_running: int) -> None:
        self.pieces = 0
        self.slots = asyncio.Semaphore(max_running)


class VisitorLimits:
    """Applies the limits in one process. A text identifies each visitor, such as the name of the account."""

    def __init__(self, limits: Limits, what: str) -> None:
        """`what`: a plural noun for the pieces of work, such as "pages", for the text of the error."""
        self._limits = limits
        self._what = what
        self._slots = asyncio.Semaphore(limits.max_running)
        self._visitors: dict[str, _Visitor] = {}
        self._pieces = 0

    @property
    def pending(self) -> int:
        """The number of pieces of work that are in progress or wait."""
        return self._pieces

    @asynccontextmanager
    async def slot(self, visitor: str) -> AsyncIterator[None]:
        """Waits until the process may do a piece of work for the visitor, and holds a slot for it inside the `async
        with` block. Raises TooManyRequests if too many pieces of work, for the visitor or for all visitors, are in
        progress or wait already. A cancellation gives the slot back."""
        entry = self._visitors.setdefault(visitor, _Visitor(self._limits.max_running_per_visitor))
        if entry.pieces >= self._limits.max_pending_per_visitor or self._pieces >= self._limits.max_pending:
            self._forget_if_idle(visitor, entry)
            raise TooManyRequests(f"too many {self._what} are being made; wait a moment", retry_after=_RETRY_SECONDS)
        entry.pieces += 1
        self._pieces += 1
        try:
            # The visitor's slot comes first: work that waits for it must not hold a slot of the process.
            async with entry.slots, self._slots:
                yield
        finally:
            entry.pieces -= 1
            self._pieces -= 1
            self._forget_if_idle(visitor, entry)

    def _forget_if_idle(self, visitor: str, entry: _Visitor) -> None:
        if not entry.pieces:
            self._visitors.pop(visitor, None)
