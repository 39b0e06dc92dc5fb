"""Records the rows that the statements of a database connection read (`record_rows`)."""

from __future__ import annotations

from typing import Any

import apsw


def record_rows(db: apsw.Connection) -> list[tuple[Any, ...]]:
    """Returns a list to which each row is appended that a statement of the connection reads from now on."""
    read_rows: list[tuple[Any, ...]] = []

    def record(_: apsw.Cursor, row: tuple[Any, ...]) -> tuple[Any, ...]:
        read_rows.append(row)
        return row

    db.row_trace = record
    return read_rows
