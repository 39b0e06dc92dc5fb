"""Which rows of a table are measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from bench.errors import BenchFailed


class Named(Protocol):
    """Whatever `--only` can name."""

    name: str


Row = TypeVar("Row", bound=Named)


def pick(rows: Sequence[Row], only: str | None) -> list[Row]:
    """The rows of a comma-separated list, in their own order; all without one. Raises BenchFailed for a name that is
    none."""
    known = [row.name for row in rows]
    wanted = [name.strip() for name in only.split(",")] if only else known
    if unknown := [name for name in wanted if name not in known]:
        raise BenchFailed(f"no row is called {', '.join(unknown)}; there are: {', '.join(known)}")
    return [row for row in rows if row.name in wanted]
