"""Reads, changes and renders the descriptions of repositories (`DescriptionPages`). People write them in Markdown.
`registry.browse.markdown_rendering` renders them as HTML that is safe on a page of this registry."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Final

from registry.browse.byte_limited_cache import ByteLimitedCache
from registry.browse.models import DescriptionView, utc_time
from registry.request import RequestInvalid
from registry.single_flight import finish_in_thread
from registry.visitor_limits import Limits, VisitorLimits
from storage.content import Actor
from storage.descriptions import MAX_DESCRIPTION_BYTES, Description, Descriptions
from storage.names import RepositoryName

if TYPE_CHECKING:
    from registry.browse.markdown_rendering import RenderedText

_RENDERING_LIMITS: Final = Limits(max_running=1, max_running_per_visitor=1, max_pending=200, max_pending_per_visitor=20)
"""How many descriptions a process renders at a time, and how many may wait. A *slot* is the permit to render. A
rendering keeps a processor busy for up to 0.5 seconds."""
_MAX_CACHED_BYTES: Final = 8 * 1024 * 1024
"""Roughly how many bytes of memory the cached HTML of descriptions may take. One description takes up to 6 MiB, most
take a few kilobytes."""
_OBJECT_BYTES: Final = 256
"""The memory that a cached description takes in addition to its HTML, approximately."""


class DescriptionPages:
    """Reads and changes descriptions. The caller has checked that the visitor may do so.

    A process renders one description at a time, in a thread. `visitor` is a text that identifies the visitor who gets
    the result. The methods that render raise TooManyRequests if too many descriptions wait to be rendered."""

    def __init__(self, descriptions: Descriptions) -> None:
        self._descriptions = descriptions
        self._rendered = ByteLimitedCache["RenderedText"](
            _MAX_CACHED_BYTES, lambda rendered: sys.getsizeof(rendered.html) + _OBJECT_BYTES
        )
        self.rendering_limits = VisitorLimits(_RENDERING_LIMITS, "descriptions")

    async def read(self, repo: RepositoryName) -> Description | None:
        """Returns the description of a repository; None if nobody has written one. Renders nothing."""
        return await self._descriptions.description(repo)

    async def view(
        self, repo: RepositoryName, description: Description | None, visitor: str, top_heading: int = 1
    ) -> DescriptionView:
        """Returns a description of the repository with its HTML. `description`: None if nobody has written one.
        `top_heading`: the level of the highest headings in the HTML."""
        if description is None:
            return DescriptionView(text="", html="", formatted=True, revision=0, changed=None, changed_by=None)
        key = repo, description.revision, top_heading
        rendered = self._rendered.get(key)
        if rendered is None:
            async with self.rendering_limits.slot(visitor):
                rendered = self._rendered.get(key)  # it may have been rendered during the wait
                if rendered is None:
                    rendered = self._rendered.keep(key, await _render(description.text, top_heading))
        return _view(description, rendered)

    async def put(
        self, repo: RepositoryName, text: str, revision: int | None, by: Actor, visitor: str, top_heading: int = 1
    ) -> DescriptionView:
        """Replaces a description, and returns it as `view` does. `revision`: the revision that the description must
        still have; None: not checked. `top_heading`: the level of the highest headings in the HTML. The cached HTML
        serves only calls of `view` with the same `top_heading`, so pass the value that the next call of `view` is
        likely to have. Raises RequestInvalid if the text is too long or is not UTF-8, and PreconditionFailed if the
        revision differs."""
        _check_text(text)
        # The text is rendered first, so that the stored description does not change if the rendering is refused.
        async with self.rendering_limits.slot(visitor):
            rendered = await _render(text, top_heading)
        description = await self._descriptions.put_description(repo, text, by=by, revision=revision)
        return _view(description, self._rendered.keep((repo, description.revision, top_heading), rendered))

    async def preview(self, text: str, visitor: str, top_heading: int = 1) -> RenderedText:
        """Renders a text as `view` renders a description. Raises RequestInvalid in the same cases as `put`."""
        _check_text(text)
        async with self.rendering_limits.slot(visitor):
            return await _render(text, top_heading)


def _check_text(text: str) -> None:
    """Raises RequestInvalid if a description cannot have this text."""
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError:
        raise RequestInvalid("the description has half of a surrogate pair, which is not a character") from None
    if size > MAX_DESCRIPTION_BYTES:
        raise RequestInvalid(f"the description has {size} bytes; at most {MAX_DESCRIPTION_BYTES} are accepted")


async def _render(text: str, top_heading: int = 1) -> RenderedText:
    """Renders a description in a thread. If the caller is cancelled, ends only when the thread has finished. A thread
    cannot be stopped, and the caller's slot must not become free while the thread runs."""
    return await finish_in_thread(partial(_render_now, text, top_heading))


def _render_now(text: str, top_heading: int) -> RenderedText:
    # Imported only when the first description is rendered, because most servers never show one.
    from registry.browse.markdown_rendering import render_markdown

    return render_markdown(text, top_heading)


def _view(description: Description, rendered: RenderedText) -> DescriptionView:
    return DescriptionView(
        text=description.text,
        html=rendered.html,
        formatted=rendered.is_fully_formatted,
        revision=description.revision,
        changed=utc_time(description.at),
        changed_by=description.actor,
    )
