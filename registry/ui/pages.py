"""`Pages`: the files, the renderer and the limits with which an application serves pages. `PageComponents`: what pages
use of the application's *service* (`registry.service_factory.Service`). An application can replace its service while it
runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from registry.http.cross_site import CrossSiteCheck
from registry.naming import NamingRules
from registry.ui.page_files import PageFiles
from registry.ui.page_limits import PageLimits
from registry.ui.rendering import PageRenderer
from storage.interface import Registry


@dataclass(frozen=True, slots=True)
class PageComponents:
    """The parts of the service that the pages use.

    - `content`: the hosted and cached content in the store. It checks the rights of the visitor, sends no requests to
      upstreams, and refuses changes.
    - `naming`: says whether the name of a repository is hosted or mirrored.
    - `cross_site`: refuses requests that a page of another site may have made a browser send."""

    content: Registry
    naming: NamingRules
    cross_site: CrossSiteCheck


_FILES: Final = PageFiles()
"""The files for all applications of a process. They are read when they are first needed."""


class Pages:
    """The files, the renderer and the limits with which an application serves pages. An application has one such object
    for all its services."""

    def __init__(self) -> None:
        self.files = _FILES
        self.renderer = PageRenderer(self.files)
        self.limits = PageLimits()
        self._error_pages: dict[str, bytes] = {}  # by language
        self._rendering = asyncio.Lock()

    async def cached_error_page(self, language: str, values: Callable[[], Mapping[str, object]]) -> bytes:
        """Returns the error page with the values that `values` returns. Caches one page for each language, and
        returns it for every later call. So use this for one error only, whose page always has the same values."""
        async with self._rendering:
            if language not in self._error_pages:
                self._error_pages[language] = await self.renderer.render("error.html", language, values())
            return self._error_pages[language]
