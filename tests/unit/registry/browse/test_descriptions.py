"""Descriptions of repositories: who may write them, and the HTML that is made from them."""

from __future__ import annotations

import asyncio
import html
import re
from typing import Any

import pytest
from markdown_it import parser_block
from markdown_it.parser_block import RuleFuncBlockType
from markdown_it.parser_inline import ParserInline
from markdown_it.rules_block.state_block import StateBlock
from markdown_it.rules_inline.state_inline import StateInline

from registry.browse.byte_limited_cache import ByteLimitedCache
from registry.browse.markdown_rendering import render_markdown
from storage.descriptions import MAX_DESCRIPTION_BYTES
from tests.fakes.app_in_process import until
from tests.fakes.registry_content import BY
from tests.fakes.store_accounts import add_grant
from tests.unit.registry.browse.conftest import APP, Site

PATH = f"{APP}/description"


@pytest.fixture
async def writer(site: Site) -> None:
    """Adds the account `writer`, which may push, and pushes an image to the repository."""
    site.logins["writer"] = await site.app.user("writer")
    await add_grant(site.app.accounts, "user:writer", "team/**", "pull,push")
    await site.image("v1")


def html_of(text: str) -> str:
    """Returns the HTML of a text, which is short enough to be formatted."""
    rendered = render_markdown(text)
    assert rendered.is_fully_formatted
    return rendered.html


async def put(site: Site, text: str, **fields: Any) -> Any:
    return await site.json(PATH, "writer", "PUT", {"text": text, **fields})


@pytest.mark.usefixtures("writer")
async def test_a_description(site: Site) -> None:
    """An account that may push can write the description, and an account that may pull can read it."""
    empty = await site.json(PATH)
    assert empty == {"text": "", "html": "", "formatted": True, "revision": 0, "changed": None, "changed_by": None}
    written = await put(site, "# Hello", revision=0)
    assert (written["html"], written["revision"], written["changed_by"]) == ("<h1>Hello</h1>\n", 1, "writer")
    assert await site.json(PATH) == written
    assert (await put(site, "other"))["revision"] == 2
    assert (await put(site, ""))["html"] == ""
    assert (await put(site, "again", revision=3))["text"] == "again"
    answer = await site.get(PATH, "writer", "PUT", {"text": "late", "revision": 1})
    assert (answer.status, answer.json["errors"][0]["detail"]) == (412, {"revision": 4})


@pytest.mark.usefixtures("writer")
async def test_rights_to_descriptions(site: Site) -> None:
    """Reading needs the right to pull, and writing needs the right to push. A repository that does not exist has no
    description."""
    for account, read, write in (("puller", 200, 403), ("other", 404, 403), (None, 401, 401)):
        assert (await site.get(PATH, account)).status == read
        assert (await site.get(PATH, account, "PUT", {"text": "x"})).status == write
    assert (await site.get("team/none/description")).status == 404
    assert (await site.get("team/none/description", "writer", "PUT", {"text": "x"})).status == 404


