"""The languages of the pages: chooses the language for a visitor, and reads the catalogues with the translations.

The source contains the texts of the pages in English. A *catalogue* is a gettext file `locale/NAME.po` with the
translations of these texts into another language. The server reads `.po` files, so nobody has to compile them. After a
change of texts, `make translations` updates the catalogues.
"""

from __future__ import annotations

import gettext
import re
from io import BytesIO
from pathlib import Path
from typing import Final

LANGUAGES: Final = {"en": "English", "zh-Hans": "简体中文"}
"""The name of each language in the language itself, by BCP 47 tag."""
DEFAULT_LANGUAGE: Final = "en"
LOCALE_FOLDER: Final = Path(__file__).parent / "locale"
CATALOGUES: Final = {"zh-Hans": LOCALE_FOLDER / "zh_Hans.po"}
"""The path of the catalogue of each language, by BCP 47 tag. English has no catalogue."""
_RANGE: Final = re.compile(r"\s*([A-Za-z]{1,8})(?:-[A-Za-z0-9-]{1,32})?\s*(?:;\s*q=([01](?:\.\d{0,3})?)\s*)?")
"""A language range with its weight (RFC 9110, 12.5.4). The groups are the primary language and the weight."""
_MAX_RANGES: Final = 30
"""The largest number of ranges that are read from an Accept-Language header. Browsers send a few."""


def negotiate_language(chosen: str, accept_language: str) -> str:
    """Returns the language for a visitor, a key of `LANGUAGES`. `chosen`: the language that the visitor has chosen; can
    be empty. `accept_language`: the Accept-Language header of the request.

    Returns `chosen` if it is a key of `LANGUAGES`. Otherwise returns the language with the highest weight in the
    header, or `DEFAULT_LANGUAGE` if the header names no language of `LANGUAGES`. Every variant of Chinese selects
    `zh-Hans`, because readers of all variants prefer it to English."""
    if chosen in LANGUAGES:
        return chosen
    languages = {tag.partition("-")[0]: tag for tag in LANGUAGES}  # by primary language, such as `zh`
    best, best_weight = DEFAULT_LANGUAGE, 0.0
    # `split` returns the ranges after the first `_MAX_RANGES` as one more text. The slice drops this text.
    for text in accept_language.split(",", _MAX_RANGES)[:_MAX_RANGES]:
        match = _RANGE.fullmatch(text)
        if match is None or match[1].lower() not in languages:
            continue
        weight = 1.0 if match[2] is None else float(match[2])
        if weight > best_weight:
            best, best_weight = languages[match[1].lower()], weight
    return best


def load_translations(language: str) -> gettext.NullTranslations:
    """Reads the catalogue of a language and returns the translations. For English, returns translations that leave
    each text unchanged. Takes some tens of milliseconds. Raises OSError if the catalogue cannot be read, and ValueError
    if it is malformed."""
    if language not in CATALOGUES:
        return gettext.NullTranslations()
    # Imported here, because Babel takes time to import and a server that shows no page does not need Babel.
    from babel.messages.mofile import write_mo
    from babel.messages.pofile import read_po

    compiled = BytesIO()
    with CATALOGUES[language].open("rb") as file:
        write_mo(compiled, read_po(file))
    compiled.seek(0)
    return gettext.GNUTranslations(compiled)


def translatable(text: str) -> str:
    """Marks `text` for translation, and returns it unchanged. `text` must be a string literal, because a tool
    collects the marked texts from the source (`make translations`)."""
    return text
