"""The command `entrepot status`: shows the current state of the server of a data directory."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated

import typer

from registry.cli.options import (
    USAGE_ERROR,
    ConfigOption,
    DataOption,
    JsonOption,
    MirrorOption,
    fail,
    load_or_fail,
    one_line_errors,
)
from registry.cli.output import plain_console, print_json, print_json_document, print_line

if TYPE_CHECKING:
    from registry.admin.server_status import ServerStatus
    from registry.config import Settings
    from registry.upkeep.components import UpkeepComponents

HELP = (
    "Show what the server on this machine does now: its processes, traffic, disk, uploads, downloads, jobs, the use of "
    "the cache and the quotas, and how the upstreams respond. The exit code is 3 if no server runs."
)
EXAMPLES = "\b\nExamples:\n  entrepot status -c entrepot.toml\n  entrepot status --watch\n  entrepot status --json"
NOT_RUNNING = 3
"""Exit code if no server runs on the data directory. `systemctl status` uses the same code."""
WATCH_SECONDS = 1.0
"""Time between two updates with --watch."""


def status(
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Show the status again every second, until Ctrl-C.")
    ] = False,
    config: ConfigOption = None,
    data: DataOption = None,
    mirror: MirrorOption = None,
    as_json: JsonOption = False,
) -> None:
    """Prints the status once. With --watch, shows the status again every second until Ctrl-C; with --watch and --json,
    prints it as one line of JSON every second."""
    settings = load_or_fail(config, data=data, mirror=mirror).settings
    with one_line_errors():
        server_status = _run_on_store(settings, _read if not watch else _watch_json if as_json else _watch)
    if not as_json:
        _print(server_status)
    else:
        print_json(server_status)
    if not server_status.running:
        print_line(
            f"entrepot: no server runs on {server_status.disk.path}; start a server with `entrepot serve`, or name the "
            "right data directory with --data or --config",
            err=True,
        )
        raise typer.Exit(NOT_RUNNING)


def _run_on_store(settings: Settings, work: Callable[[UpkeepComponents], Awaitable[ServerStatus]]) -> ServerStatus:
    """Opens the store in the data directory, runs `work`, and returns its result. If the store cannot be opened,
    returns a status from the report files of the server's processes. Raises the store's error if the report files
    cannot be read or show no running server."""
    from registry.admin.server_status import status_without_store
    from registry.cli.data_owner import run_on_backend
    from storage.data_dir.check import DataDirectoryError
    from storage.errors import RegistryError

    try:
        return run_on_backend(settings, lambda backend: work(backend.upkeep))
    except (DataDirectoryError, RegistryError, OSError) as error:
        if not os.path.isdir(settings.data):  # `Path.is_dir` could raise another error
            raise
        try:
            status = status_without_store(settings, error.message if isinstance(error, RegistryError) else str(error))
        except OSError:  # this user may not read the reports either
            raise error from None
        if not status.running:
            raise
        return status


async def _read(upkeep: UpkeepComponents) -> ServerStatus:
    from registry.admin.server_status import read_server_status

    return await read_server_status(upkeep)


async def _watch_json(upkeep: UpkeepComponents) -> ServerStatus:
    """Prints one line of JSON every second, until the command is interrupted. Never returns."""
    import asyncio

    while True:
        print_json_document((await _read(upkeep)).model_dump_json())
        await asyncio.sleep(WATCH_SECONDS)


async def _watch(upkeep: UpkeepComponents) -> ServerStatus:
    """Shows the status in the terminal, until the command is interrupted. Never returns."""
    import asyncio
    import sys

    from rich.live import Live

    from registry.cli.ops.status_text import format_status

    if not sys.stdout.isatty():
        fail("--watch needs a terminal; without a terminal, use --watch with --json", USAGE_ERROR)
    before = await _read(upkeep)
    with Live(format_status(before), console=plain_console(), screen=True, auto_refresh=False) as live:
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            now = await _read(upkeep)
            live.update(format_status(now, before), refresh=True)
            before = now


def _print(server_status: ServerStatus) -> None:
    from registry.cli.ops.status_text import format_status

    plain_console().print(format_status(server_status))
