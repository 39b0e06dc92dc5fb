"""Builds the site of the book: one site for each language, below one folder, with a page that leads to both.

The generator is Zensical (docs/adr/0021-the-book.md). It gets a copy of the pages without the marks for tests. What
a page shows is copied beside it, and a link that leads out of the book, such as one to the code, becomes plain text.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from book.markdown_blocks import links, replace_links, without_marks
from book.pages import DOCS, LANGUAGES, NAVIGATION, Language, page_file

TITLES: Final[dict[Language, str]] = {"en": "Entrepot", "zh": "Entrepot 手册"}
NAMES: Final[dict[Language, str]] = {"en": "English", "zh": "中文"}
_THEME_LANGUAGES: Final[dict[Language, str]] = {"en": "en", "zh": "zh"}
_PICTURES: Final = (".png", ".svg")
_EXTERNAL: Final = re.compile(
    r"""<(?:script|img|link|source|iframe|use)\b[^>]*?\b(?:src|href)=["']?(?P<url>(?:https?:)?//[^"'\s>]+)"""
)
_IMPORT: Final = re.compile(r"""(?:@import|url\()\s*["']?(?P<url>(?:https?:)?//[^"')\s]+)""")


class BuildFailed(Exception):
    """The site cannot be built, or is not as it has to be. The text says why."""


def build_site(target: Path) -> None:
    """Builds the site into `target`, which is emptied first. Raises BuildFailed if the generator warns of anything, and
    if a page would load something from another server."""
    shutil.rmtree(target, ignore_errors=True)
    source = target.with_name(f"{target.name}-source")
    shutil.rmtree(source, ignore_errors=True)
    for language in LANGUAGES:
        _build_language(language, source / language, target / language)
    (target / "index.html").write_text(_front_page(), encoding="utf-8")
    if found := sorted(external_addresses(target)):
        raise BuildFailed("pages load something from elsewhere:\n" + "\n".join(found))


def _build_language(language: Language, source: Path, target: Path) -> None:
    copy_pages(language, source / "pages")
    config = source / "zensical.toml"
    config.write_text(_configuration(language), encoding="utf-8")
    program = Path(sys.executable).with_name("zensical")
    command = [str(program), "build", "--strict", "--clean", "--config-file", str(config)]
    environment = {**os.environ, "NO_COLOR": "1"}
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    if done.returncode or re.search(r"\b(warning|error)\b", output, re.IGNORECASE):
        raise BuildFailed(f"docs/{language}:\n{output}")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(source / "site", target)  # the generator writes below its configuration only


def copy_pages(language: Language, folder: Path) -> None:
    """Copies the pages of a language into `folder` as the generator takes them, and the pictures that they show."""
    folder.mkdir(parents=True)
    for file in sorted((DOCS / language).glob("*.md")):
        text = without_marks(file.read_text(encoding="utf-8"))
        targets: dict[str, str | None] = {}
        for link in links(text):
            if link.startswith("../"):
                targets[link] = _bring_picture(file.parent / link, folder)
        (folder / file.name).write_text(replace_links(text, targets), encoding="utf-8")


def _bring_picture(file: Path, folder: Path) -> str | None:
    """Copies a picture beside the pages, and returns where it is. Returns None for a file that is no picture."""
    if file.suffix not in _PICTURES:
        return None
    target = folder / "pictures" / file.name
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(file, target)
    return f"pictures/{file.name}"


def _configuration(language: Language) -> str:
    """Returns the settings of the generator, in TOML. Strings of JSON are strings of TOML as well."""
    alternates = [
        f'  {{ name = "{NAMES[other]}", link = "../{other}/index.html", lang = "{other}" }},' for other in LANGUAGES
    ]
    return "\n".join(
        [
            "[project]",
            f"site_name = {json.dumps(TITLES[language], ensure_ascii=False)}",
            'docs_dir = "pages"',
            'site_dir = "site"',
            "use_directory_urls = false",
            f"nav = {_navigation(language)}",
            "",
            "[project.theme]",
            f"language = {json.dumps(_THEME_LANGUAGES[language])}",
            "font = false",
            'features = ["content.code.copy", "navigation.sections", "navigation.top", "navigation.footer"]',
            "",
            "[[project.theme.palette]]",
            'media = "(prefers-color-scheme: light)"',
            'scheme = "default"',
            "",
            "[[project.theme.palette]]",
            'media = "(prefers-color-scheme: dark)"',
            'scheme = "slate"',
            "",
            "[project.extra]",
            "generator = false",
            "alternate = [",
            *alternates,
            "]",
            "",
            "[project.markdown_extensions]",
            "tables = {}",
            "admonition = {}",
            "attr_list = {}",
            'toc = { permalink = true, slugify = { object = "pymdownx.slugs.slugify", kwds = { case = "lower" } } }',
            "pymdownx.highlight = {}",
            "pymdownx.inlinehilite = {}",
            "pymdownx.superfences = {}",
            "",
        ]
    )


def _navigation(language: Language) -> str:
    """Returns the navigation as a list in TOML. A page has the title of its first heading."""
    items: list[str] = []
    for group in NAVIGATION:
        pages = [json.dumps(f"{page}.md") for page in group.pages if page_file(page, language).exists()]
        if group.titles:
            items.append(f"{{ {json.dumps(group.titles[language], ensure_ascii=False)} = [{', '.join(pages)}] }}")
        else:
            items += pages
    return f"[{', '.join(items)}]"


def _front_page() -> str:
    """Returns the page that leads to the languages."""
    items = "".join(
        f'<li><a href="{language}/index.html" lang="{language}" hreflang="{language}">{NAMES[language]}</a></li>'
        for language in LANGUAGES
    )
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Entrepot</title>'
    body = f"<h1>Entrepot</h1><ul>{items}</ul>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def external_addresses(site: Path) -> Iterator[str]:
    """Yields what the pages of a built site load from other servers, each with its page. Links that people may click
    are not loaded."""
    for file in sorted(site.rglob("*")):
        if file.suffix in (".html", ".css"):
            pattern = _EXTERNAL if file.suffix == ".html" else _IMPORT
            for found in pattern.finditer(file.read_text(encoding="utf-8")):
                if 'rel="canonical"' not in found[0]:
                    yield f"{file.relative_to(site)}: {found['url']}"
