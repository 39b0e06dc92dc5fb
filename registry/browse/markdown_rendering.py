"""`render_markdown`: renders the Markdown description of a repository as safe HTML for a page of this registry.

Two libraries make the HTML safe. First, markdown-it-py escapes HTML in the text. Then nh3 removes all but a few
elements and attributes from the result. Images become links, because a page may not load anything from other hosts.

Some short texts become very long HTML or take long to parse, so this module limits the work and the size. If a text
exceeds a limit, only the blocks before that point are formatted. The rest is shown as plain text.

Import this module only when a description is rendered, because it loads both libraries.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Final, NamedTuple

import nh3
from markdown_it import MarkdownIt
from markdown_it.parser_block import ParserBlock, RuleFuncBlockType
from markdown_it.parser_inline import ParserInline
from markdown_it.ruler import Ruler
from markdown_it.rules_block.state_block import StateBlock
from markdown_it.rules_core.state_core import StateCore
from markdown_it.rules_inline.state_inline import StateInline
from markdown_it.token import Token
from markdown_it.utils import EnvType

_MAX_FORMATTED_CHARACTERS: Final = 64 * 1024
"""At most this number of characters of a description are formatted. Parsing takes up to 5 µs for each character."""
_MAX_BLOCK_ELEMENTS: Final = 15_000
_MAX_INLINE_ELEMENTS: Final = 15_000
"""Largest numbers of elements that are formatted. An *element* is a token of the parser. Block elements are, for
example, the start and the end of a table cell. Inline elements are, for example, the parts of the cell's text. An
element takes 10 to 20 µs. A table of 600 rows and 6 columns has 12,000 block elements, and a list of 800 links has
7,000 inline elements."""
_ELEMENTS_PER_BRACKET: Final = 4
"""Each `[` counts as this number of inline elements, because the parser searches for the end of a link at each `[`."""
_MAX_RULE_CALLS: Final = 150_000
"""Largest number of calls of rules. A *rule* is a function of the parser that checks whether one kind of block, such as
a list, begins at a line. A call takes about 1 µs. The parser makes about 14 calls for each line of a paragraph, and
more in nested quotes."""
_MAX_LINK_STEPS: Final = 100_000
"""Largest number of steps to find the ends of links, in all blocks together. A step takes 1 to 3 µs. A list of 800
links takes 1,600 steps. Unclosed brackets take many steps, because the search starts again at each bracket."""
_MAX_ATTRIBUTE_CHARACTERS: Final = 128 * 1024
"""Largest number of characters in the addresses and titles of all links together. In the HTML, each use of a link
definition repeats its address and title."""
_MAX_NESTING: Final = 20
"""A top-level block with this many or more levels of nested quotes is shown as plain text, with all blocks after it. A
nested list counts as two levels. `_BoundedBlockParser` checks this limit, because the parser's own check (`maxNesting`)
would drop the text at the deeper levels."""
# The HTML elements, their attributes and the URL schemes that may remain in the rendered HTML.
_ALLOWED_ELEMENTS: Final = frozenset(
    {
        *("a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p"),
        *("pre", "s", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul"),
    }
)
_ALLOWED_ATTRIBUTES: Final = {"a": {"href", "title"}, "ol": {"start"}}
_ALLOWED_SCHEMES: Final = frozenset({"http", "https", "mailto"})
_LINK_REL: Final = "nofollow noreferrer"
_LINE_END: Final = re.compile(r"\r\n?|\n")
"""Matches what the parser takes for the end of a line."""
_CUT_KEY: Final = "is_cut"
"""A key in the parser's environment (`env`). The value under it is True if `_parse_texts` has removed blocks."""
_MAX_HEADING_LEVEL: Final = 6
"""The deepest level of a heading in HTML (`h6`)."""


class RenderedText(NamedTuple):
    """A rendered description. `is_fully_formatted`: False if the description exceeds a limit, and its end or all of it
    is shown as plain text."""

    html: str
    is_fully_formatted: bool


