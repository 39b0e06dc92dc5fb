"""`entrepot mirror`: what is fetched ahead, looked at, asked for again and dropped, beside a running server or not."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from registry.cli.data_owner import prepare_data_directory
from registry.cli.interrupts import run_interruptible
from registry.cli.options import (
    USAGE_ERROR,
    ConfigOption,
    DataOption,
    MirrorOption,
    fail,
    load_or_fail,
    one_line_errors,
)
from registry.config import Settings

if TYPE_CHECKING:
    from registry.mirror.warm.targets import Platform
    from registry.mirror.warm.warmer import WarmResult
    from registry.router import Router
    from storage.names import ImageReference
    from storage.store.stored_registry import StoredRegistry

HELP = "What is mirrored: fetch it ahead, look at it, ask for it again, drop it. The registry may be running."
INTERRUPTED_WARM = "interrupted; what has come stays, and the same command goes on from there"

app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None)

ReferencesArgument = Annotated[
    list[str], typer.Argument(metavar="REF", help="NAME, NAME:TAG or NAME@DIGEST, as one pulls.")
]


@app.command(
    "warm",
    help="Fetch images of an upstream before anybody asks for them.",
    epilog="""\b
Examples:
  entrepot mirror warm ubuntu:24.04 ghcr.io/org/app:1 --mirror docker.io --mirror ghcr.io
  entrepot mirror warm --file images.txt --platform linux/amd64 --platform linux/arm64
  entrepot mirror warm --config entrepot.toml

Without REF and --file it fetches what [warm] in the settings names. What is here is not fetched again, and after
an interruption the same command goes on where it was.""",
)
def warm(
    references: Annotated[
        list[str] | None, typer.Argument(metavar="REF", help="NAME, NAME:TAG or NAME@DIGEST, as one pulls.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", metavar="FILE", help="More references, one a line; # comments.")
    ] = None,
    platform: Annotated[
        list[str] | None,
        typer.Option("--platform", metavar="OS/ARCH", help="May be given again. [default: this machine's]"),
    ] = None,
    all_platforms: Annotated[bool, typer.Option("--all-platforms", help="Everything an index lists.")] = False,
    config: ConfigOption = None,
    data: DataOption = None,
    mirror: MirrorOption = None,
) -> None:
    settings = _load(config, data, mirror)
    with one_line_errors():
        from registry.cli.mirror import warm_progress
        from registry.mirror.warm.targets import ReferencesError, parse_references, read_references

        if platform and all_platforms:
            fail("--platform and --all-platforms contradict each other", USAGE_ERROR)
        platforms = _platforms(["all"] if all_platforms else platform or settings.warm.platforms)
        named = references or file
        file = file if named else settings.warm.file
        try:
            listed = read_references(file) if file else []
            places = parse_references([*((references or []) if named else settings.warm.references), *listed])
        except ReferencesError as error:
            fail(str(error), USAGE_ERROR)
        if not places:
            fail(f"{file} names nothing" if file else "name what to fetch: a reference, --file, or [warm]", USAGE_ERROR)
        prepare_data_directory(settings, make=True)
        began = time.monotonic()
        outcomes = run_interruptible(_warm(settings, places, platforms), INTERRUPTED_WARM)
        typer.echo(warm_progress.total_text(outcomes, began))
        raise typer.Exit(any(each.error is not None for each in outcomes))


async def _warm(settings: Settings, places: list[ImageReference], platforms: list[Platform] | None) -> list[WarmResult]:
    from registry.cli.mirror import warm_progress
    from registry.mirror.warm.warmer import Warmer

    async with _open(settings) as (router, stored):
        with warm_progress.show_progress() as watcher:
            return await Warmer(router.locate, stored.metadata.known_blobs, platforms, watcher).warm(places)


@app.command(
    "status",
    help="Show what of each upstream is here, what is on its way in, and how many requests are left.",
    epilog="""\b
Examples:
  entrepot mirror status --config entrepot.toml
  entrepot mirror status --mirror docker.io --json""",
)
def status(
    config: ConfigOption = None,
    data: DataOption = None,
    mirror: MirrorOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    settings = _load(config, data, mirror)
    with one_line_errors():
        from registry.cli.mirror import mirror_status

        prepare_data_directory(settings, make=False)
        seen = run_interruptible(_status(settings))
    if as_json:
        typer.echo(json.dumps(seen, indent=2))
    else:
        mirror_status.print_status(seen)


async def _status(settings: Settings) -> dict[str, Any]:
    from registry.cli.mirror import mirror_status

    async with _open(settings) as (_, stored):
        return await mirror_status.read_status(settings, stored.records)


@app.command(
    "refresh",
    help="Ask the upstream now what a tag points at, however fresh the cached answer is.",
    epilog="""\b
