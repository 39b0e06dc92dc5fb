"""Makes text that comes from outside safe for a terminal or a log: without characters that control the terminal, change
the direction of writing, or cannot be encoded. Such text is in images, archives, settings files, and the responses of
other servers.

*Control characters* are here all characters that Python does not count as printable, such as ESC, the characters U+0080
to U+009F, line breaks, and halves of surrogate pairs.
"""

from __future__ import annotations

import re
from typing import Final

_KEPT_IN_TEXTS: Final = "\n\t"


def is_utf8(text: str) -> bool:
    """Returns whether the text can be encoded as UTF-8. Python decodes bytes that are not UTF-8 to halves of surrogate
    pairs (PEP 383), in the command line, the environment and file names. A text with such halves cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable_line(text: str) -> str:
    """Returns the text as one line: with `?` in place of each control character, including line breaks."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else "?" for character in text)


def printable_text(text: str) -> str:
    """Returns the text with `?` in place of each control character except line feeds and tabs."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() or character in _KEPT_IN_TEXTS else "?" for character in text)


def printable_json(document: str) -> str:
    """Returns the text of a JSON document with an escape in place of each control character in its strings. The values
    of the document stay the same."""
    return document if document.isprintable() else _POSSIBLE_CONTROL.sub(_json_escape, document)


def printable_toml(value: str) -> str:
    """Returns the text of a TOML value with an escape in place of each control character in its strings. The value
    stays the same. `value`: the text of a string, number, boolean or list, written with `json.dumps(…,
    ensure_ascii=False)`. This JSON is also TOML, except that TOML requires an escape for DEL."""
    return value if value.isprintable() else _POSSIBLE_CONTROL.sub(_toml_escape, value)


_POSSIBLE_CONTROL: Final = re.compile(r"[^\n -~]")
"""Matches every character except line feeds and printable ASCII. The functions below escape a match only if it is a
control character. Outside its strings, a document has only line feeds and printable ASCII, so a match is always inside
a string."""


def _json_escape(match: re.Match[str]) -> str:
    character = match[0]
    if character.isprintable():
        return character
    code = ord(character)
    if code > 0xFFFF:  # JSON writes it as a surrogate pair (RFC 8259, section 7)
        code -= 0x10000
        return f"\\u{0xD800 + (code >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04x}"
    return f"\\u{code:04x}"


def _toml_escape(match: re.Match[str]) -> str:
    character = match[0]
    if character.isprintable():
        return character
    code = ord(character)
    return f"\\U{code:08x}" if code > 0xFFFF else f"\\u{code:04x}"