def render_markdown(text: str, top_heading: int = 1) -> RenderedText:
    """Returns Markdown (CommonMark, with tables and strikethrough) as safe HTML. `top_heading`: the HTML level for the
    Markdown's headings of level 1, from 1 (`h1`) to 6 (`h6`)."""
    formatted, end = _format(text[: _formatted_length(text)], top_heading)
    return RenderedText(_clean(formatted + _to_plain_html(text[end:])), end == len(text))


def _formatted_length(text: str) -> int:
    """Returns how many characters of a text are parsed. A text that is too long is cut after the last line that fits.
    If no line fits, it is cut inside its first line."""
    if len(text) <= _MAX_FORMATTED_CHARACTERS:
        return len(text)
    return text.rfind("\n", 0, _MAX_FORMATTED_CHARACTERS) + 1 or _MAX_FORMATTED_CHARACTERS


def _to_plain_html(text: str) -> str:
    """Returns a text as HTML without any formatting."""
    return f"<pre>{html.escape(text)}</pre>\n" if text else ""


def _clean(unsafe_html: str) -> str:
    """Returns HTML without the elements, attributes and URL schemes that are not allowed."""
    return nh3.clean(
        unsafe_html,
        tags=set(_ALLOWED_ELEMENTS),
        attributes={tag: set(names) for tag, names in _ALLOWED_ATTRIBUTES.items()},
        url_schemes=set(_ALLOWED_SCHEMES),
        link_rel=_LINK_REL,
        url_relative="deny",  # a relative link would lead to a page of this registry
    )


class _TooComplex(Exception):
    """A budget of work is used up, or blocks are nested too deeply. The rest of the text is not formatted."""


class _Budget:
    """The amount of work that may be done for one text. `spend` raises _TooComplex if more is spent than is left."""

    def __init__(self, amount: int) -> None:
        self._remaining = amount

    def spend(self, amount: int) -> None:
        self._remaining -= amount
        if self._remaining < 0:
            raise _TooComplex


class _CountedTokens(list[Token]):
    """A list for the tokens of a parser. Each appended token is taken from the budget `elements`."""

    def __init__(self, elements: _Budget) -> None:
        super().__init__()
        self._elements = elements

    def append(self, token: Token) -> None:
        self._elements.spend(1)
        super().append(token)


class _CountedRules(Ruler[RuleFuncBlockType]):
    """The rules of a block parser. Each call of a rule is taken from a budget of `_MAX_RULE_CALLS`."""

    def __init__(self, original: Ruler[RuleFuncBlockType]) -> None:
        super().__init__()
        self._original = original
        self._calls = _Budget(_MAX_RULE_CALLS)
        self._counted_rules: dict[str, list[RuleFuncBlockType]] = {}

    def getRules(self, chainName: str = "") -> list[RuleFuncBlockType]:
        if chainName not in self._counted_rules:
            self._counted_rules[chainName] = [self._with_count(rule) for rule in self._original.getRules(chainName)]
        return self._counted_rules[chainName]

    def _with_count(self, rule: RuleFuncBlockType) -> RuleFuncBlockType:
        def counted(state: StateBlock, startLine: int, endLine: int, silent: bool) -> bool:
            self._calls.spend(1)
            return rule(state, startLine, endLine, silent)

        return counted


class _BoundedBlockParser(ParserBlock):
    """Parses paragraphs, lists, tables and other blocks. If a text exceeds a limit, returns only the tokens of the
    top-level blocks before that point."""

    def __init__(self, original: ParserBlock) -> None:
        """`original`: the parser whose rules apply."""
        self.ruler = _CountedRules(original.ruler)
        self._elements = _Budget(_MAX_BLOCK_ELEMENTS)
        self.is_complete = True
        """False if `parse` has returned the tokens of only a part of the text."""

    def tokenize(self, state: StateBlock, startLine: int, endLine: int) -> None:
        if state.level >= _MAX_NESTING:
            raise _TooComplex
        super().tokenize(state, startLine, endLine)

    def parse(self, src: str, md: MarkdownIt, env: EnvType, outTokens: list[Token]) -> list[Token] | None:
        tokens = _CountedTokens(self._elements)
        try:
            super().parse(src, md, env, tokens)
        except _TooComplex:
            self.is_complete = False
            if tokens and not _ends_top_level_block(tokens[-1]):
                _remove_block_and_rest(tokens, len(tokens) - 1)
        outTokens.extend(tokens)
        return outTokens


