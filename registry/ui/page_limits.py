"""`PageLimits`: how many pages a process makes at a time, in all and for one visitor.

A page costs more than a pull of a manifest: it reads several things, and renders them. Without a limit, one visitor
with many tabs, or a program that follows all links, would slow the registry down.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Final

from registry.visitor_limits import Limits, VisitorLimits

AT_ONCE: Final = 4
"""How many pages a process makes at a time."""
AT_ONCE_FOR_ONE: Final = 2
"""How many of them may be for one visitor."""
WAITING_FOR_ONE: Final = 20
"""How many pages of one visitor may be made or wait. A browser that opens again with many tabs needs some."""
WAITING: Final = 200
"""How many pages of all visitors may be made or wait."""


class PageLimits:
    """The limits of one process. Visitors are told apart by a text, such as the name of their account."""

    def __init__(self) -> None:
        self._limits = VisitorLimits(Limits(AT_ONCE, AT_ONCE_FOR_ONE, WAITING, WAITING_FOR_ONE), "pages")

    def page(self, visitor: str) -> AbstractAsyncContextManager[None]:
        """Waits until the process may make another page for the visitor, and holds the slot. Raises TooManyRequests if
        too many pages of the visitor, or of all visitors, wait already. A cancellation gives the slot back."""
        return self._limits.slot(visitor)
