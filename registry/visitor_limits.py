"""`VisitorLimits`: limits how many operations a process runs at the same time, in total and for each visitor. An
*operation* makes one page or one similar answer.

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
    """The limits of one process. A *pending* operation runs, or waits until it may run. `max_running`, `max_pending`:
    largest numbers of running and of pending operations. `max_running_per_visitor`, `max_pending_per_visitor`: the
    largest numbers of these operations for one visitor."""

    max_running: int
    max_running_per_visitor: int
    max_pending: int
    max_pending_per_visitor: int


class _Visitor:
    """The operations of one visitor. `pending`: number of pending operations. `slots`: each running operation holds one
    of these slots."""

    def __init__(self, max_running: int) -> None:
        self.pending = 0
        self.slots = asyncio.Semaphore(max_running)


class VisitorLimits:
    """Applies the limits in one process. A text identifies each visitor, such as the name of the account."""

    def __init__(self, limits: Limits, plural_noun: str) -> None:
        """`plural_noun`: what the operations make, such as "pages", for the text of the error."""
        self._limits = limits
        self._plural_noun = plural_noun
        self._slots = asyncio.Semaphore(limits.max_running)
        self._visitors: dict[str, _Visitor] = {}
        self._pending = 0

    @property
    def pending(self) -> int:
        """The number of pending operations."""
        return self._pending

    @asynccontextmanager
    async def slot(self, visitor: str) -> AsyncIterator[None]:
        """Waits until the process may run an operation for the visitor. The operation runs, and holds a slot, inside
        the `async with` block. Raises TooManyRequests if the visitor, or all visitors together, already have the
        largest number of pending operations. A cancellation gives the slot back."""
        entry = self._visitors.setdefault(visitor, _Visitor(self._limits.max_running_per_visitor))
        if entry.pending >= self._limits.max_pending_per_visitor or self._pending >= self._limits.max_pending:
            self._forget_if_idle(visitor, entry)
            message = f"too many {self._plural_noun} are being made; wait a moment"
            raise TooManyRequests(message, retry_after=_RETRY_SECONDS)
        entry.pending += 1
        self._pending += 1
        try:
            # The visitor's slot comes first: an operation that waits for it must not hold a slot of the process.
            async with entry.slots, self._slots:
                yield
        finally:
            entry.pending -= 1
            self._pending -= 1
            self._forget_if_idle(visitor, entry)

    def _forget_if_idle(self, visitor: str, entry: _Visitor) -> None:
        if not entry.pending:
            self._visitors.pop(visitor, None)
