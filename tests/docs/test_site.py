"""Tests of the source of the documentation site: marks of blocks are removed, pictures are copied, no link leads out of
the book, and no page loads files from other servers."""

from __future__ import annotations

from pathlib import Path

import pytest

from book.markdown_blocks import anchors, blocks, links, without_blocks, without_marks
from book.pages import DOCS, LANGUAGES, Language
from book.site import copy_pages, external_addresses

PAGE = """# Title

## Who may `push`?

See [the list](#a-list), [`code`](../adr/x.md) and ![a picture](../pages/x.png). Not a `[link](here.md)`.

```console test: something
$ echo [not a link](there.md)
# not a heading
```

- A list

  ```toml
  a = 1
  ```

## A list
## A list
## 磁盘满了（怎么办）？
"""  # noqa: RUF001


def test_blocks() -> None:
    """A block has its language, mark, text and line number. The text of a block in a list has no indentation."""
    first, second = blocks(PAGE)
    assert (first.language, first.mark, first.line) == ("console", "test: something", 7)
    assert first.text == "$ echo [not a link](there.md)\n# not a heading\n"
    assert (second.language, second.mark, second.text) == ("toml", "", "a = 1\n")


def test_without_marks() -> None:
    """`without_marks` removes only the marks. `without_blocks` keeps the number of lines."""
    assert without_marks(PAGE) == PAGE.replace(" test: something", "")
    assert without_blocks(PAGE).count("\n") == PAGE.count("\n")


def test_links_and_anchors() -> None:
    """Text in code style or in blocks of code is neither a link nor a heading. Anchors keep Chinese characters. Equal
    anchors get a number."""
    assert links(PAGE) == ["#a-list", "../adr/x.md", "../pages/x.png"]
    assert anchors(PAGE) == {"title", "who-may-push", "a-list", "a-list-1", "磁盘满了怎么办"}


@pytest.mark.parametrize("language", LANGUAGES)
def test_copied_pages(tmp_path: Path, language: Language) -> None:
    """A copied page has no marks. It links only to pages and pictures that exist in the copy, and to other sites."""
    copy_pages(language, tmp_path / "pages")
    copies = sorted((tmp_path / "pages").glob("*.md"))
    assert [copy.name for copy in copies] == sorted(file.name for file in (DOCS / language).glob("*.md"))
    for copy in copies:
        text = copy.read_text()
        assert [block.mark for block in blocks(text) if block.mark] == []
        local = [link.partition("#")[0] for link in links(text) if not link.startswith(("http:", "https:", "#"))]
        assert [link for link in local if not (copy.parent / link).is_file()] == []


def test_external_addresses(tmp_path: Path) -> None:
    """`external_addresses` finds files that a page loads from another server, but not links that people can click."""
    (tmp_path / "page.html").write_text(
        '<link rel="stylesheet" href="https://fonts.example/a.css"><script src=//cdn.example/b.js></script>'
        '<img src="pictures/c.png"><a href="https://example.com">a link</a>'
    )
    (tmp_path / "style.css").write_text("@import url(https://fonts.example/d.css); a { background: url(e.png) }")
    assert sorted(external_addresses(tmp_path)) == [
        "page.html: //cdn.example/b.js",
        "page.html: https://fonts.example/a.css",
        "style.css: https://fonts.example/d.css",
    ]