@pytest.mark.usefixtures("writer")
async def test_the_longest_description(site: Site) -> None:
    """A description has at most 256 KiB in UTF-8. The escapes in the JSON of the request do not count."""
    longest = "文" * (MAX_DESCRIPTION_BYTES // 3)
    assert (await put(site, longest))["text"] == longest
    for text in (longest + "文", "x" * (MAX_DESCRIPTION_BYTES + 1), "\ud800"):
        assert (await site.get(PATH, "writer", "PUT", {"text": text})).status == 400
    assert (await site.get(PATH, "writer", "PUT", {"text": "x" * 700_000})).status == 413


def test_descriptions_are_commonmark() -> None:
    """Descriptions are CommonMark, with tables and strikethrough."""
    rendered = html_of("*a* **b** ~~c~~ `d`\n\n| x |\n| - |\n| y |\n\n1. one\n\n```sh\nls\n```\n\n> quote\n")
    for part in ("<em>a</em>", "<strong>b</strong>", "<s>c</s>", "<code>d</code>", "<td>y</td>", "<li>one</li>"):
        assert part in rendered
    assert "<pre><code>ls\n</code></pre>" in rendered


def test_links_in_descriptions() -> None:
    """Links to other hosts have the attributes `nofollow` and `noreferrer`. Relative links are shown as text, because
    they would lead to this registry."""
    assert html_of('[a](https://example.org/?a=1&b=2 "t")') == (
        '<p><a href="https://example.org/?a=1&amp;b=2" title="t" rel="nofollow noreferrer">a</a></p>\n'
    )
    for target in ("/api/v1/me", "//example.org", "docs/a.md", "#part", "?x"):
        assert "href" not in html_of(f"[a]({target})")


def test_images_are_links() -> None:
    """An image becomes a link, so that a page loads nothing from another host."""
    assert html_of("![a <b>](https://example.org/a.png)") == (
        '<p><a href="https://example.org/a.png" rel="nofollow noreferrer">a &lt;b&gt;</a></p>\n'
    )
    badge = html_of("[![build](https://example.org/badge.svg)](https://example.org/build)")
    assert badge == '<p><a href="https://example.org/build" rel="nofollow noreferrer">build</a></p>\n'


HOSTILE_TEXTS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "<iframe src=javascript:alert(1)>",
    "<style>*{display:none}</style>",
    "<form action=/api/v1/me><input name=x></form>",
    "<a href='javascript:alert(1)'>x</a>",
    "<!--><script>alert(1)</script>-->",
    "<math><mtext></table><mglyph><style><!--</style><img title='--&gt;&lt;img src=1 onerror=alert(1)&gt;'>",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](java\tscript:alert(1))",
    "[x](&#106;avascript:alert(1))",
    "[x](data:text/html;base64,PHNjcmlwdD4=)",
    "[x](vbscript:x)",
    "<javascript:alert(1)>",
    "![x](javascript:alert(1))",
    "![x](data:image/svg+xml;base64,PHN2Zz4=)",
    '!["onmouseover=alert(1) x="](https://example.org/"onload=alert(1))',
    '[a](https://example.org "x\\" onmouseover=alert(1) y=\\"")',
    "`<script>`",
    '```"><script>alert(1)</script>\nx\n```',
    "[x]: javascript:alert(1)\n\n[x]",
    "| <script> |\n| - |\n| <img src=x onerror=alert(1)> |",
    "\0<\0script>alert(1)</script>",
]


@pytest.mark.parametrize("text", HOSTILE_TEXTS)
def test_hostile_texts_become_harmless_html(text: str) -> None:
    """The HTML of hostile texts has only harmless elements, attributes and link targets."""
    rendered = html_of(text)
    for tag, attributes in re.findall(r"<\s*/?\s*([^\s>/]+)([^>]*)>", rendered):
        assert tag in {"p", "a", "code", "pre", "table", "thead", "tbody", "tr", "th", "td"}, rendered
        names = re.findall(r"""([^\s"'=]+)\s*=\s*"[^"]*\"""", attributes)
        assert set(names) <= {"href", "title", "rel"}, rendered
        assert re.sub(r"""[^\s"'=]+\s*=\s*"[^"]*\"""", "", attributes).strip() == "", rendered
    for target in re.findall(r'href="([^"]*)"', rendered):
        assert target.startswith(("https://", "http://", "mailto:")), rendered


def test_headings_can_be_lowered() -> None:
    """The headings of a description can be made lower than those of the page that shows it."""
    assert render_markdown("# a\n\nb\n=\n\n##### c", 3).html == "<h3>a</h3>\n<h3>b</h3>\n<h6>c</h6>\n"


def test_the_end_of_a_long_text_is_plain() -> None:
    """Only the first 64 KiB of a text are formatted. The rest is shown as escaped plain text."""
    lines = "*a* " + "word " * 3000 + "\n"
    rendered = render_markdown(lines * 4 + "b\n" + "<script>*c*" * 5000)
    assert not rendered.is_fully_formatted
    assert rendered.html.startswith("<p><em>a</em>")
    assert rendered.html.endswith("&lt;script&gt;*c*</pre>\n")
    assert "<script" not in rendered.html


