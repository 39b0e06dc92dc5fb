"""Reads a page's Markdown: its blocks of code, its headings and its links.

A block of code may have a mark behind its language. The mark says how the block is tested (`tests/docs`), and the site
does not show it:

    ```console test: NAME            the test prepares what NAME stands for before it runs the block
    ```console with docker           the block needs docker, podman or skopeo
    ```console not run here: REASON  the test does not run the block; REASON is a test that does, or says why none can
    ```yaml setup PROGRAM            the block is a file that the registry makes for this client
    ```toml client                   the block is a file of another program, and has no settings of the registry
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Final

_FENCE: Final = re.compile(
    r"^(?P<indent> *)```(?P<language>\w+)?(?: (?P<mark>[^\n]+))?\n(?P<text>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)
_LINK: Final = re.compile(r"!?\[(?P<text>(?:[^][]|\[[^]]*\])*)\]\((?P<target>[^()\s]+)\)")
_HTML_PICTURE: Final = re.compile(r'<img src="([^"]+)"')
_HEADING: Final = re.compile(r"^(#{1,6}) (.+)$", re.MULTILINE)
_CODE_SPAN: Final = re.compile(r"(`+)(.+?)\1")


@dataclass(frozen=True, slots=True)
class Block:
    """A block of code. `mark` is what follows the language; empty if nothing does. `line`: number of its first line in
    the page, from 1."""

    language: str
    mark: str
    text: str
    line: int


def blocks(page: str) -> list[Block]:
    """Returns the blocks of code of a page, in their order."""
    return [
        Block(
            found["language"] or "",
            found["mark"] or "",
            re.sub(rf"^{found['indent']}", "", found["text"], flags=re.MULTILINE),
            page.count("\n", 0, found.start()) + 1,
        )
        for found in _FENCE.finditer(page)
    ]


def without_marks(page: str) -> str:
    """Returns the page with blocks that have a language and no mark."""
    return _FENCE.sub(
        lambda found: f"{found['indent']}```{found['language'] or ''}\n{found['text']}{found['indent']}```", page
    )


def without_blocks(page: str) -> str:
    """Returns the page's text without its blocks of code, and with as many lines."""
    return _FENCE.sub(lambda found: "\n" * found[0].count("\n"), page)


def headings(page: str) -> list[tuple[int, str]]:
    """Returns the level and the text of each heading."""
    return [(len(found[1]), found[2].strip()) for found in _HEADING.finditer(without_blocks(page))]


def anchors(page: str) -> set[str]:
    """Returns the anchors of the page's headings, as the site and code hosts make them: in lower case, without
    punctuation, with `-` for spaces. Chinese characters stay."""
    found: dict[str, int] = {}
    names = set()
    for _, text in headings(page):
        name = _slug(text)
        count = found.get(name, 0)
        found[name] = count + 1
        names.add(f"{name}-{count}" if count else name)
    return names


def _slug(heading: str) -> str:
    text = _LINK.sub(lambda found: found["text"], heading).replace("`", "").replace("*", "")
    kept = [char for char in text.lower() if char in "-_ " or unicodedata.category(char)[0] in "LNM"]
    return "".join(kept).strip().replace(" ", "-")


def links(page: str) -> list[str]:
    """Returns the targets of the page's links and pictures."""
    text = _CODE_SPAN.sub("", without_blocks(page))
    return [found["target"] for found in _LINK.finditer(text)] + _HTML_PICTURE.findall(text)


def replace_links(page: str, replace: dict[str, str | None]) -> str:
    """Returns the page with other targets of links: `replace` has the new target by the old one. A link whose new
    target is None becomes its text."""

    def change(found: re.Match[str]) -> str:
        if found["target"] not in replace:
            return found[0]
        target = replace[found["target"]]
        is_picture = found[0].startswith("!")
        return found["text"] if target is None else f"{'!' if is_picture else ''}[{found['text']}]({target})"

    return _LINK.sub(change, page)
