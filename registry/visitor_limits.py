"""`VisitorLimits`: how much work for people a process does at a time, in all and for one visitor.

A page, or an answer with the details of an image, costs more than a pull of a manifest: it reads several things.
Without limits, one visitor with many tabs, or a program that follows all links, would slow the registry down.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from storage.errors import TooManyRequests

_RETRY_SECONDS: Final = 2


@dataclass(frozen=True, slots=True)
class Limits:
    """How many pieces of work a process does. `at_once`: at a time; `at_once_for_one`: of these, for one visitor.
    `waiting` and `waiting_for_one`: how many may be done or wait."""

    at_once: int
    at_once_for_one: int
    waiting: int
    waiting_for_one: int


class _Visitor:
    """The work for one visitor that is being done or waits: its amount, and its slots."""

    def __init__(self, at_once: int) -> None:
        self.pieces = 0
        self.slots = asyncio.Semaphore(at_once)


class VisitorLimits:
    """Applies the limits in one process. A text identifies each visitor, such as the name of the account."""

    def __init__(self, limits: Limits, what: str) -> None:
        """`what`: the work, in the plural, for the text of the error."""
        self._limits = limits
        self._what = what
        self._slots = asyncio.Semaphore(limits.at_once)
        self._visitors: dict[str, _Visitor] = {}
        self._pieces = 0

    @asynccontextmanager
    async def slot(self, visitor: str) -> AsyncIterator[None]:
        """Waits until the process may work for the visitor, and holds the slot. Raises TooManyRequests if too much work
        for the visitor, or for all visitors, waits already. A cancellation gives the slot back."""
        entry = self._visitors.setdefault(visitor, _Visitor(self._limits.at_once_for_one))
        if entry.pieces >= self._limits.waiting_for_one or self._pieces >= self._limits.waiting:
            self._forget_if_idle(visitor, entry)
            raise TooManyRequests(f"too many {self._what} are being made; wait a moment", retry_after=_RETRY_SECONDS)
        entry.pieces += 1
        self._pieces += 1
        try:
            async with entry.slots, self._slots:
                yield
        finally:
            entry.pieces -= 1
            self._pieces -= 1
            self._forget_if_idle(visitor, entry)

    def _forget_if_idle(self, visitor: str, entry: _Visitor) -> None:
        if not entry.pieces:
            self._visitors.pop(visitor, None)
