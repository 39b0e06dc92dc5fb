"""`PageLimits`: how many pages a process makes at a time, in all and for one visitor.

A page costs more than a pull of a manifest: it reads several things, and renders them. Without a limit, one visitor
with many tabs, or a program that follows all links, would slow the registry down.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from storage.errors import TooManyRequests

AT_ONCE: Final = 4
"""How many pages a process makes at a time."""
AT_ONCE_FOR_ONE: Final = 2
"""How many of them may be for one visitor."""
WAITING_FOR_ONE: Final = 20
"""How many pages of one visitor may be made or wait. A browser that opens again with many tabs needs some."""
WAITING: Final = 200
"""How many pages of all visitors may be made or wait."""
_RETRY_SECONDS: Final = 2


class _Visitor:
    """The pages of one visitor that are being made or wait: their number, and their slots."""

    def __init__(self) -> None:
        self.pages = 0
        self.slots = asyncio.Semaphore(AT_ONCE_FOR_ONE)


class PageLimits:
    """The limits of one process. Visitors are told apart by a text, such as the name of their account."""

    def __init__(self) -> None:
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._visitors: dict[str, _Visitor] = {}
        self._pages = 0

    @asynccontextmanager
    async def page(self, visitor: str) -> AsyncIterator[None]:
        """Waits until the process may make another page for the visitor, and holds the slot. Raises TooManyRequests if
        too many pages of the visitor, or of all visitors, wait already. A cancellation gives the slot back."""
        entry = self._visitors.setdefault(visitor, _Visitor())
        if entry.pages >= WAITING_FOR_ONE or self._pages >= WAITING:
            self._forget_if_idle(visitor, entry)
            raise TooManyRequests("too many pages are being made; wait a moment", retry_after=_RETRY_SECONDS)
        entry.pages += 1
        self._pages += 1
        try:
            async with entry.slots, self._slots:
                yield
        finally:
            entry.pages -= 1
            self._pages -= 1
            self._forget_if_idle(visitor, entry)

    def _forget_if_idle(self, visitor: str, entry: _Visitor) -> None:
        if not entry.pages:
            self._visitors.pop(visitor, None)
