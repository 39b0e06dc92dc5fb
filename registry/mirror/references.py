"""Files of references: one a line, `#` begins a comment."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from storage.errors import RegistryError
from storage.names import Location, parse_reference


class ReferencesError(Exception):
    """The references cannot be used; the text is one line for a person."""


def read_references(file: Path) -> list[str]:
    """What stands in it, in order. Raises ReferencesError."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ReferencesError(f"{file}: not UTF-8 text") from None
    except OSError as error:
        raise ReferencesError(f"{file}: cannot read the references: {(error.strerror or str(error)).lower()}") from None
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if len(words) > 1:
            raise ReferencesError(f"{file}: line {number}: one reference a line, please: {' '.join(words)}")
        found += words
    return found


def parse_references(texts: Iterable[str]) -> list[Location]:
    """Each once, in order. Raises ReferencesError that names the wrong one."""
    found: dict[Location, None] = {}
    for text in texts:
        try:
            found[parse_reference(text)] = None
        except RegistryError as error:
            raise ReferencesError(f"{text}: {error.message}") from None
    return list(found)
