"""Reads, changes and renders the descriptions of repositories (`DescriptionPages`). People write them in Markdown. They
are rendered as HTML that is safe on a page of this registry.

Two libraries make the HTML safe, one after the other. markdown-it-py escapes HTML in the text, and nh3 removes all but
a few elements and attributes from the result. Images become links, because a page may not load anything from other
hosts.
"""

from __future__ import annotations

import asyncio
import html
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

from registry.browse.models import DescriptionView, utc_time
from registry.request import RequestInvalid
from registry.single_flight import finish_in_thread
from storage.content import Actor
from storage.descriptions import MAX_DESCRIPTION_BYTES, Description, Descriptions
from storage.names import RepositoryName

if TYPE_CHECKING:
    from markdown_it.token import Token

_MAX_CACHED: Final = 16
"""How many rendered descriptions are cached in memory."""
_MAX_RENDERED_CHARACTERS: Final = 64 * 1024
"""How many characters of a description are rendered. The rest is shown as plain text, because rendering takes up to 30
µs for each character."""
_MAX_NESTING: Final = 20
"""How many levels of nested lists and quotes are rendered. Deeper ones are shown as text."""
# The HTML elements, their attributes and the URL schemes that may remain in the rendered HTML.
_TAGS: Final = frozenset(
    {
        *("a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p"),
        *("pre", "s", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul"),
    }
)
_ATTRIBUTES: Final = {"a": {"href", "title"}, "ol": {"start"}}
_SCHEMES: Final = frozenset({"http", "https", "mailto"})
_LINK_REL: Final = "nofollow noreferrer"


class DescriptionPages:
    """Reads and changes descriptions. The caller has checked that the visitor may do so."""

    def __init__(self, descriptions: Descriptions) -> None:
        self._descriptions = descriptions
        self._rendered: OrderedDict[tuple[str, int], str] = OrderedDict()
        self._render_lock = asyncio.Lock()
        """Held while a description is rendered, which happens in a thread."""

    async def read(self, repo: RepositoryName) -> DescriptionView:
        """Returns the description of a repository; an empty description if nobody has written one."""
        return await self._view(repo, await self._descriptions.description(repo))

    async def put(self, repo: RepositoryName, text: str, revision: int | None, by: Actor) -> DescriptionView:
        """Replaces a description. Raises RequestInvalid if the text is too long, or is not UTF-8."""
        _check(text)
        return await self._view(repo, await self._descriptions.put_description(repo, text, by=by, revision=revision))

    async def preview(self, text: str) -> str:
        """Returns the HTML that a description with this text would have. Raises RequestInvalid in the same cases as
        `put`."""
        _check(text)
        async with self._render_lock:
            return await finish_in_thread(partial(render_markdown, text))

    async def _view(self, repo: RepositoryName, description: Description | None) -> DescriptionView:
        if description is None:
            return DescriptionView(text="", html="", revision=0, changed=None, changed_by=None)
        return DescriptionView(
            text=description.text,
            html=await self._render((repo, description.revision), description.text),
            revision=description.revision,
            changed=utc_time(description.at),
            changed_by=description.actor,
        )

    async def _render(self, key: tuple[str, int], text: str) -> str:
        rendered = self._rendered.get(key)
        if rendered is None:
            async with self._render_lock:
                rendered = self._rendered.get(key)
                if rendered is None:
                    rendered = await finish_in_thread(partial(render_markdown, text))
            self._rendered[key] = rendered
            if len(self._rendered) > _MAX_CACHED:
                self._rendered.popitem(last=False)
        self._rendered.move_to_end(key)
        return rendered


def _check(text: str) -> None:
    """Raises RequestInvalid if a description cannot have this text."""
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError:
        raise RequestInvalid("the description has half of a surrogate pair, which is not a character") from None
    if size > MAX_DESCRIPTION_BYTES:
        raise RequestInvalid(f"the description has {size} bytes; at most {MAX_DESCRIPTION_BYTES} are accepted")


def render_markdown(text: str) -> str:
    """Returns Markdown (CommonMark, with tables and strikethrough) as safe HTML. The end of a very long text is
    returned as plain text."""
    # Imported only when the first description is rendered, because most servers never show one.
    import nh3
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False, "maxNesting": _MAX_NESTING}).enable(["table", "strikethrough"])
    markdown, rest = _split(text)
    tokens = parser.parse(markdown)
    for token in tokens:
        if token.children is not None:
            token.children = _with_links_for_images(token.children)
    return nh3.clean(
        parser.renderer.render(tokens, parser.options, {}) + rest,
        tags=set(_TAGS),
        attributes={tag: set(names) for tag, names in _ATTRIBUTES.items()},
        url_schemes=set(_SCHEMES),
        link_rel=_LINK_REL,
        url_relative="deny",  # a relative link would lead to a page of this registry
    )


def _split(text: str) -> tuple[str, str]:
    """Splits a text at the end of a line. Returns the beginning as Markdown, and the rest as HTML of plain text."""
    if len(text) <= _MAX_RENDERED_CHARACTERS:
        return text, ""
    end = text.rfind("\n", 0, _MAX_RENDERED_CHARACTERS) + 1 or _MAX_RENDERED_CHARACTERS
    return text[:end], f"<pre>{html.escape(text[end:])}</pre>\n"


def _with_links_for_images(tokens: Sequence[Token]) -> list[Token]:
    """Replaces each image by a link to the image. The text of the link is the image's alternative text. An image inside
    a link, such as a badge, becomes the text of that link."""
    from markdown_it.token import Token

    result: list[Token] = []
    open_links = 0
    for token in tokens:
        open_links += {"link_open": 1, "link_close": -1}.get(token.type, 0)
        if token.type != "image":
            result.append(token)
            continue
        text = Token("text", "", 0, content=token.content or "image")
        if open_links:
            result.append(text)
        else:
            source = str(token.attrGet("src") or "")
            result += [Token("link_open", "a", 1, attrs={"href": source}), text, Token("link_close", "a", -1)]
    return result
