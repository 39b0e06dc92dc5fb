"""What commands print for people and for programs: tables, JSON, sizes, times.

`rich` is imported where it is used: most commands print no table, and importing it takes a noticeable time.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console
    from rich.table import Table

_UNBROKEN_COLUMNS = ("role", "platform", "size")


def plain_console() -> Console:
    """Returns a console that adds no colours of its own. A terminal wraps long lines; a file or pipe gets them
    whole."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 10_000)


def new_table(*columns: str) -> Table:
    """Returns an empty table. A cell that is too wide continues on the next line; it is never cut."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold", no_wrap=name in _UNBROKEN_COLUMNS)
    return table


def print_rows(columns: Sequence[str], rows: Sequence[Sequence[str]], empty: str) -> None:
    """Prints a table; without rows, prints the sentence `empty` on stderr instead."""
    from rich.text import Text

    if not rows:
        typer.echo(f"entrepot: {empty}", err=True)
        return
    table = new_table(*columns)
    for row in rows:
        table.add_row(*(Text(_printable(cell)) for cell in row))
    plain_console().print(table)


def _printable(text: str) -> str:
    """Replaces control characters, which could move the cursor or change colours, by `?`."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def print_json(items: Sequence[BaseModel] | BaseModel) -> None:
    """Prints models as indented JSON."""
    if isinstance(items, Sequence):
        plain: Any = [each.model_dump(mode="json") for each in items]
    else:
        plain = items.model_dump(mode="json")
    typer.echo(json.dumps(plain, indent=2, ensure_ascii=False))


def human_size(count: int) -> str:
    """Writes a number of bytes for people: `1536` as `1.5 KiB`."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{count} B" if units[0] == "B" else f"{size:.1f} {units[0]}"


def local_time(seconds: float | None, otherwise: str = "-") -> str:
    """Writes a Unix time as local time, to the minute; None as `otherwise`."""
    return otherwise if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def comma_list(words: Sequence[str]) -> str:
    """Joins words with commas; writes `-` when there are none."""
    return ", ".join(words) or "-"


def plural(count: int, word: str) -> str:
    """Writes a count with its noun: `1 blob`, `2 blobs`."""
    return f"{count} {word}{'' if count == 1 else 's'}"