GROWING_TEXTS = {
    "a table whose empty cells are not in the text": "|" + "a|" * 300 + "\n|" + "-|" * 300 + "\n" + "x|\n" * 600,
    "many small tables": "|a|\n|-|\n\n" * 7000,
    "headings": "#\n" * 32_000,
    "lists": "- a\n" * 16_000,
    "quotes": (">" * 19 + "a\n\n") * 3000,
    "emphasis": "*a*" * 20_000,
    "line breaks": "a\\\n" * 20_000,
    "links": "[](b)" * 13_000,
    "references to a long address": "[a]: http://" + "x" * 30_000 + "\n\n" + "[a]" * 1000,
    "references to a long title": "[a]: http://x '" + "&" * 30_000 + "'\n\n" + "[a]" * 100,
    "images with a long address": "[a]: http://" + "x" * 30_000 + "\n\n" + "![a]" * 1000,
    "an image with a long text": "![" + "*a*" * 20_000 + "](b)",
    "nested images": ("![" * 19 + "a" + "](b)" * 19 + " ") * 500,
    "links that are never closed": "[" * 60_000,
    "images that are never closed": "![" * 30_000,
}


@pytest.mark.parametrize("text", GROWING_TEXTS.values(), ids=GROWING_TEXTS)
@pytest.mark.slow
def test_texts_with_very_much_formatting_are_plain(text: str) -> None:
    """If a text has too many elements, or its links are too long together, only the blocks at its beginning are
    formatted. The rest is shown as plain text. So its HTML is not much longer than the text."""
    rendered = render_markdown(text)
    assert not rendered.is_fully_formatted
    assert rendered.html.count("<") < 40_000
    formatted, _, rest = rendered.html.rpartition("<pre>")
    plain = html.unescape(rest.removesuffix("</pre>\n"))
    assert plain
    assert html_of(text.removesuffix(plain)) == formatted
    assert text.endswith(plain)


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.slow
def test_the_beginning_of_a_complex_text_is_formatted(line_end: str) -> None:
    """If one block of a text takes too much work, or is nested too deeply, the blocks before it are formatted. That
    block and everything after it is shown as plain text."""
    lines = ["# Title", "", "- one", "  > two", "", "```", "three", "```", "[a]: b", ""]
    beginning = line_end.join(lines)
    nested_lists = line_end.join("  " * level + "- a" for level in range(10))
    quotes = "> " * 19 + "a" + line_end + ("b" + line_end) * 20_000
    for block in ("*a*" * 20_000, quotes, "[" * 10_000, nested_lists, ">" * 21 + "a"):
        rendered = render_markdown(beginning + line_end + block + line_end * 2 + "*after*")
        formatted, _, rest = rendered.html.rpartition("<pre>")
        assert (rendered.is_fully_formatted, formatted) == (False, html_of(beginning))
        plain = html.unescape(rest).removeprefix("[a]: b\n\n")
        assert plain == block.replace(line_end, "\n") + "\n\n*after*</pre>\n"


COSTLY_TEXTS = {
    "lines that continue nested quotes": "> " * 19 + "a\n" + "b\n" * 32_700,
    "lines that continue quotes with tabs": ">\t" * 9 + "a\n" + "b\n" * 32_700,
    "one paragraph of many lines": "a\n" * 30_000,
    "lines that continue a list": "- " * 9 + "a\n" + "b\n" * 32_700,
    "definitions of links": "[a]: b\n" * 9_000,
}


