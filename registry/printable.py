"""Makes text safe to print on a terminal or in a log. The text may come from an image, an archive, a settings file or
another server.

In this module, a *control character* is any character that Python does not count as printable: for example ESC, U+0080
to U+009F, a line break, a character that changes the direction of writing, and half of a surrogate pair.
"""

from __future__ import annotations

import re
from typing import Final

_KEPT_IN_TEXTS: Final = "\n\t"


def is_utf8(text: str) -> bool:
    """Returns whether the text can be encoded as UTF-8. A text with half of a surrogate pair cannot. In command-line
    arguments, environment variables and file names, Python decodes each byte that is not UTF-8 to half of a surrogate
    pair (PEP 383)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable_line(text: str) -> str:
    """Returns the text as one line: replaces each control character, including line breaks, by `?`."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else "?" for character in text)


def printable_text(text: str) -> str:
    """Returns the text after replacing each control character, except line feeds and tabs, by `?`."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() or character in _KEPT_IN_TEXTS else "?" for character in text)


def printable_json(document: str) -> str:
    """Returns the JSON text `document` with the control characters in its strings escaped. The values of the document
    stay the same."""
    return document if document.isprintable() else _POSSIBLE_CONTROL.sub(_json_escape, document)


def printable_toml(value: str) -> str:
    """Returns the TOML text `value` with the control characters in its strings escaped. The value stays the same.
    `value`: a string, number, boolean or list, as `json.dumps(…, ensure_ascii=False)` writes it. That text is valid
    TOML once DEL is escaped."""
    return value if value.isprintable() else _POSSIBLE_CONTROL.sub(_toml_escape, value)


_POSSIBLE_CONTROL: Final = re.compile(r"[^\n -~]")
"""Matches every character except line feeds and printable ASCII. In the JSON and TOML texts, each matched character is
inside a string, where the functions below can escape it."""


def _json_escape(match: re.Match[str]) -> str:
    character = match[0]
    if character.isprintable():
        return character
    code = ord(character)
    if code > 0xFFFF:  # JSON escapes such a character as a surrogate pair (RFC 8259, section 7)
        code -= 0x10000
        return f"\\u{0xD800 + (code >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04x}"
    return f"\\u{code:04x}"


def _toml_escape(match: re.Match[str]) -> str:
    character = match[0]
    if character.isprintable():
        return character
    code = ord(character)
    return f"\\U{code:08x}" if code > 0xFFFF else f"\\u{code:04x}"
