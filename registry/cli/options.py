"""The options that several sub-commands share, and how a failure ends the command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from registry.config.settings_sources import ConfigError, LoadedSettings, load_settings

USAGE_ERROR = 2
"""Exit code for a bad flag, variable or file; every other failure is 1."""

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", metavar="FILE", help="Settings in TOML. Else the file ENTREPOT_CONFIG names, if any."
    ),
]
DataOption = Annotated[
    str | None, typer.Option("--data", "-d", metavar="DIR", help="Directory that holds everything. [default: ./data]")
]
ListenOption = Annotated[
    str | None,
    typer.Option(
        "--listen", "-l", metavar="HOST:PORT", help="Address; port 0 picks a free one. [default: 127.0.0.1:5000]"
    ),
]
WorkersOption = Annotated[
    str | None,
    typer.Option("--workers", "-w", metavar="N", help="Server processes. [default: one a core, at most 4]"),
]
ReadOnlyOption = Annotated[bool | None, typer.Option("--read-only/--read-write", help="Refuse every push and delete.")]
InsecureOpenOption = Annotated[
    bool | None,
    typer.Option(
        "--insecure-open", help="Listen beyond this machine although there are no accounts: whoever comes may do all."
    ),
]
MirrorOption = Annotated[
    list[str] | None,
    typer.Option(
        "--mirror",
        metavar="NAME",
        help="Mirror a registry, such as docker.io; may be given again. The first answers for names without a host.",
    ),
]


def fail(message: str, code: int = 1) -> NoReturn:
    """One line on stderr, and the end."""
    typer.echo(f"entrepot: {message}", err=True)
    raise typer.Exit(code)


def load_or_fail(file: Path | None, **flags: Any) -> LoadedSettings:
    """The settings in force; a flag that is None was not given. Warnings go to stderr."""
    try:
        loaded = load_settings({name: value for name, value in flags.items() if value is not None}, file)
    except ConfigError as error:
        fail(str(error), USAGE_ERROR)
    for line in loaded.warnings:
        typer.echo(f"entrepot: warning: {line}", err=True)
    return loaded


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the command with one line for what an operator can do something about; anything else is a bug and shows
    its traceback."""
    from registry.cli.data_owner import OwnerError
    from storage.data_dir.check import DataDirectoryError
    from storage.errors import RegistryError

    try:
        yield
    except (DataDirectoryError, OwnerError) as error:
        fail(str(error))
    except RegistryError as error:
        fail(error.message)