@pytest.mark.parametrize("text", COSTLY_TEXTS.values(), ids=COSTLY_TEXTS)
@pytest.mark.slow
def test_rule_calls_for_a_text_are_limited(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser calls its rules for blocks at most 150,000 times for one text, also if it only checks where a
    paragraph ends."""
    calls = 0

    def counted(rule: RuleFuncBlockType) -> RuleFuncBlockType:
        def call(state: StateBlock, start: int, end: int, silent: bool) -> bool:
            nonlocal calls
            calls += 1
            return rule(state, start, end, silent)

        return call

    monkeypatch.setattr(parser_block, "_rules", [(name, counted(rule), alt) for name, rule, alt in parser_block._rules])
    rendered = render_markdown(text)
    assert 1000 < calls <= 150_000
    assert html.unescape(rendered.html).endswith(f"{text[-100:]}</pre>\n") or rendered.is_fully_formatted


@pytest.mark.parametrize("text", ["![" * 3740 + "!" * 50_000, "[" * 3740 + "!" * 60_000, "[x " * 3740 + "!" * 45_000])
@pytest.mark.slow
def test_steps_to_find_the_ends_of_links_are_limited(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser takes at most 100,000 steps to find the ends of links, also if a text has many brackets that are never
    closed."""
    steps = 0
    take_step = ParserInline.skipToken

    def counted(self: ParserInline, state: StateInline) -> None:
        nonlocal steps
        steps += 1
        take_step(self, state)

    monkeypatch.setattr(ParserInline, "skipToken", counted)
    rendered = render_markdown(text)
    assert steps == 100_000
    assert not rendered.is_fully_formatted


ROW = '| image.repository | string | `"registry.example.org"` | see [the values](https://example.org/docs/values) |\n'
ENTRY = (
    "- Mend a fault ([#1234](https://github.com/example/app/issues/1234)) by [@someone](https://github.com/someone)\n"
)
LARGE_READMES = {
    "headings, lists and a table": "# Title\n\nText with *two* **words**.\n\n- item\n" * 100
    + "| name | use |\n| - | - |\n"
    + "| `a` | [b](https://example.org/) |\n" * 300,
    "a table of the values of a chart": "| Key | Type | Default | Description |\n|-|-|-|-|\n" + ROW * 430,
    "a table of 600 rows and 6 columns": "|a|b|c|d|e|f|\n|-|-|-|-|-|-|\n" + "| ab | cd | ef | gh | i | jkl |\n" * 600,
    "a list of 800 links": ENTRY * 400,
}


@pytest.mark.parametrize("text", LARGE_READMES.values(), ids=LARGE_READMES)
@pytest.mark.slow
def test_a_large_readme_is_formatted(text: str) -> None:
    """A text with as much formatting as a large README is formatted."""
    assert render_markdown(text).is_fully_formatted


@pytest.mark.usefixtures("writer")
async def test_waiting_for_a_description_keeps_nobody_from_reading(site: Site) -> None:
    """A process renders one description at a time. The visitors who wait for a rendering hold no slots for reads, so
    other requests are answered meanwhile."""
    assert site.app.app.service.access is not None
    management = site.app.app.service.access.management
    await management.upkeep.store.descriptions.put_description(APP, "# Hello", by=BY)
    renderings = management.repository_browser._descriptions.rendering_limits
    async with asyncio.TaskGroup() as tasks, renderings.slot("somebody"):
        waiting = [tasks.create_task(site.get(PATH, account)) for account in ("puller", "root") * 2]
        await until(lambda: renderings.pending > len(waiting))
        async with asyncio.timeout(30):
            assert [row["tag"] for row in (await site.json(f"{APP}/tag-list", "writer"))["items"]] == ["v1"]
    assert [task.result().json["html"] for task in waiting] == ["<h1>Hello</h1>\n"] * 4


def test_cached_descriptions_are_limited_by_bytes() -> None:
    """A cache that is limited by bytes removes the values that have not been used for longest. It keeps no value that
    is larger than the cache."""
    cache = ByteLimitedCache[str](10, len)
    for key in "abc":
        cache.put(key, key * 3)
    assert cache.get("a") == "aaa"
    cache.put("d", "dddd")
    assert [cache.get(key) for key in "abcd"] == ["aaa", None, "ccc", "dddd"]
    assert cache.put("e", "e" * 11) == "e" * 11
    assert [cache.get(key) for key in "acde"] == [None] * 4
