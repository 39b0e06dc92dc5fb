"""Shortens the texts in an image's config and annotations so that they fit on a page. An image can have labels of a
megabyte, or thousands of labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

MAX_TEXT_CHARACTERS: Final = 4096
"""The length to which a longer text is cut."""
MAX_ENTRIES: Final = 200
"""How many entries of a list or mapping are shown. Further entries are left out."""
MAX_TOTAL_CHARACTERS: Final = 256 * 1024
"""Largest number of characters of all texts of one `TextBudget` together. Further texts are left out."""


class TextBudget:
    """Shortens the texts that a page shows, for example the texts of one config. `is_exceeded`: whether a limit was
    reached, so that a text was cut or left out.

    The registry stores a config without checking its content. So a value can have an unexpected type. The methods then
    return an empty result, and `is_exceeded` does not change."""

    def __init__(self) -> None:
        self._remaining = MAX_TOTAL_CHARACTERS
        self.is_exceeded = False

    def text(self, value: object) -> str:
        """Returns a text, which is cut if it is too long. If `value` is no text, returns an empty text."""
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
        return [self.text(entry) for entry in self._within_limits(value if isinstance(value, list) else ())]

    def optional_texts(self, value: object) -> list[str] | None:
        """Returns the texts in a list; None if there is no list."""
        return self.texts(value) if isinstance(value, list) else None

    def names(self, value: object) -> list[str]:
        """Returns the names of the members of a JSON object."""
        return [self.text(name) for name in self._within_limits(value if isinstance(value, Mapping) else ())]

    def mapping(self, value: object) -> dict[str, str]:
        """Returns the members of a JSON object, by name. A value that is no text becomes an empty text."""
        if not isinstance(value, Mapping):
            return {}
        return {self.text(name): self.text(value[name]) for name in self._within_limits(value)}

    def _within_limits(self, values: Iterable[Any]) -> Iterable[Any]:
        """Yields the first values, until there are `MAX_ENTRIES` of them or the budget is used up."""
        for number, value in enumerate(values):
            if number == MAX_ENTRIES or not self._remaining:
                self.is_exceeded = True
                return
            yield value
