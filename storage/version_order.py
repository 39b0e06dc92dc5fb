"""The order in which people sort tags that are versions (`version_key`)."""

from __future__ import annotations

import re
from typing import Final

_PIECES: Final = re.compile(r"[0-9]+|[^0-9]+")
_PRE_RELEASE: Final = re.compile(r"[-._~]?(?:alpha|beta|dev|pre|preview|rc|snapshot)[-._]?", re.IGNORECASE)
"""Matches a piece of a tag that is only the name of a stage before a release."""
_LEADING_V: Final = re.compile(r"[vV](?=[0-9])")
_PRE_RELEASE_MARK, _END_MARK, _TEXT_MARK, _NUMBER_MARK = "\x00", "\x01", "\x02", "\x03"
"""The first character of each piece of a key. No tag contains these characters, and they sort before all characters of
tags. So `1.0-rc1` sorts before `1.0`, and `1.0` sorts before `1.0.1` and `1.0-alpine`."""


def version_key(tag: str) -> str:
    """Returns a text by which to sort tags as versions. Numbers sort by their value, and a stage such as `rc1` sorts
    before its release. A `v` at the beginning, as in `v1.2`, does not change a version's place among other versions.
    Texts sort before numbers: names such as `latest` come first, and the newest version comes last. Different tags have
    different keys."""
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
