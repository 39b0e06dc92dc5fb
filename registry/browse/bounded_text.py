"""Cuts the texts in an image's config and annotations to what fits on a page: an image may have labels of a megabyte,
or a thousand of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

MAX_TEXT_CHARACTERS: Final = 4096
"""A longer text is cut."""
MAX_ENTRIES: Final = 200
"""Of a longer list or mapping, only the first entries are shown."""
MAX_TOTAL_CHARACTERS: Final = 256 * 1024
"""When the texts of one object have this many characters in all, the rest is left out."""


class TextBudget:
    """Cuts the texts of one object. `is_exceeded`: whether anything was cut or left out. Values that are not of the
    expected type are left out: nobody checks a config before it is pushed."""

    def __init__(self) -> None:
        self._remaining = MAX_TOTAL_CHARACTERS
        self.is_exceeded = False

    def text(self, value: object) -> str:
        """Returns a text, perhaps cut; an empty one for None and other values."""
        if not isinstance(value, str):
            return ""
        limit = min(MAX_TEXT_CHARACTERS, self._remaining)
        if len(value) > limit:
            self.is_exceeded = True
            value = value[:limit] + "…" if limit else ""
        # JSON can contain half of a surrogate pair, which cannot be written as UTF-8.
        value = value.encode("utf-8", "replace").decode()
        self._remaining = max(0, self._remaining - len(value))
        return value

    def texts(self, value: object) -> list[str]:
        """Returns the texts in a list."""
        return [self.text(entry) for entry in self._first(value if isinstance(value, list) else ())]

    def optional_texts(self, value: object) -> list[str] | None:
        """Returns the texts in a list; None if there is no list."""
        return self.texts(value) if isinstance(value, list) else None

    def names(self, value: object) -> list[str]:
        """Returns the names of the members of an object."""
        return [self.text(name) for name in self._first(value if isinstance(value, Mapping) else ())]

    def mapping(self, value: object) -> dict[str, str]:
        """Returns the members of an object whose values are texts."""
        if not isinstance(value, Mapping):
            return {}
        return {self.text(name): self.text(value[name]) for name in self._first(value)}

    def _first(self, values: Iterable[Any]) -> Iterable[Any]:
        for number, value in enumerate(values):
            if number == MAX_ENTRIES or not self._remaining:
                self.is_exceeded = True
                return
            yield value