Examples:
  entrepot mirror refresh ubuntu:24.04 --mirror docker.io""",
)
def refresh(
    references: ReferencesArgument, config: ConfigOption = None, data: DataOption = None, mirror: MirrorOption = None
) -> None:
    settings = _load(config, data, mirror)
    with one_line_errors():
        places = _parse(references)
        prepare_data_directory(settings, make=True)
        raise typer.Exit(run_interruptible(_refresh(settings, places)))


async def _refresh(settings: Settings, places: list[ImageReference]) -> bool:
    from registry.cli.mirror.refresh_purge import refresh_reference

    return await _report_each(settings, places, refresh_reference)


@app.command(
    "purge",
    help="Drop what is cached of a tag, a digest, or with --all a whole repository.",
    epilog="""\b
Examples:
  entrepot mirror purge ubuntu:24.04 --mirror docker.io
  entrepot mirror purge --all ghcr.io/org/app --config entrepot.toml

The next pull fetches it again. The upstream is not asked and keeps what it has.""",
)
def purge(
    references: ReferencesArgument,
    everything: Annotated[bool, typer.Option("--all", help="REF is a NAME: drop all that is in it.")] = False,
    config: ConfigOption = None,
    data: DataOption = None,
    mirror: MirrorOption = None,
) -> None:
    settings = _load(config, data, mirror)
    with one_line_errors():
        if everything and (tagged := next((text for text in references if _has_reference(text)), None)):
            fail(f"{tagged}: --all takes a name without tag and digest", USAGE_ERROR)
        places = _parse(references)
        prepare_data_directory(settings, make=False)
        raise typer.Exit(run_interruptible(_purge(settings, places, everything)))


async def _purge(settings: Settings, places: list[ImageReference], everything: bool) -> bool:
    from functools import partial

    from registry.cli.mirror.refresh_purge import purge_reference

    act = partial(purge_reference, data=settings.data, grace=settings.gc.grace, everything=everything)
    return await _report_each(settings, places, act, whole=everything)


async def _report_each(settings: Settings, places: list[ImageReference], act: Any, *, whole: bool = False) -> bool:
    """Prints what `act` says of each, errors on stderr; whether there were any. `whole`: it is about repositories, not
    about what their references name."""
    from storage.errors import RegistryError

    failed = False
    async with _open(settings) as (router, stored):
        for where in places:
            name = where.repository if whole else where
            try:
                typer.echo(f"{name}: {await act(router, stored, where)}")
            except RegistryError as error:
                typer.echo(f"entrepot: {name}: {error.message}", err=True)
                failed = True
    return failed


def _load(config: Path | None, data: str | None, mirror: list[str] | None) -> Settings:
    settings = load_or_fail(config, data=data, mirror=mirror or None).settings
    if not settings.upstream:
        fail(
            "nothing is mirrored: name an upstream with --mirror docker.io, or give the server's --config", USAGE_ERROR
        )
    return settings


def _platforms(texts: list[str]) -> list[Platform] | None:
    """None: all of them."""
    from registry.mirror.warm.targets import parse_platforms

    try:
        return parse_platforms(texts)
    except ValueError as error:
        fail(f"--platform: {error}", USAGE_ERROR)


def _parse(references: list[str]) -> list[ImageReference]:
    from registry.mirror.warm.targets import ReferencesError, parse_references

    try:
        return parse_references(references)
    except ReferencesError as error:
        fail(str(error), USAGE_ERROR)


def _has_reference(text: str) -> bool:
    return "@" in text or ":" in text.rpartition("/")[2]


@asynccontextmanager
async def _open(settings: Settings) -> AsyncIterator[tuple[Router, StoredRegistry]]:
    """As one more process beside those that serve."""
    import logging

    from registry.backend import open_backend

    logging.getLogger("registry").addHandler(logging.NullHandler())  # what goes wrong is told here
    async with open_backend(settings) as backend:
        yield backend.router, backend.stored
