"""Descriptions of repositories: who may write them, and the HTML that is made from them."""

from __future__ import annotations

import re
from typing import Any

import pytest

from registry.browse.descriptions import render_markdown
from storage.descriptions import MAX_DESCRIPTION_BYTES
from tests.fakes.store_accounts import add_grant
from tests.unit.registry.browse.conftest import APP, Site

PATH = f"{APP}/description"


@pytest.fixture
async def writer(site: Site) -> None:
    """Adds the account `writer`, which may push, and pushes an image to the repository."""
    site.logins["writer"] = await site.app.user("writer")
    await add_grant(site.app.accounts, "user:writer", "team/**", "pull,push")
    await site.image("v1")


async def put(site: Site, text: str, **fields: Any) -> Any:
    return await site.json(PATH, "writer", "PUT", {"text": text, **fields})


@pytest.mark.usefixtures("writer")
async def test_a_description(site: Site) -> None:
    """An account that may push can write the description, and an account that may pull can read it."""
    empty = await site.json(PATH)
    assert empty == {"text": "", "html": "", "revision": 0, "changed": None, "changed_by": None}
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
    rendered = render_markdown("*a* **b** ~~c~~ `d`\n\n| x |\n| - |\n| y |\n\n1. one\n\n```sh\nls\n```\n\n> quote\n")
    for part in ("<em>a</em>", "<strong>b</strong>", "<s>c</s>", "<code>d</code>", "<td>y</td>", "<li>one</li>"):
        assert part in rendered
    assert "<pre><code>ls\n</code></pre>" in rendered


def test_links_in_descriptions() -> None:
    """Links to other hosts have the attributes `nofollow` and `noreferrer`. Relative links are shown as text, because
    they would lead to this registry."""
    assert render_markdown('[a](https://example.org/?a=1&b=2 "t")') == (
        '<p><a href="https://example.org/?a=1&amp;b=2" title="t" rel="nofollow noreferrer">a</a></p>\n'
    )
    for target in ("/api/v1/me", "//example.org", "docs/a.md", "#part", "?x"):
        assert "href" not in render_markdown(f"[a]({target})")


def test_images_are_links() -> None:
    """An image becomes a link, so that a page loads nothing from another host."""
    assert render_markdown("![a <b>](https://example.org/a.png)") == (
        '<p><a href="https://example.org/a.png" rel="nofollow noreferrer">a &lt;b&gt;</a></p>\n'
    )
    badge = render_markdown("[![build](https://example.org/badge.svg)](https://example.org/build)")
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
    rendered = render_markdown(text)
    for tag, attributes in re.findall(r"<\s*/?\s*([^\s>/]+)([^>]*)>", rendered):
        assert tag in {"p", "a", "code", "pre", "table", "thead", "tbody", "tr", "th", "td"}, rendered
        names = re.findall(r"""([^\s"'=]+)\s*=\s*"[^"]*\"""", attributes)
        assert set(names) <= {"href", "title", "rel"}, rendered
        assert re.sub(r"""[^\s"'=]+\s*=\s*"[^"]*\"""", "", attributes).strip() == "", rendered
    for target in re.findall(r'href="([^"]*)"', rendered):
        assert target.startswith(("https://", "http://", "mailto:")), rendered


@pytest.mark.slow
def test_long_texts_are_parsed_in_limited_time() -> None:
    """A text of the largest length, of the kind that is slowest to parse, is parsed only up to a limit. The rest is
    shown as escaped plain text."""
    text = "![" * 30_000 + "\n" + "<script>" * ((MAX_DESCRIPTION_BYTES - 60_001) // 8)
    rendered = render_markdown(text)
    assert rendered.startswith("<p>![![")
    assert rendered.endswith("&lt;script&gt;</pre>\n")
    assert "<script" not in rendered
