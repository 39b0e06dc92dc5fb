"""Reads the Markdown of a page of the book: its blocks of code, its headings and its links.

A block of code may have a mark after its language. The mark says how the block is tested (`tests/docs`), and the site
does not show it:

    ```console test: NAME            the test runs the preparation NAME before it runs the block
    ```console with docker           the block needs docker, podman or skopeo
    ```console not run here: REASON  the test does not run the block; REASON names a test that runs it, or says why
                                     no test can run it
    ```yaml setup PROGRAM            the block is a configuration file that the registry generates for this client
    ```toml client                   the block is a configuration file of another program, not of the registry
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
    """A block of code. `mark`: the text after the language; empty if there is none. `line`: the number of the block's
    first line in the page, from 1."""

    language: str
    mark: str
    text: str
    line: int


def blocks(page: str) -> list[Block]:
    """Returns the blocks of code of a page, in the order of the page."""
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
    """Returns the page with the marks of all blocks removed."""
    return _FENCE.sub(
        lambda found: f"{found['indent']}```{found['language'] or ''}\n{found['text']}{found['indent']}```", page
    )


def without_blocks(page: str) -> str:
    """Returns the page with empty lines in place of its blocks of code, so that the number of lines stays the same."""
    return _FENCE.sub(lambda found: "\n" * found[0].count("\n"), page)


def headings(page: str) -> list[tuple[int, str]]:
    """Returns the level and the text of each heading."""
    return [(len(found[1]), found[2].strip()) for found in _HEADING.finditer(without_blocks(page))]


def anchors(page: str) -> set[str]:
    """Returns the anchors that the site and code hosts generate for the page's headings: in lower case, without
    punctuation, with `-` in place of spaces. Chinese characters stay."""
    counts: dict[str, int] = {}
    names = set()
    for _, text in headings(page):
        name = _slug(text)
        count = counts.get(name, 0)
        counts[name] = count + 1
        names.add(f"{name}-{count}" if count else name)  # a repeated heading gets a number
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
    """Returns the page with changed targets of links. `replace`: the new target for each old target. A link whose new
    target is None is replaced by its text."""

    def change(found: re.Match[str]) -> str:
        if found["target"] not in replace:
            return found[0]
        target = replace[found["target"]]
        is_picture = found[0].startswith("!")
        return found["text"] if target is None else f"{'!' if is_picture else ''}[{found['text']}]({target})"

    return _LINK.sub(change, page)
