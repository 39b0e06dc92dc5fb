"""The order in which people sort tags that are versions (`version_key`)."""

from __future__ import annotations

import re
from typing import Final

_PIECES: Final = re.compile(r"[0-9]+|[^0-9]+")
"""Splits a tag into *pieces*: runs of digits, and runs of other characters."""
_PRE_RELEASE: Final = re.compile(r"[-._~]?(?:alpha|beta|dev|pre|preview|rc|snapshot)[-._]?", re.IGNORECASE)
"""Matches a piece that names a pre-release, such as `-rc`, and has no other text."""
_LEADING_V: Final = re.compile(r"[vV](?=[0-9])")
_PRE_RELEASE_MARK, _END_MARK, _TEXT_MARK, _NUMBER_MARK = "\x00", "\x01", "\x02", "\x03"
"""The first character of each part of a key. The parts sort in this order: pre-release (`1.0-rc1`), end of the tag
(`1.0`), text (`1.0-alpine`), number. No tag contains these characters. They sort before all characters of tags."""


def version_key(tag: str) -> str:
    """Returns a text by which to sort tags as versions. Different tags have different keys.

    - Numbers sort by their value. The tag `v1.2` counts as version 1.2.
    - A pre-release sorts before its release: `1.0-rc1` before `1.0`.
    - Text sorts before numbers: names such as `latest` come first, and the newest version comes last."""
    parts = []
    for piece in _PIECES.findall(_LEADING_V.sub("", tag, count=1) if tag[:1] in "vV" else tag):
        if "0" <= piece[0] <= "9":
            digits = piece.lstrip("0")
            # A number with more digits is larger, so the number of digits comes first. A tag has at most 128 digits.
            parts.append(f"{_NUMBER_MARK}{chr(0x30 + len(digits))}{digits}")
        elif _PRE_RELEASE.fullmatch(piece):
            parts.append(_PRE_RELEASE_MARK + piece.lower())
        else:
            parts.append(_TEXT_MARK + piece)
    return f"{''.join(parts)}{_END_MARK}{tag}"
