"""Options that several subcommands share, the loading of the settings, and functions that end a command with an error
message."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import typer

from registry.cli.output import print_line
from registry.cli.standard_streams import STDOUT_NAME
from registry.config.settings_sources import ConfigError, LoadedSettings, check_ports, load_settings

USAGE_ERROR = 2
"""Exit code for an invalid flag, environment variable or settings file. The exit code for other failures is 1."""

MAX_ID: Final = 10**18 - 1
"""Largest id of a job or an event that a command accepts, as in the management API (`registry.http.query.MAX_NUMBER`).
All numbers with 18 digits fit into the 64-bit integers of SQLite. For a number that does not fit, Python's SQLite
library raises OverflowError."""
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", metavar="FILE", help="Settings file in TOML. [default: the file that ENTREPOT_CONFIG names]"
    ),
]
DataOption = Annotated[
    str | None, typer.Option("--data", "-d", metavar="DIR", help="The data directory. [default: ./data]")
]
ListenOption = Annotated[
    str | None,
    typer.Option(
        "--listen",
        "-l",
        metavar="HOST:PORT",
        help="Address to listen on; port 0 picks a free port. [default: 127.0.0.1:5000]",
    ),
]
WorkersOption = Annotated[
    str | None,
    typer.Option(
        "--workers", "-w", metavar="N", help="Number of server processes. [default: one for each core, at most 4]"
    ),
]
ReadOnlyOption = Annotated[
    bool | None, typer.Option("--read-only/--read-write", help="Refuse every push and every delete.")
]
InsecureOpenOption = Annotated[
    bool | None,
    typer.Option(
        "--insecure-open",
        help="Let other machines connect although there are no accounts: then anyone can push and delete.",
    ),
]
MirrorOption = Annotated[
    list[str] | None,
    typer.Option(
        "--mirror",
        metavar="NAME",
        help="Mirror a registry, such as docker.io. Repeat for more; the first one serves image names without a host, "
        "such as ubuntu.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def fail(message: str, code: int = 1) -> NoReturn:
    """Prints `message` as one line on stderr and ends the command with the exit code `code`."""
    print_line(f"entrepot: {message}", err=True)
    raise typer.Exit(code)


def given_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the flags that the user has given. In `flags`, a flag that was not given has the value None or an empty
    list."""
    return {name: value for name, value in flags.items() if value is not None and value != []}


def load_or_fail(file: Path | None, **flags: Any) -> LoadedSettings:
    """Loads the settings from `flags`, environment variables and the settings file. Prints warnings on stderr. Ends the
    command if a setting is invalid.

    `file`: the value of --config. `flags`: maps the name of a setting to the value of its flag, which is None or an
    empty list if the flag was not given."""
    try:
        loaded = load_settings(given_flags(flags), file)
    except ConfigError as error:
        fail(str(error), USAGE_ERROR)
    for warning in loaded.warnings:
        print_line(f"entrepot: warning: {warning}", err=True)
    return loaded


def load_server_settings_or_fail(file: Path | None, **flags: Any) -> LoadedSettings:
    """Does the same as `load_or_fail`. Also ends the command if the settings give the registry and the metrics the same
    port."""
    loaded = load_or_fail(file, **flags)
    try:
        check_ports(loaded)
    except ConfigError as error:
        fail(str(error), USAGE_ERROR)
    return loaded


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Context manager. If the block raises an error that an operator can fix, ends the command with one line on stderr
    and exit code 1. Any other exception is a bug and passes through, so that its traceback is shown."""
    from registry.cli.data_owner import OwnerError
    from storage.data_dir.check import DataDirectoryError
    from storage.errors import RegistryError

    try:
        yield
    except (DataDirectoryError, OwnerError) as error:
        fail(str(error))
    except RegistryError as error:
        fail(error.message_for_operators())
    except OSError as error:
        if error.filename is None:  # without a file name, the message does not show what to fix
            raise
        if error.filename == STDOUT_NAME:  # stdout cannot be written: `CommandLine` handles this error
            raise
        fail(f"{error.filename}: {error.strerror}")  # for example, this user has no permission to read the file
