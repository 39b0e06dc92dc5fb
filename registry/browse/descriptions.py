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
"""How many descriptions a process renders at a time, and how many may wait to be rendered. A rendering keeps a
processor busy for up to 0.5 seconds."""
_MAX_CACHED_BYTES: Final = 8 * 1024 * 1024
"""Approximate limit of the memory for the cached HTML of descriptions. The HTML of one description takes up to 6 MiB;
usually, it takes a few kilobytes."""
_OBJECT_BYTES: Final = 256
"""The memory that a cached description takes in addition to its HTML, approximately."""


class DescriptionPages:
    """Reads, changes and renders descriptions. The caller must check that the visitor may read or change them.

    A process renders one description at a time, in a thread. The methods that render have the argument `visitor`, a
    text that identifies the visitor who gets the result. They raise TooManyRequests if too many descriptions wait to be
    rendered."""

    def __init__(self, descriptions: Descriptions) -> None:
        self._descriptions = descriptions
        self._rendered = ByteLimitedCache["RenderedText"](
            _MAX_CACHED_BYTES, lambda rendered: sys.getsizeof(rendered.html) + _OBJECT_BYTES
        )
        self.rendering_limits = VisitorLimits(_RENDERING_LIMITS, "descriptions")

    async def read(self, repo: RepositoryName) -> Description | None:
        """Returns the description of a repository; None if nobody has written one. Renders nothing."""
        return await self._descriptions.find_description(repo)

    async def view(
        self, repo: RepositoryName, description: Description | None, visitor: str, top_heading: int = 1
    ) -> DescriptionView:
        """Returns the `description` of a repository with its HTML. `description`: None if nobody has written one.
        `top_heading`: the level of the highest headings in the HTML."""
        if description is None:
            return DescriptionView(text="", html="", formatted=True, revision=0, changed=None, changed_by=None)
        key = repo, description.revision, top_heading
        rendered = self._rendered.get(key)
        if rendered is None:
            async with self.rendering_limits.slot(visitor):
                rendered = self._rendered.get(key)  # another call may have rendered it meanwhile
                if rendered is None:
                    rendered = self._rendered.put(key, await _render(description.text, top_heading))
        return _description_view(description, rendered)

    async def put(
        self, repo: RepositoryName, text: str, revision: int | None, by: Actor, visitor: str, top_heading: int = 1
    ) -> DescriptionView:
        """Replaces the description of a repository with `text`, and returns it as `view` does. Raises RequestInvalid if
        `text` is too long or cannot be encoded as UTF-8.

        - `revision`: if the stored description has another revision, raises PreconditionFailed. None: the revision is
          not checked.
        - `top_heading`: the level of the highest headings in the HTML. Calls of `view` with the same `top_heading` find
          the HTML in the cache."""
        _check_text(text)
        # Renders before it stores, so that the stored description does not change if the rendering is refused.
        async with self.rendering_limits.slot(visitor):
            rendered = await _render(text, top_heading)
        description = await self._descriptions.put_description(repo, text, by=by, revision=revision)
        rendered = self._rendered.put((repo, description.revision, top_heading), rendered)
        return _description_view(description, rendered)

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
    """Renders a description in a thread. If the caller is cancelled, ends only when the thread has finished, so that
    the caller keeps its slot of `rendering_limits` until then."""
    return await finish_in_thread(partial(_render_now, text, top_heading))


def _render_now(text: str, top_heading: int) -> RenderedText:
    # Imported only when the first description is rendered, because most servers never show one.
    from registry.browse.markdown_rendering import render_markdown

    return render_markdown(text, top_heading)


def _description_view(description: Description, rendered: RenderedText) -> DescriptionView:
    return DescriptionView(
        text=description.text,
        html=rendered.html,
        formatted=rendered.is_fully_formatted,
        revision=description.revision,
        changed=utc_time(description.at),
        changed_by=description.actor,
    )
