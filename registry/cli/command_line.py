"""`CommandLine`: the rules for all commands. The rules say which arguments must be UTF-8, and how a command ends if a
write to the standard output fails."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from registry.cli.output import print_line
from registry.cli.standard_streams import STDOUT_NAME, discard_stdout
from registry.printable import is_utf8


class CommandLine(TyperGroup):
    """The command `entrepot`, with all its subcommands.

    All arguments must be UTF-8, except paths of files. If an argument breaks this rule, the command ends with a usage
    error. The reason for the rule is that names, notes and paths of directories are stored in JSON and SQLite, which
    have only Unicode.

    If a write to the standard output fails, ends the command with exit code 1. Prints one line about the error to
    stderr, except if the standard output is a pipe that nobody reads any more."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        """Runs the command. `args`: the arguments of the command; None: the arguments of this process. Passes `rest`
        and `options` on to typer. Raises SystemExit."""
        arguments = sys.argv[1:] if args is None else list(args)
        if not all(map(is_utf8, arguments)):
            for parameter in _utf8_parameters(self):
                parameter.callback = _require_utf8
        try:
            return super().main(arguments, *rest, **options)
        except SystemExit as end:
            try:
                sys.stdout.flush()
            except OSError as error:
                discard_stdout()
                if not end.code:  # a command that has failed keeps its own exit code
                    _end_without_stdout(error)
            raise
        except OSError as error:
            if error.filename != STDOUT_NAME:  # the error is not about the standard output
                raise
            _end_without_stdout(error)


def _end_without_stdout(error: OSError) -> None:
    """Ends the command after a write to the standard output has failed. Raises SystemExit."""
    discard_stdout()
    if not isinstance(error, BrokenPipeError):
        with suppress(OSError):
            print_line(f"entrepot: cannot write to the {STDOUT_NAME}: {error.strerror}", err=True)
    raise SystemExit(1)


def _utf8_parameters(command: Any) -> Iterator[Any]:
    """Yields the arguments and options of a command and its subcommands whose values must be UTF-8. The other arguments
    and options name a file: their metavar (the placeholder in the help text) contains `FILE`."""
    for subcommand in getattr(command, "commands", {}).values():
        yield from _utf8_parameters(subcommand)
    if isinstance(command, TyperCommand):
        yield from (param for param in command.params if "FILE" not in (getattr(param, "metavar", None) or ""))


def _require_utf8(_context: object, _parameter: object, value: Any) -> Any:
    """A callback for typer. Returns the value of an argument or option unchanged. Raises typer.BadParameter if the
    value is not UTF-8."""
    parts = value if isinstance(value, list | tuple) else [value]
    if not all(is_utf8(str(part)) for part in parts):
        raise typer.BadParameter("it is not text in UTF-8")
    return value
