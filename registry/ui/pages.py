"""`Pages`: what an application keeps to make pages with. `PageComponents`: what pages need of the service that serves
requests now."""

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
    """What pages need of a service.

    - `content`: the content that is stored here, hosted and cached. It checks the rights of the visitor, sends no
      upstream requests, and refuses changes.
    - `naming`: tells hosted and mirrored names apart.
    - `cross_site`: refuses requests that a page of another site makes a browser send, while there are no accounts."""

    content: Registry
    naming: NamingRules
    cross_site: CrossSiteCheck


_FILES: Final = PageFiles()
"""All applications of a process share the files, which are read when they are first needed."""


class Pages:
    """What an application keeps to make pages with, as long as it runs."""

    def __init__(self) -> None:
        self.files = _FILES
        self.renderer = PageRenderer(self.files)
        self.limits = PageLimits()
        self._standing: dict[str, bytes] = {}
        self._making = asyncio.Lock()

    async def standing_page(self, language: str, values: Callable[[], Mapping[str, object]]) -> bytes:
        """Returns the error page with these values, which is rendered once for each language."""
        async with self._making:
            if language not in self._standing:
                self._standing[language] = await self.renderer.render("error.html", language, values())
            return self._standing[language]
