"""The languages of the pages: chooses the language for a visitor, and reads the catalogues with the translations.

The texts of the pages are in English. A catalogue is a gettext file `locale/NAME.po` with their translations into
another language. A process reads the file when it renders its first page in that language, so nobody has to compile it
beforehand. `make translations` updates the file after a change of texts.
"""

from __future__ import annotations

import gettext
import re
from io import BytesIO
from pathlib import Path
from typing import Final

LANGUAGES: Final = {"en": "English", "zh-Hans": "简体中文"}
"""By BCP 47 tag: what the speakers of the language call it."""
DEFAULT_LANGUAGE: Final = "en"
LOCALE_FOLDER: Final = Path(__file__).parent / "locale"
CATALOGUES: Final = {"zh-Hans": LOCALE_FOLDER / "zh_Hans.po"}
"""The catalogue of each language but English."""
_RANGE: Final = re.compile(r"\s*([A-Za-z]{1,8})(?:-[A-Za-z0-9-]{1,32})?\s*(?:;\s*q=([01](?:\.\d{0,3})?)\s*)?")
"""A language range with its weight (RFC 9110, 12.5.4). The groups are the primary language and the weight."""
_MAX_RANGES: Final = 30
"""How many ranges of an Accept-Language header are read. Browsers send a few."""


def choose_language(chosen: str, accept_language: str) -> str:
    """Returns a key of `LANGUAGES`. `chosen`: the visitor's choice on a page, or an empty string. `accept_language`:
    the browser's header. If `chosen` is empty, the available language with the highest weight in the header is used.
    Every variant of Chinese selects simplified Chinese, because readers of all variants prefer it to English."""
    if chosen in LANGUAGES:
        return chosen
    languages = {tag.partition("-")[0]: tag for tag in LANGUAGES}  # by primary language, such as `zh`
    best, best_weight = DEFAULT_LANGUAGE, 0.0
    # If the header has more ranges, `split` returns the rest as one more text, which the slice drops.
    for text in accept_language.split(",", _MAX_RANGES)[:_MAX_RANGES]:
        match = _RANGE.fullmatch(text)
        if match is None or match[1].lower() not in languages:
            continue
        weight = 1.0 if match[2] is None else float(match[2])
        if weight > best_weight:
            best, best_weight = languages[match[1].lower()], weight
    return best


def load_translations(language: str) -> gettext.NullTranslations:
    """Returns the translations into a language. For English, they return each text unchanged. Reads the catalogue,
    which takes some tens of milliseconds. Raises OSError if the file cannot be read, and ValueError if it is no
    catalogue."""
    if language not in CATALOGUES:
        return gettext.NullTranslations()
    # Imported late: Babel takes time to import, and a server that shows no page does not need it.
    from babel.messages.mofile import write_mo
    from babel.messages.pofile import read_po

    compiled = BytesIO()
    with CATALOGUES[language].open("rb") as file:
        write_mo(compiled, read_po(file))
    compiled.seek(0)
    return gettext.GNUTranslations(compiled)


def translatable(text: str) -> str:
    """Returns `text` unchanged. A call marks `text` as one that a page translates later. `text` has to be a string
    literal, because a tool collects it from the source for the catalogues."""
    return text
