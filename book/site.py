"""Builds the documentation site: one site for each language in one folder, and a front page with links to both.

The site generator is Zensical (docs/adr/0021-the-book.md). It gets a copy of the pages without the marks for tests.
Pictures are copied together with the pages. A link to a file that is no page, such as code, becomes plain text.
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
    """The site could not be built, or the built site is faulty. The text says why."""


def build_site(target: Path) -> None:
    """Builds the site in the folder `target`, which is emptied first. Raises BuildFailed if the generator prints a
    warning, or if a page would load a file from another server."""
    shutil.rmtree(target, ignore_errors=True)
    source = target.with_name(f"{target.name}-source")
    shutil.rmtree(source, ignore_errors=True)
    for language in LANGUAGES:
        _build_language(language, source / language, target / language)
    (target / "index.html").write_text(_front_page(), encoding="utf-8")
    if found := sorted(external_addresses(target)):
        raise BuildFailed("pages load something from elsewhere:\n" + "\n".join(found))


def _build_language(language: Language, source: Path, target: Path) -> None:
    """Builds the site of one language below `source`, and moves it to `target`. Raises BuildFailed if the generator
    reports an error or a warning."""
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
    shutil.move(source / "site", target)  # the generator can write only below the folder of its configuration


def copy_pages(language: Language, folder: Path) -> None:
    """Copies the pages of a language and their pictures into `folder`, in the form that the generator needs."""
    folder.mkdir(parents=True)
    for file in sorted((DOCS / language).glob("*.md")):
        text = without_marks(file.read_text(encoding="utf-8"))
        targets: dict[str, str | None] = {}
        for link in links(text):
            if link.startswith("../"):
                targets[link] = _copy_picture(file.parent / link, folder)
        (folder / file.name).write_text(replace_links(text, targets), encoding="utf-8")


def _copy_picture(file: Path, folder: Path) -> str | None:
    """Copies a picture into the folder of the pages, and returns its new path relative to the pages. Returns None if
    the file is no picture."""
    if file.suffix not in _PICTURES:
        return None
    target = folder / "pictures" / file.name
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(file, target)
    return f"pictures/{file.name}"


def _configuration(language: Language) -> str:
    """Returns the settings of the generator as TOML. Strings are written as JSON strings, which are valid in TOML."""
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
    """Returns the navigation as a TOML list. It has no titles of pages, because the generator uses the first heading of
    a page as its title."""
    items: list[str] = []
    for group in NAVIGATION:
        pages = [json.dumps(f"{page}.md") for page in group.pages if page_file(page, language).exists()]
        if group.titles:
            items.append(f"{{ {json.dumps(group.titles[language], ensure_ascii=False)} = [{', '.join(pages)}] }}")
        else:
            items += pages
    return f"[{', '.join(items)}]"


def _front_page() -> str:
    """Returns the HTML of the front page, which has a link to the site in each language."""
    items = "".join(
        f'<li><a href="{language}/index.html" lang="{language}" hreflang="{language}">{NAMES[language]}</a></li>'
        for language in LANGUAGES
    )
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Entrepot</title>'
    body = f"<h1>Entrepot</h1><ul>{items}</ul>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def external_addresses(site: Path) -> Iterator[str]:
    """Yields each address on another server from which a page of a built site would load a file, together with the
    page. Leaves out links that people can click, because a browser does not load them."""
    for file in sorted(site.rglob("*")):
        if file.suffix in (".html", ".css"):
            pattern = _EXTERNAL if file.suffix == ".html" else _IMPORT
            for found in pattern.finditer(file.read_text(encoding="utf-8")):
                if 'rel="canonical"' not in found[0]:
                    yield f"{file.relative_to(site)}: {found['url']}"
