"""Pages of lists whose entries differ in size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, TypeVar

from storage.content import Page

PARTS: Final = 10_000
"""Parts (a group's members, an account's groups, a token's limits) that the entries of a page have together, about."""
T = TypeVar("T")
Row = Sequence[Any]


def page_of(
    rows: Iterable[Any], entry_of: Callable[[Any], T], parts_of: Callable[[T], int], limit: int, most: int = PARTS
) -> Page[T]:
    """At most `limit` entries of `rows`, which are one more. The page ends earlier, after at least one entry, when its
    entries have `most` parts together, so that no page takes long to make and to send. Reads no row that it does not
    need; the rows are closed where they can be."""
    found: list[T] = []
    parts = 0
    more = False
    try:
        for row in rows:
            if len(found) == limit or (found and parts >= most):
                more = True
                break
            found.append(entry_of(row))
            parts += parts_of(found[-1])
    finally:
        close = getattr(rows, "close", None)
        if close is not None:
            close()
    return Page(found, more)
