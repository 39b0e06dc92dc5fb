"""Output of commands, for people and for programs: lines, tables, JSON, sizes, times.

Commands print only with the functions of this module. These functions replace control characters: a name or text from
an image, an archive, the settings or another server could control the terminal with them.

The functions import `rich` only when they need it, because the import is slow.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from registry.printable import printable_json, printable_line, printable_text
from storage.human_text import MAX_SHOWN_TIME

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console
    from rich.table import Table

_UNWRAPPED_COLUMNS = ("role", "platform", "size")
"""Names of columns whose cells never wrap to a second line."""


def print_line(text: str, *, err: bool = False) -> None:
    """Prints one line on stdout (with `err`, on stderr). Prints `?` in place of each control character, including line
    breaks."""
    typer.echo(printable_line(text), err=err)


def print_text(text: str, *, err: bool = False, end: str = "\n") -> None:
    """Prints `text`, which may have several lines, and then `end`, on stdout (with `err`, on stderr). Prints `?` in
    place of each control character that is not a line break or tab."""
    typer.echo(printable_text(text) + end, err=err, nl=False)


def plain_console() -> Console:
    """Returns a console that prints to stdout, without automatic highlighting. It prints `?` in place of control
    characters in the printed texts. It wraps long lines in a terminal, but not in a file or a pipe."""
    from registry.cli.printable_console import PrintableConsole

    return PrintableConsole(highlight=False, width=None if sys.stdout.isatty() else 10_000)


def progress_console() -> Console:
    """Returns a console for progress bars. It prints to stderr, and prints `?` in place of control characters in the
    printed texts."""
    from registry.cli.printable_console import PrintableConsole

    return PrintableConsole(stderr=True)


def new_table(*columns: str) -> Table:
    """Returns a table without rows. Text that is too wide for its column is cut off in the columns of
    `_UNWRAPPED_COLUMNS`, and wraps in other columns."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold", no_wrap=name in _UNWRAPPED_COLUMNS)
    return table


def print_rows(columns: Sequence[str], rows: Sequence[Sequence[str]], empty_message: str) -> None:
    """Prints a table on stdout. If there are no rows, prints only `empty_message`, on stderr."""
    from rich.text import Text

    if not rows:
        print_line(f"entrepot: {empty_message}", err=True)
        return
    table = new_table(*columns)
    for row in rows:
        table.add_row(*(Text(printable_line(cell)) for cell in row))
    plain_console().print(table)


def print_json(models: Sequence[BaseModel] | BaseModel) -> None:
    """Prints one model as an indented JSON object, or a list of models as an indented JSON array."""
    if isinstance(models, Sequence):
        json_value: Any = [model.model_dump(mode="json") for model in models]
    else:
        json_value = models.model_dump(mode="json")
    print_json_value(json_value, indent=2)


def print_json_value(value: Any, *, indent: int | None = None) -> None:
    """Prints a value of JSON types as a JSON document. `indent`: the number of spaces for each level; None: prints the
    document on one line."""
    print_json_document(json.dumps(value, indent=indent, ensure_ascii=False))


def print_json_document(document: str) -> None:
    """Prints a JSON document. Prints JSON escapes in place of control characters in the document's strings."""
    typer.echo(printable_json(document))


def human_size(size_bytes: int) -> str:
    """Returns a number of bytes as text for people, such as `1.5 KiB` for 1536."""
    size, units = float(size_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size_bytes} B" if units[0] == "B" else f"{size:.1f} {units[0]}"


def local_time(unix_seconds: float | None, none_text: str = "-") -> str:
    """Returns a Unix time as text in local time, such as `2026-01-31 09:30`. Shows every time after `MAX_SHOWN_TIME`,
    which is in the year 9999, as `MAX_SHOWN_TIME`. Returns `none_text` for None."""
    if unix_seconds is None:
        return none_text
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(min(unix_seconds, MAX_SHOWN_TIME)))


def comma_list(words: Sequence[str]) -> str:
    """Returns the words joined with commas, or `-` if there are none."""
    return ", ".join(words) or "-"


def plural(count: int, word: str) -> str:
    """Returns a count with its noun: `1 blob`, `2 blobs`."""
    return f"{count} {word}{'' if count == 1 else 's'}"
