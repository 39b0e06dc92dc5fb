"""The command `entrepot mirror`: fetches mirrored content ahead, shows it, refreshes tags and drops cached content."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from registry.cli.data_owner import prepare_data_directory
from registry.cli.interrupts import INTERRUPTED, run_interruptible
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
from registry.config import Settings

if TYPE_CHECKING:
    from registry.mirror.warm.targets import Platform
    from registry.mirror.warm.warmer import WarmResult
    from registry.router import Router
    from storage.names import ImageReference
    from storage.store.stored_registry import StoredRegistry

T = TypeVar("T")

HELP = "Fetch upstream images ahead; show, refresh and drop cached ones. A server may be running."
INTERRUPTED_WARM = "interrupted; what has come stays, and the same command continues from there"

app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None)

_REFERENCE = typer.Argument(metavar="REF", help="NAME, NAME:TAG or NAME@DIGEST, as in docker pull.")
ReferencesArgument = Annotated[list[str], _REFERENCE]
OptionalReferencesArgument = Annotated[list[str] | None, _REFERENCE]


@app.command(
    "warm",
    help="Fetch images from upstream registries before anyone pulls them.",
    epilog="""\b
Examples:
  entrepot mirror warm ubuntu:24.04 ghcr.io/org/app:1 --mirror docker.io --mirror ghcr.io
  entrepot mirror warm --file images.txt --platform linux/amd64 --platform linux/arm64
  entrepot mirror warm --config entrepot.toml

Without REF and --file it fetches the images in [warm] of the settings. Content that is cached already is not
fetched again: after an interruption, run the same command again and it continues.""",
)
def warm(
    references: OptionalReferencesArgument = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", metavar="FILE", help="File with one reference a line; # begins a comment."),
    ] = None,
    platform: Annotated[
        list[str] | None,
        typer.Option("--platform", metavar="OS/ARCH", help="Repeat for more. [default: this machine's platform]"),
    ] = None,
    all_platforms: Annotated[bool, typer.Option("--all-platforms", help="Fetch every platform.")] = False,
    config: ConfigOption = None,
    data: DataOption = None,
    mirror: MirrorOption = None,
) -> None:
    """Fetches the images. The exit code is 1 when one of them failed."""
    settings = _load(config, data, mirror)
    with one_line_errors():
        from registry.cli.mirror.warm_progress import total_text

        if platform and all_platforms:
            fail("--platform and --all-platforms contradict each other; give one of them", USAGE_ERROR)
        platforms = _platforms(["all"] if all_platforms else platform or settings.warm.platforms)
        targets = _targets(settings, references or [], file)
        began = time.monotonic()
        outcomes = _run_on_mirrors(
            settings, partial(_warm, targets=targets, platforms=platforms), create=True, reason=INTERRUPTED_WARM
        )
        typer.echo(total_text(outcomes, began))
        raise typer.Exit(any(each.error is not None for each in outcomes))


def _targets(settings: Settings, references: list[str], file: Path | None) -> list[ImageReference]:
    """Returns the images to fetch: those of the command line, or without any those of the settings."""
    from registry.mirror.warm.targets import ReferencesError, parse_references, read_references

    if not references and file is None:
        references, file = settings.warm.references, settings.warm.file
    try:
        targets = parse_references([*references, *(read_references(file) if file else [])])
    except ReferencesError as error:
        fail(str(error), USAGE_ERROR)
    if not targets:
        fail(
            f"{file} names no images"
            if file
            else "name what to fetch: give references or --file, or set [warm] in the settings",
            USAGE_ERROR,
        )
    return targets


async def _warm(
    router: Router, stored: StoredRegistry, *, targets: list[ImageReference], platforms: list[Platform] | None
) -> list[WarmResult]:
    from registry.cli.mirror.warm_progress import show_progress
    from registry.mirror.warm.warmer import Warmer

    with show_progress() as observer:
        return await Warmer(router.locate, stored.metadata.known_blobs, platforms, observer).warm(targets)


@app.command(
    "status",
    help="Show what is cached of each upstream and what is being fetched. Also shows how many requests are left.",
    epilog="""\b
