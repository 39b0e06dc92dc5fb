"""Reads and updates the catalogue with the Chinese translations of the settings page. An update adds the new messages
of the page, and removes messages that the page no longer has.

`python -m book.settings_catalogue` updates the catalogue and writes the page in both languages. `make docs` runs it.
"""

from __future__ import annotations

from pathlib import Path

from babel.messages.catalog import Catalog
from babel.messages.pofile import read_po, write_po

from book.settings_page import render_settings_page

ROOT = Path(__file__).parent.parent
CATALOGUE = ROOT / "book" / "locale" / "zh.po"
PAGES = {language: ROOT / "docs" / language / "settings.md" for language in ("en", "zh")}
"""The file of the settings page for each language."""


def settings_messages() -> list[str]:
    """Returns the messages of the page without repetitions, in the order of the page."""
    messages: dict[str, None] = {}

    def collect(text: str) -> str:
        messages[text] = None
        return text

    render_settings_page(collect)
    return list(messages)


def translations() -> dict[str, str]:
    """Returns the translation of each message in the catalogue; an empty text if it is not translated yet."""
    with CATALOGUE.open("rb") as file:
        catalogue = read_po(file, locale="zh_Hans")
    return {str(message.id): str(message.string or "") for message in catalogue if message.id}


def render_in_chinese() -> str:
    """Returns the page in Chinese. Messages without a translation stay in English."""
    chinese = translations()
    return render_settings_page(lambda text: chinese.get(text) or text)


def update_catalogue() -> None:
    """Writes the catalogue with all messages of the page, in the order of the page. Keeps the existing translations."""
    chinese = translations() if CATALOGUE.exists() else {}
    catalogue = Catalog(locale="zh_Hans", fuzzy=False)
    for message in settings_messages():
        catalogue.add(message, chinese.get(message, ""))
    with CATALOGUE.open("wb") as file:
        write_po(file, catalogue, width=0, omit_header=False, sort_output=False)
    _shorten_header()


def _shorten_header() -> None:
    """Removes lines such as dates and versions from the header of the catalogue, so that the file changes only when its
    messages change."""
    lines = CATALOGUE.read_text(encoding="utf-8").splitlines(keepends=True)
    start = lines.index('msgid ""\n')
    kept_fields = ("Language:", "Plural-Forms:", "MIME-Version:", "Content-Type:", "Content-Transfer-Encoding:")
    end = lines.index("\n", start)
    header = [line for line in lines[start:end] if not line.startswith('"') or line[1:].startswith(kept_fields)]
    CATALOGUE.write_text("".join(header + lines[end:]), encoding="utf-8")


def main() -> None:
    """Updates the catalogue and writes the page in both languages."""
    update_catalogue()
    PAGES["en"].write_text(render_settings_page(), encoding="utf-8")
    PAGES["zh"].parent.mkdir(exist_ok=True)
    PAGES["zh"].write_text(render_in_chinese(), encoding="utf-8")


if __name__ == "__main__":
    main()
