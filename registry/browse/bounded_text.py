"""Shortens the texts in an image's config and annotations so that they fit on a page (`TextBudget`). An image can
have labels of a megabyte, or thousands of labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

MAX_TEXT_CHARACTERS: Final = 4096
"""Largest number of characters of one text. A longer text is cut."""
MAX_ENTRIES: Final = 200
"""Largest number of entries of one list or mapping. Further entries are left out."""
MAX_TOTAL_CHARACTERS: Final = 256 * 1024
"""Largest total number of characters that one `TextBudget` returns. Further texts are cut or left out."""


class TextBudget:
    """Shortens the texts that a page shows, for example all texts of one config. `is_exceeded`: whether a text was cut
    or left out because of a limit.

    The registry does not check the content of a config, so a value can have an unexpected type. For such a value, a
    method returns an empty result and leaves `is_exceeded` unchanged."""

    def __init__(self) -> None:
        self._remaining = MAX_TOTAL_CHARACTERS
        self.is_exceeded = False

    def text(self, value: object) -> str:
        """Returns `value`, cut if it is too long. Returns an empty text if `value` is not a text."""
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
        """Returns the texts in a list. An entry that is not a text becomes an empty text."""
        return [self.text(entry) for entry in self._within_limits(value if isinstance(value, list) else ())]

    def optional_texts(self, value: object) -> list[str] | None:
        """Returns the result of `texts`. Returns None if `value` is not a list."""
        return self.texts(value) if isinstance(value, list) else None

    def names(self, value: object) -> list[str]:
        """Returns the names of the members of a JSON object."""
        return [self.text(name) for name in self._within_limits(value if isinstance(value, Mapping) else ())]

    def mapping(self, value: object) -> dict[str, str]:
        """Returns the members of a JSON object. A member whose value is not a text gets an empty text."""
        if not isinstance(value, Mapping):
            return {}
        return {self.text(name): self.text(value[name]) for name in self._within_limits(value)}

    def _within_limits(self, values: Iterable[Any]) -> Iterable[Any]:
        """Yields the first values. Stops after `MAX_ENTRIES` values, or when the budget is used up."""
        for number, value in enumerate(values):
            if number == MAX_ENTRIES or not self._remaining:
                self.is_exceeded = True
                return
            yield value