class _BoundedInlineParser(ParserInline):
    """Parses the text of a block, and the alternative texts of its images. Raises _TooComplex."""

    def __init__(self, original: ParserInline) -> None:
        """`original`: the parser whose rules apply."""
        super().__init__()
        self.ruler, self.ruler2 = original.ruler, original.ruler2
        self._elements = _Budget(_MAX_INLINE_ELEMENTS)
        self._steps = _Budget(_MAX_LINK_STEPS)

    def skipToken(self, state: StateInline) -> None:
        self._steps.spend(1)
        super().skipToken(state)

    def parse(self, src: str, md: MarkdownIt, env: EnvType, tokens: list[Token]) -> list[Token]:
        self._elements.spend(_ELEMENTS_PER_BRACKET * src.count("["))
        counted_tokens = _CountedTokens(self._elements)
        super().parse(src, md, env, counted_tokens)
        tokens.extend(counted_tokens)
        return tokens


def _format(markdown: str, top_heading: int) -> tuple[str, int]:
    """Returns Markdown as HTML, and the number of its characters that the HTML shows. If the Markdown exceeds a limit,
    the HTML shows only the top-level blocks before that point."""
    parser = MarkdownIt("commonmark", {"html": False, "maxNesting": _MAX_NESTING}).enable(["table", "strikethrough"])
    block_parser = parser.block = _BoundedBlockParser(parser.block)
    parser.inline = _BoundedInlineParser(parser.inline)
    parser.core.ruler.at("inline", _parse_texts)
    env: dict[str, object] = {}
    tokens = parser.parse(markdown, env)
    for token in tokens:
        if token.children is not None:
            token.children = _with_links_for_images(token.children)
        elif token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(_MAX_HEADING_LEVEL, int(token.tag[1:]) + top_heading - 1)}"
    rendered: str = parser.renderer.render(tokens, parser.options, {})
    if block_parser.is_complete and not env.get(_CUT_KEY):
        return rendered, len(markdown)
    return rendered, _characters_in_lines(markdown, _count_lines(tokens))


def _parse_texts(state: StateCore) -> None:
    """Parses the text of each block. Replaces the parser's own rule `inline`. If a text exceeds a limit, removes the
    top-level block that contains the text, and all blocks after that block."""
    attribute_characters = _Budget(_MAX_ATTRIBUTE_CHARACTERS)
    for index, token in enumerate(state.tokens):
        if token.type == "inline":
            token.children = []
            try:
                state.md.inline.parse(token.content, state.md, state.env, token.children)
                attribute_characters.spend(sum(_attribute_lengths(token.children)))
            except _TooComplex:
                _remove_block_and_rest(state.tokens, index)
                state.env[_CUT_KEY] = True
                return


def _ends_top_level_block(token: Token) -> bool:
    """Returns whether a top-level block ends with this token."""
    return token.level == 0 and token.nesting <= 0


def _remove_block_and_rest(tokens: list[Token], index: int) -> None:
    """Removes the top-level block that contains the token at `index`, and all blocks after that block."""
    while tokens[index].level > 0 or tokens[index].nesting < 0:
        index -= 1
    del tokens[index:]


def _count_lines(tokens: Sequence[Token]) -> int:
    """Returns the number of lines from the beginning of the text to the end of the last top-level block."""
    return next((token.map[1] for token in reversed(tokens) if token.level == 0 and token.map is not None), 0)


def _characters_in_lines(text: str, line_count: int) -> int:
    """Returns the number of characters in the first `line_count` lines of a text, including the line ends."""
    ends = (match.end() for match in _LINE_END.finditer(text))
    return next(islice(ends, line_count - 1, None), len(text)) if line_count else 0


def _with_links_for_images(tokens: Sequence[Token]) -> list[Token]:
    """Returns the tokens with each image replaced by a link to it, whose text is the image's alternative text. An image
    inside a link, such as a badge, is replaced by its alternative text alone."""
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
