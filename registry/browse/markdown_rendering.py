"""`render_markdown`: renders a description of a repository, which people write in Markdown, as HTML that is safe on a
page of this registry.

Two libraries make the HTML safe, one after the other. markdown-it-py escapes HTML in the text, and nh3 removes all but
a few elements and attributes from the result. Images become links, because a page may not load anything from other
hosts.

Some short texts become very long HTML: each row of a table is filled up to the number of its columns, and each
reference to a link repeats the whole address. So the work and the size are limited. A text that exceeds a limit is
shown as plain text.

Import this module only when a description is rendered, because most servers never show one.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

import nh3
from markdown_it import MarkdownIt
from markdown_it.parser_block import ParserBlock
from markdown_it.parser_inline import ParserInline
from markdown_it.token import Token
from markdown_it.utils import EnvType

_MAX_FORMATTED_CHARACTERS: Final = 64 * 1024
"""How many characters of a description are formatted. The rest is shown as plain text, because parsing takes up to 5 µs
for each character."""
_MAX_ELEMENTS: Final = 10_000
"""How many elements of a description are formatted. An *element* is a token of the parser, such as the start of a table
cell or a piece of text. It takes about 10 µs, so all elements take about 0.1 seconds. A README of 64 KiB has about
3,500."""
_ELEMENTS_PER_BRACKET: Final = 4
"""How many elements a `[` counts as, because the parser searches for the end of a link at each of them."""
_MAX_ATTRIBUTE_CHARACTERS: Final = 128 * 1024
"""How many characters the addresses and titles of all links may have together. Each reference to a link repeats
them."""
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
_LOWEST_HEADING: Final = 6
"""The lowest level of a heading in HTML."""


class RenderedText(NamedTuple):
    """A rendered description. `is_formatted`: False if it is too long or has too many elements, so that all of it, or
    its end, is shown as plain text."""

    html: str
    is_formatted: bool


def render_markdown(text: str, top_heading: int = 1) -> RenderedText:
    """Returns Markdown (CommonMark, with tables and strikethrough) as safe HTML. `top_heading`: the level of the
    highest headings in the HTML, from 1 to 6."""
    markdown, rest = _split(text)
    try:
        formatted = _format(markdown, top_heading)
    except _TooComplex:
        return RenderedText(_clean(_plain(text)), False)
    return RenderedText(_clean(formatted + _plain(rest)), not rest)


def _split(text: str) -> tuple[str, str]:
    """Splits a text at the end of a line. Returns the beginning, which is formatted, and the rest, which is not."""
    if len(text) <= _MAX_FORMATTED_CHARACTERS:
        return text, ""
    end = text.rfind("\n", 0, _MAX_FORMATTED_CHARACTERS) + 1 or _MAX_FORMATTED_CHARACTERS
    return text[:end], text[end:]


def _plain(text: str) -> str:
    """Returns a text as HTML without any formatting."""
    return f"<pre>{html.escape(text)}</pre>\n" if text else ""


def _clean(unsafe: str) -> str:
    """Removes all elements and attributes from HTML that are not allowed."""
    return nh3.clean(
        unsafe,
        tags=set(_TAGS),
        attributes={tag: set(names) for tag, names in _ATTRIBUTES.items()},
        url_schemes=set(_SCHEMES),
        link_rel=_LINK_REL,
        url_relative="deny",  # a relative link would lead to a page of this registry
    )


class _TooComplex(Exception):
    """A text has more elements, or longer addresses, than are formatted."""


class _Budget:
    """Counts the elements of one text. `spend` raises _TooComplex if there are too many."""

    def __init__(self) -> None:
        self._remaining = _MAX_ELEMENTS

    def spend(self, elements: int) -> None:
        self._remaining -= elements
        if self._remaining < 0:
            raise _TooComplex


class _CountedTokens(list[Token]):
    """The tokens of a parser, each of which counts as an element."""

    def __init__(self, budget: _Budget) -> None:
        super().__init__()
        self._budget = budget

    def append(self, token: Token) -> None:
        self._budget.spend(1)
        super().append(token)


class _BoundedBlockParser(ParserBlock):
    """Parses paragraphs, lists, tables and other blocks, up to a number of elements."""

    def __init__(self, original: ParserBlock, budget: _Budget) -> None:
        """`original`: the parser whose rules apply."""
        self.ruler = original.ruler
        self._budget = budget

    def parse(self, src: str, md: MarkdownIt, env: EnvType, outTokens: list[Token]) -> list[Token] | None:
        tokens = _CountedTokens(self._budget)
        super().parse(src, md, env, tokens)
        outTokens.extend(tokens)
        return outTokens


class _BoundedInlineParser(ParserInline):
    """Parses the text of a block, and the texts of images in it, up to a number of elements."""

    def __init__(self, original: ParserInline, budget: _Budget) -> None:
        """`original`: the parser whose rules apply."""
        super().__init__()
        self.ruler, self.ruler2 = original.ruler, original.ruler2
        self._budget = budget

    def parse(self, src: str, md: MarkdownIt, env: EnvType, tokens: list[Token]) -> list[Token]:
        self._budget.spend(_ELEMENTS_PER_BRACKET * src.count("["))
        counted_tokens = _CountedTokens(self._budget)
        super().parse(src, md, env, counted_tokens)
        tokens.extend(counted_tokens)
        return tokens


def _format(markdown: str, top_heading: int) -> str:
    """Returns Markdown as HTML. Raises _TooComplex."""
    budget = _Budget()
    parser = MarkdownIt("commonmark", {"html": False, "maxNesting": _MAX_NESTING}).enable(["table", "strikethrough"])
    parser.block = _BoundedBlockParser(parser.block, budget)
    parser.inline = _BoundedInlineParser(parser.inline, budget)
    tokens = parser.parse(markdown)
    for token in tokens:
        if token.children is not None:
            token.children = _with_links_for_images(token.children)
        elif token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(_LOWEST_HEADING, int(token.tag[1:]) + top_heading - 1)}"
    if sum(_attribute_lengths(tokens)) > _MAX_ATTRIBUTE_CHARACTERS:
        raise _TooComplex
    rendered: str = parser.renderer.render(tokens, parser.options, {})
    return rendered


def _with_links_for_images(tokens: Sequence[Token]) -> list[Token]:
    """Replaces each image by a link to the image. The text of the link is the image's alternative text. An image inside
    a link, such as a badge, becomes the text of that link."""
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


def _attribute_lengths(tokens: Iterable[Token]) -> Iterator[int]:
    """Yields the number of characters in the attributes of each token, and of each token inside it."""
    for token in tokens:
        yield sum(len(str(value)) for value in token.attrs.values())
        yield from _attribute_lengths(token.children or ())
