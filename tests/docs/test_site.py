"""What the site of the book is made from: pages without marks, pictures beside them, no link out of the book, nothing
from other servers."""

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
    """A block has its language, its mark, its text and its line; blocks in lists lose their indent."""
    first, second = blocks(PAGE)
    assert (first.language, first.mark, first.line) == ("console", "test: something", 7)
    assert first.text == "$ echo [not a link](there.md)\n# not a heading\n"
    assert (second.language, second.mark, second.text) == ("toml", "", "a = 1\n")


def test_without_marks() -> None:
    """Marks are gone, and nothing else."""
    assert without_marks(PAGE) == PAGE.replace(" test: something", "")
    assert without_blocks(PAGE).count("\n") == PAGE.count("\n")


def test_links_and_anchors() -> None:
    """What is in code is no link and no heading. Anchors keep Chinese characters, and are numbered if they repeat."""
    assert links(PAGE) == ["#a-list", "../adr/x.md", "../pages/x.png"]
    assert anchors(PAGE) == {"title", "who-may-push", "a-list", "a-list-1", "磁盘满了怎么办"}


@pytest.mark.parametrize("language", LANGUAGES)
def test_pages_as_the_generator_takes_them(tmp_path: Path, language: Language) -> None:
    """A copied page has no mark, and links only to pages, to pictures that are there, and to other sites."""
    copy_pages(language, tmp_path / "pages")
    copies = sorted((tmp_path / "pages").glob("*.md"))
    assert [copy.name for copy in copies] == sorted(file.name for file in (DOCS / language).glob("*.md"))
    for copy in copies:
        text = copy.read_text()
        assert [block.mark for block in blocks(text) if block.mark] == []
        local = [link.partition("#")[0] for link in links(text) if not link.startswith(("http:", "https:", "#"))]
        assert [link for link in local if not (copy.parent / link).is_file()] == []


def test_external_addresses(tmp_path: Path) -> None:
    """What a page loads from another server is found; what people may click is not."""
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
