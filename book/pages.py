"""The pages of the book (the documentation site): their order, their groups, and their files.

A page has the same file name in every language: `docs/en/quick-start.md` and `docs/zh/quick-start.md` are one page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

ROOT: Final = Path(__file__).parent.parent
DOCS: Final = ROOT / "docs"

Language = Literal["en", "zh"]
LANGUAGES: Final[Sequence[Language]] = ("en", "zh")


@dataclass(frozen=True, slots=True)
class PageGroup:
    """A group of pages in the navigation. `titles`: the title of the group by language; empty: the pages are on the top
    level of the navigation. `pages`: the names of the pages' files without `.md`."""

    titles: Mapping[Language, str]
    pages: Sequence[str]


NAVIGATION: Final[Sequence[PageGroup]] = (
    PageGroup({}, ("index", "quick-start")),
    PageGroup(
        {"en": "What do you want to do?", "zh": "你想做什么"},
        ("team-registry", "accelerator", "air-gapped", "moving", "ci"),
    ),
    PageGroup({"en": "Install", "zh": "安装部署"}, ("deployment", "kubernetes", "upgrading", "compatibility")),
    PageGroup({"en": "Use", "zh": "使用"}, ("accounts", "repositories", "mirror", "http-api")),
    PageGroup(
        {"en": "Operate", "zh": "运维"},
        ("network", "upkeep", "operations", "metrics", "alerts", "events"),
    ),
    PageGroup(
        {"en": "Look up", "zh": "参考"},
        ("settings", "errors", "security", "performance", "architecture"),
    ),
)
"""All pages, in the order of the navigation."""


def page_names() -> list[str]:
    """Returns the names of all pages, in the order of the navigation."""
    return [page for group in NAVIGATION for page in group.pages]


def page_file(name: str, language: Language) -> Path:
    """Returns the file of a page. The file may be missing."""
    return DOCS / language / f"{name}.md"
