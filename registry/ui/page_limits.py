"""`PageLimits`: limits how many pages a process renders at a time, for all visitors together and for each visitor.

A page costs more than a pull of a manifest: it reads several things, and renders them. Without a limit, one visitor
with many tabs, or a program that follows all links, would slow the registry down.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Final

from registry.visitor_limits import Limits, VisitorLimits

MAX_RENDERED_PAGES: Final = 4
"""How many pages a process renders at a time."""
MAX_RENDERED_PAGES_PER_VISITOR: Final = 2
"""How many pages a process renders at a time for one visitor."""
MAX_PENDING_PAGES_PER_VISITOR: Final = 20
"""How many pages of one visitor may be rendered or wait. A browser that restarts with many tabs requests many at
once."""
MAX_PENDING_PAGES: Final = 200
"""How many pages of all visitors together may be rendered or wait."""


class PageLimits:
    """The limits of one process. A text identifies each visitor, such as the name of their account."""

    def __init__(self) -> None:
        self._limits = VisitorLimits(
            Limits(
                MAX_RENDERED_PAGES, MAX_RENDERED_PAGES_PER_VISITOR, MAX_PENDING_PAGES, MAX_PENDING_PAGES_PER_VISITOR
            ),
            "pages",
        )

    def page(self, visitor: str) -> AbstractAsyncContextManager[None]:
        """Waits for a slot to render a page for the visitor, and holds it inside the `async with` block. Raises
        TooManyRequests if too many pages of the visitor, or of all visitors, are being rendered or wait already. A
        cancellation releases the slot."""
        return self._limits.slot(visitor)
