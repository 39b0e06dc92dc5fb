"""What an application needs to serve pages.

- `Pages`: the files, the renderer and the limits. An application keeps one such object.
- `PageComponents`: the parts that pages need from the application's *service* (`registry.service_factory.Service`). A
  running application can replace its service.
- `PageLimits`: limits how many pages a process renders at a time, for all visitors together and for each visitor.
  Rendering a page costs more than a pull of a manifest. Without limits, one visitor with many tabs, or a program that
  follows all links, would slow the registry down.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Final

from registry.http.cross_site import CrossSiteCheck
from registry.naming import NamingRules
from registry.ui.page_files import PageFiles
from registry.ui.rendering import PageRenderer
from registry.visitor_limits import Limits, VisitorLimits
from storage.interface import Registry

MAX_RENDERED_PAGES: Final = 4
"""How many pages a process renders at a time."""
MAX_RENDERED_PAGES_PER_VISITOR: Final = 2
"""How many pages a process renders at a time for one visitor."""
MAX_PENDING_PAGES_PER_VISITOR: Final = 20
"""Largest number of *pending* pages (rendered now, or waiting to be rendered) of one visitor. A browser that restarts
with many tabs requests many pages at once."""
MAX_PENDING_PAGES: Final = 200
"""Largest number of pending pages of all visitors together."""
_FILES: Final = PageFiles()
"""The files for all applications of a process. A file is read when it is first needed."""


@dataclass(frozen=True, slots=True)
class PageComponents:
    """The parts of the service that the pages use.

    - `content`: the hosted and cached content in the store. It checks the rights of the visitor, sends no requests to
      upstreams, and refuses changes.
    - `naming`: says whether the name of a repository is hosted or mirrored.
    - `cross_site`: refuses requests that a page of another web site may have caused."""

    content: Registry
    naming: NamingRules
    cross_site: CrossSiteCheck


class PageLimits:
    """The limits of one process. A text identifies each visitor, such as the name of their account."""

    def __init__(self) -> None:
        self._limits = VisitorLimits(
            Limits(
                MAX_RENDERED_PAGES, MAX_RENDERED_PAGES_PER_VISITOR, MAX_PENDING_PAGES, MAX_PENDING_PAGES_PER_VISITOR
            ),
            "pages",
        )

    def rendering_slot(self, visitor: str) -> AbstractAsyncContextManager[None]:
        """Waits for a slot to render a page for the visitor, and holds it inside the `async with` block. Raises
        TooManyRequests if too many pages of the visitor, or of all visitors together, are pending. A cancellation
        releases the slot."""
        return self._limits.slot(visitor)


class Pages:
    """The files, the renderer and the limits with which an application serves pages. They stay when the application
    replaces its service."""

    def __init__(self) -> None:
        self.files = _FILES
        self.renderer = PageRenderer(self.files)
        self.limits = PageLimits()
        self._error_pages: dict[str, bytes] = {}  # by language
        self._rendering = asyncio.Lock()

    async def cached_error_page(self, language: str, values: Callable[[], Mapping[str, object]]) -> bytes:
        """Returns the cached error page in a language. Only one error page is cached for each language, so all calls
        must be for the same error. The first call for a language renders the page with the result of `values`. Later
        calls return the same page and do not call `values`, so the values of all calls must be equal."""
        async with self._rendering:
            if language not in self._error_pages:
                self._error_pages[language] = await self.renderer.render("error.html", language, values())
            return self._error_pages[language]
