"""What holds for all commands: which arguments are texts (`CommandLine`)."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from registry.printable import is_utf8


class CommandLine(TyperGroup):
    """The command `entrepot`, with all its subcommands.

    Refuses arguments that are not UTF-8, as wrong usage: names, notes and paths of directories are stored in JSON and
    SQLite, which have only Unicode. Only the path of a file can have any bytes."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        """Runs the command line `args`; None: that of this process. Raises SystemExit."""
        words = sys.argv[1:] if args is None else list(args)
        if not all(map(is_utf8, words)):
            for parameter in _text_parameters(self):
                parameter.callback = _require_utf8
        return super().main(words, *rest, **options)


def _text_parameters(command: Any) -> Iterator[Any]:
    """Yields the arguments and options of a command, and of its subcommands, whose values must be UTF-8."""
    for subcommand in getattr(command, "commands", {}).values():
        yield from _text_parameters(subcommand)
    if isinstance(command, TyperCommand):
        yield from (each for each in command.params if "FILE" not in (getattr(each, "metavar", None) or ""))


def _require_utf8(_context: object, _parameter: object, value: Any) -> Any:
    """Returns the value of an argument or option unchanged. Raises typer.BadParameter if it is not UTF-8. typer calls
    this function."""
    parts = value if isinstance(value, list | tuple) else [value]
    if not all(is_utf8(str(part)) for part in parts):
        raise typer.BadParameter("it is not text in UTF-8")
    return value
