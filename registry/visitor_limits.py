"""`VisitorLimits`: limits how many operations a process runs at the same time, in total and for each visitor. An
*operation* makes one costly response, such as a page.

The limits keep a visitor that sends many requests, such as a program that follows all links, from slowing the registry
down.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from storage.errors import TooManyRequests

_RETRY_SECONDS: Final = 2
"""The value of the header Retry-After when an operation is refused."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one process. An operation is *pending* until it ends: while it waits until it may run, and also
    while it runs.

    - `max_running`: largest number of running operations.
    - `max_running_per_visitor`: largest number of running operations of one visitor.
    - `max_pending`: largest number of pending operations.
    - `max_pending_per_visitor`: largest number of pending operations of one visitor."""

    max_running: int
    max_running_per_visitor: int
    max_pending: int
    max_pending_per_visitor: int


class _Visitor:
    """Counts the operations of one visitor. `pending`: number of pending operations. `slots`: each running operation
    holds one of these slots."""

    def __init__(self, max_running: int) -> None:
        self.pending = 0
        self.slots = asyncio.Semaphore(max_running)


class VisitorLimits:
    """Applies the limits in one process. A visitor is identified by a text, such as the name of the account."""

    def __init__(self, limits: Limits, plural_noun: str) -> None:
        """`plural_noun`: the word for what the operations make, such as "pages". The error text contains it."""
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
        """Waits until the visitor may run an operation, and holds a slot for it inside the `async with` block. Raises
        TooManyRequests if the visitor, or all visitors together, already have the largest number of pending operations.
        A cancellation gives the slot back."""
        entry = self._visitors.setdefault(visitor, _Visitor(self._limits.max_running_per_visitor))
        if entry.pending >= self._limits.max_pending_per_visitor or self._pending >= self._limits.max_pending:
            self._forget_if_idle(visitor, entry)
            message = f"too many {self._plural_noun} are being made; wait a moment"
            raise TooManyRequests(message, retry_after=_RETRY_SECONDS)
        entry.pending += 1
        self._pending += 1
        try:
            # The visitor's slot comes first. An operation that waits for this slot must not hold a slot of the process.
            async with entry.slots, self._slots:
                yield
        finally:
            entry.pending -= 1
            self._pending -= 1
            self._forget_if_idle(visitor, entry)

    def _forget_if_idle(self, visitor: str, entry: _Visitor) -> None:
        if not entry.pending:
            self._visitors.pop(visitor, None)
