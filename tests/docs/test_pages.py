"""Tests of the pages of the book: each page exists in both languages, with the same headings and blocks of code, and
its links lead to existing files and headings."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from book.markdown_blocks import Block, anchors, blocks, headings, links
from book.pages import DOCS, LANGUAGES, Language, page_file, page_names
from tests.fakes.book_page import root_files
from tests.fakes.server_process import ROOT

GENERATED = "settings"
READMES = (ROOT / "README.md", ROOT / "README.zh-CN.md")
EXTERNAL = ("https://", "http://", "mailto:")


@pytest.mark.parametrize("language", LANGUAGES)
def test_each_page_exists(language: Language) -> None:
    """The folder of a language has exactly the pages of the navigation."""
    assert sorted(file.stem for file in (DOCS / language).glob("*.md")) == sorted(page_names())
    assert len(set(page_names())) == len(page_names())


def text_of(page: str, language: Language) -> str:
    return page_file(page, language).read_text()


@pytest.mark.parametrize("page", page_names())
def test_both_languages_have_the_same_headings(page: str) -> None:
    """In both languages, the headings of a page have the same levels in the same order."""
    levels = [[level for level, _ in headings(text_of(page, language))] for language in LANGUAGES]
    assert levels[0] == levels[1]
    assert levels[0].count(1) == 1


def code_of(block: Block) -> str:
    """Returns the lines of a block without comments and empty lines, which a translation may change."""
    lines = [re.sub(r"(^|\s)(#|//) .*$", "", line).rstrip() for line in block.text.splitlines()]
    return "\n".join(line for line in lines if line)


@pytest.mark.parametrize("page", ["README", *page_names()])
def test_both_languages_have_the_same_blocks(page: str) -> None:
    """Both languages have the same blocks of code, except for comments. So the tests of the English page also count for
    the Chinese page. A block without a language is a drawing, which may be translated."""
    files = READMES if page == "README" else [page_file(page, language) for language in LANGUAGES]
    english, chinese = (blocks(file.read_text()) for file in files)
    assert [block.language for block in english] == [block.language for block in chinese]
    for english_block, chinese_block in zip(english, chinese, strict=True):
        if english_block.language:
            assert code_of(chinese_block) == code_of(english_block), f"{files[1].name}:{chinese_block.line}"


@pytest.mark.parametrize("page", page_names())
def test_both_languages_name_the_same_things(page: str) -> None:
    """Names in code style in the English tables, such as settings and metrics, are also in the Chinese page."""
    names = {
        name
        for row in text_of(page, "en").splitlines()
        if row.startswith("| `")
        for name in re.findall(r"`([a-z][\w.]+)`", row.split(" | ")[0])
    }
    chinese = text_of(page, "zh")
    assert [name for name in sorted(names) if f"`{name}`" not in chinese] == []


def documents() -> list[Path]:
    """Returns all Markdown files whose links are checked."""
    return [*sorted(DOCS.rglob("*.md")), ROOT / "bench" / "README.md", *root_files()]


@pytest.mark.parametrize("file", documents(), ids=lambda file: file.relative_to(ROOT).as_posix())
def test_links(file: Path) -> None:
    """The target of each link is an existing file, and the anchor of a link is the anchor of a heading in this file."""
    broken_links = []
    for link in links(file.read_text()):
        if not link.startswith(EXTERNAL):
            path, _, anchor = link.partition("#")
            target = (file.parent / path).resolve() if path else file
            if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
                broken_links.append(link)
    assert broken_links == []


def test_pages_link_to_pages_of_their_language() -> None:
    """No page links to a page in the other language."""
    crossing = [
        (file.name, link)
        for language, other in (("en", "zh"), ("zh", "en"))
        for file in (DOCS / language).glob("*.md")
        for link in links(file.read_text())
        if link.startswith(f"../{other}/")
    ]
    assert crossing == []


def test_the_front_page_links_to_every_page() -> None:
    """The front page of each language has a link to every other page."""
    for language in LANGUAGES:
        linked_pages = {link.partition("#")[0] for link in links(text_of("index", language))}
        assert {f"{page}.md" for page in page_names()} - linked_pages == {"index.md"}