Examples:
  entrepot mirror status --config entrepot.toml
  entrepot mirror status --mirror docker.io --json""",
)
def status(
    config: ConfigOption = None, data: DataOption = None, mirror: MirrorOption = None, as_json: JsonOption = False
) -> None:
    """Prints the state of all upstreams. Asks none of them."""
    settings = _load(config, data, mirror)
    with one_line_errors():
        from registry.cli.mirror.mirror_status import print_status, read_status

        seen = _run_on_mirrors(settings, lambda _, stored: read_status(settings, stored.records), create=False)
    if as_json:
        typer.echo(json.dumps(seen, indent=2))
    else:
        print_status(seen)


@app.command(
    "refresh",
    help="Ask the upstream registry now what a tag points at. Otherwise it is asked once the cached answer is stale.",
    epilog="""\b
Examples:
  entrepot mirror refresh ubuntu:24.04 --mirror docker.io""",
)
def refresh(
    references: ReferencesArgument, config: ConfigOption = None, data: DataOption = None, mirror: MirrorOption = None
) -> None:
    """Refreshes each reference. The exit code is 1 when one of them failed."""
    settings = _load(config, data, mirror)
    with one_line_errors():
        from registry.cli.mirror.refresh_purge import refresh_reference

        places = _parse(references)
        raise typer.Exit(_report_each(settings, places, refresh_reference, create=True))


@app.command(
    "purge",
    help="Drop the cached content of a tag, a digest or a repository.",
    epilog="""\b
Examples:
  entrepot mirror purge ubuntu:24.04 --mirror docker.io
  entrepot mirror purge --all ghcr.io/org/app --config entrepot.toml

The upstream registry is not asked and keeps everything. The next pull fetches the content again.""",
)
def purge(
    references: ReferencesArgument,
    everything: Annotated[bool, typer.Option("--all", help="REF is a NAME: drop the whole repository.")] = False,
    config: ConfigOption = None,
    data: DataOption = None,
    mirror: MirrorOption = None,
) -> None:
    """Drops each reference, or each repository. The exit code is 1 when one of them failed."""
    settings = _load(config, data, mirror)
    with one_line_errors():
        from registry.cli.mirror.refresh_purge import purge_reference

        if everything and (tagged := next((text for text in references if _has_reference(text)), None)):
            fail(f"{tagged}: --all takes a name without tag and digest", USAGE_ERROR)
        places = _parse(references)
        act = partial(purge_reference, data=settings.data, grace=settings.gc.grace, everything=everything)
        raise typer.Exit(_report_each(settings, places, act, create=False, whole_repositories=everything))


def _report_each(
    settings: Settings,
    places: list[ImageReference],
    act: Callable[[Router, StoredRegistry, ImageReference], Awaitable[str]],
    *,
    create: bool,
    whole_repositories: bool = False,
) -> bool:
    """Runs `act` on each reference and prints what it returns; errors go to stderr. Returns whether one failed."""
    from storage.errors import RegistryError

    async def work(router: Router, stored: StoredRegistry) -> bool:
        failed = False
        for where in places:
            name = where.repository if whole_repositories else where
            try:
                typer.echo(f"{name}: {await act(router, stored, where)}")
            except RegistryError as error:
                typer.echo(f"entrepot: {name}: {error.message}", err=True)
                failed = True
        return failed

    return _run_on_mirrors(settings, work, create=create)


def _run_on_mirrors(
    settings: Settings,
    work: Callable[[Router, StoredRegistry], Awaitable[T]],
    *,
    create: bool,
    reason: str = INTERRUPTED,
) -> T:
    """Opens the data directory and the mirrors, runs `work` and returns its result. `create`: creates the data
    directory if there is none. `reason`: what a signal that ends the command prints."""
    prepare_data_directory(settings, create=create)

    async def act() -> T:
        async with _open(settings) as (router, stored):
            return await work(router, stored)

    return run_interruptible(act(), reason)


@asynccontextmanager
async def _open(settings: Settings) -> AsyncIterator[tuple[Router, StoredRegistry]]:
    """Opens the registry as one more process next to the server's workers."""
    import logging

    from registry.backend import open_backend

    logging.getLogger("registry").addHandler(logging.NullHandler())  # the command prints errors itself
    async with open_backend(settings) as backend:
        yield backend.router, backend.stored


def _load(config: Path | None, data: str | None, mirror: list[str] | None) -> Settings:
    settings = load_or_fail(config, data=data, mirror=mirror).settings
    if not settings.upstream:
        fail(
            "nothing is mirrored: name an upstream with --mirror docker.io, or the server's settings with --config",
            USAGE_ERROR,
        )
    return settings


def _platforms(texts: list[str]) -> list[Platform] | None:
    """Parses platforms; returns None for all of them."""
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
