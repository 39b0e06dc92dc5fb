"""The command `entrepot mirror`. An *upstream* is a remote registry whose content this registry caches.

- `warm` fetches images from upstreams before they are pulled.
- `status` shows what is cached.
- `refresh` asks upstreams what tags point at.
- `purge` deletes cached content.

The commands for frozen tags are in `registry.cli.mirror.freeze_command`. A *frozen* tag stays at one digest, even if
the upstream moves or deletes the tag. Functions import slow modules themselves, so that `entrepot --help` is quick.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from registry.cli.data_owner import run_on_backend
from registry.cli.interrupts import INTERRUPTED
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
from registry.cli.output import print_json_value, print_line
from registry.config import Settings

if TYPE_CHECKING:
    from registry.mirror.warm.targets import Platform
    from registry.mirror.warm.warmer import WarmResult
    from registry.router import Router
    from storage.names import ImageReference
    from storage.store.stored_registry import StoredRegistry

T = TypeVar("T")

HELP = (
    "Fetch images before they are pulled; show, refresh and drop cached images; freeze tags. This is also possible "
    "while a server is running."
)
INTERRUPTED_WARM = "interrupted; what was fetched stays cached, and the same command fetches the rest"
"""What `warm` prints on stderr if SIGINT or SIGTERM ends it."""

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
fetched again: after an interruption, run the same command again to fetch the rest.""",
)
def warm(
    references: OptionalReferencesArgument = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", metavar="FILE", help="File with one reference a line; # begins a comment."),
    ] = None,
    platform: Annotated[
        list[str] | None,
        typer.Option(
            "--platform",
            metavar="OS/ARCH",
            help="The platform to fetch. Repeat for more. [default: this machine's platform]",
        ),
    ] = None,
    all_platforms: Annotated[bool, typer.Option("--all-platforms", help="Fetch every platform.")] = False,
    config: ConfigOption = None,
    data: DataOption = None,
    mirror: MirrorOption = None,
) -> None:
    """Fetches the images. The exit code is 1 if an image could not be fetched completely, otherwise 0."""
    settings = load_mirror_settings(config, data, mirror)
    with one_line_errors():
        from registry.cli.mirror.warm_progress import total_text

        if platform and all_platforms:
            fail("--platform and --all-platforms contradict each other; give one of them", USAGE_ERROR)
        platforms = _parse_platforms(["all"] if all_platforms else platform or settings.warm.platforms)
        images = _images_to_warm(settings, references or [], file)
        start_time = time.monotonic()
        results = run_on_mirrors(
            settings,
            partial(_warm, images=images, platforms=platforms),
            create_data_directory=True,
            interrupted_text=INTERRUPTED_WARM,
        )
        print_line(total_text(results, start_time))
        raise typer.Exit(1 if any(result.error is not None for result in results) else 0)


def _images_to_warm(settings: Settings, references: list[str], file: Path | None) -> list[ImageReference]:
    """Returns the images to fetch. `references`: the arguments of the command. `file`: the option --file. If both are
    missing, uses those in `[warm]` of the settings. Ends the command with an error if a reference is not valid, or if
    there is no image to fetch."""
    from registry.mirror.warm.targets import ReferencesError, parse_references, read_references

    if not references and file is None:
        references, file = settings.warm.references, settings.warm.file
    try:
        images = parse_references([*references, *(read_references(file) if file else [])])
    except ReferencesError as error:
        fail(str(error), USAGE_ERROR)
    if not images:
        fail(
            f"{file} names no images"
            if file
            else "name what to fetch: give references or --file, or set [warm] in the settings",
            USAGE_ERROR,
        )
    return images


async def _warm(
    router: Router, stored: StoredRegistry, *, images: list[ImageReference], platforms: list[Platform] | None
) -> list[WarmResult]:
    """Fetches the images and shows the progress. `platforms`: if an image exists for several platforms, only these
    platforms are fetched; None: all platforms are fetched."""
    from registry.cli.mirror.warm_progress import show_progress
    from registry.mirror.warm.warmer import Warmer

    with show_progress() as observer:
        return await Warmer(router.locate, stored.metadata.known_blobs, platforms, observer).warm(images)


@app.command(
    "status",
    help="Show what is cached of each upstream, what is being fetched, and how many requests an upstream still allows.",
    epilog="""\b
Examples:
  entrepot mirror status --config entrepot.toml
  entrepot mirror status --mirror docker.io --json""",
)
def status(
    config: ConfigOption = None, data: DataOption = None, mirror: MirrorOption = None, as_json: JsonOption = False
) -> None:
    """Prints the state of all mirrors. Sends no request to an upstream."""
    settings = load_mirror_settings(config, data, mirror)
    with one_line_errors():
        from registry.cli.mirror.mirror_status import print_status, read_status

        mirrors = run_on_mirrors(settings, lambda _, stored: read_status(settings, stored), create_data_directory=False)
    if as_json:
        print_json_value(mirrors, indent=2)
    else:
        print_status(mirrors)


@app.command(
    "refresh",
    help="Ask the upstream registry now what a tag points at. A pull asks only when the cached answer is stale.",
    epilog="""\b
Examples:
  entrepot mirror refresh ubuntu:24.04 --mirror docker.io""",
)
def refresh(
    references: ReferencesArgument, config: ConfigOption = None, data: DataOption = None, mirror: MirrorOption = None
) -> None:
    """Asks the upstream about each reference. The exit code is 1 if at least one reference failed, otherwise 0."""
    settings = load_mirror_settings(config, data, mirror)
    with one_line_errors():
        from registry.cli.mirror.refresh_purge import refresh_reference

        images = _parse_references(references)
        raise typer.Exit(_run_for_each(settings, images, refresh_reference, create_data_directory=True))


@app.command(
    "purge",
    help="Drop the cached content of a tag, a digest or a repository.",
    epilog="""\b
Examples:
  entrepot mirror purge ubuntu:24.04 --mirror docker.io
  entrepot mirror purge --all ghcr.io/org/app --config entrepot.toml

The command sends nothing to the upstream registry. The next pull fetches the content again. Content that a
frozen tag needs is dropped only with --force, because the upstream may no longer have this content.""",
)
def purge(
    references: ReferencesArgument,
    everything: Annotated[bool, typer.Option("--all", help="REF is a NAME: drop the whole repository.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Drop also what a frozen tag needs; it stays frozen.")] = False,
    config: ConfigOption = None,
    data: DataOption = None,
    mirror: MirrorOption = None,
) -> None:
    """Deletes the cached content of each reference. `everything`: delete the whole repository that the reference names.
    `force`: delete also the content that a frozen tag needs. The exit code is 1 if at least one reference failed,
    otherwise 0."""
    settings = load_mirror_settings(config, data, mirror)
    with one_line_errors():
        from registry.cli.mirror.refresh_purge import purge_reference

        if everything and (tagged := next((text for text in references if _has_tag_or_digest(text)), None)):
            fail(f"{tagged}: --all takes a name without tag and digest", USAGE_ERROR)
        images = _parse_references(references)
        purge_one = partial(
            purge_reference, data=settings.data, grace=settings.gc.grace, everything=everything, force=force
        )
        raise typer.Exit(
            _run_for_each(settings, images, purge_one, create_data_directory=False, whole_repositories=everything)
        )


def _run_for_each(
    settings: Settings,
    images: list[ImageReference],
    action: Callable[[Router, StoredRegistry, ImageReference], Awaitable[str]],
    *,
    create_data_directory: bool,
    whole_repositories: bool = False,
) -> int:
    """Runs `action` for each image and prints its result. After a RegistryError, prints the error on stderr and
    continues with the next image. Returns the exit code of the command: 1 if there was such an error, otherwise 0.

    - `create_data_directory`: whether to create the data directory if there is none.
    - `whole_repositories`: whether the printed lines name only the repository, without a tag or digest."""
    from storage.errors import RegistryError

    async def work(router: Router, stored: StoredRegistry) -> int:
        exit_code = 0
        for image in images:
            name = image.repository if whole_repositories else image
            try:
                print_line(f"{name}: {await action(router, stored, image)}")
            except RegistryError as error:
                print_line(f"entrepot: {name}: {error.message}", err=True)
                exit_code = 1
        return exit_code

    return run_on_mirrors(settings, work, create_data_directory=create_data_directory)


def run_on_mirrors(
    settings: Settings,
    work: Callable[[Router, StoredRegistry], Awaitable[T]],
    *,
    create_data_directory: bool,
    interrupted_text: str = INTERRUPTED,
) -> T:
    """Opens the data directory and the mirrors, runs `work` and returns its result.

    - `work` gets the router, which finds the mirror of a repository, and the registry in the data directory.
    - `create_data_directory`: whether to create the data directory if there is none.
    - `interrupted_text`: what the command prints on stderr if SIGINT or SIGTERM ends it."""
    import logging

    # Without a handler, Python would print logged warnings on stderr. The command prints its own error texts.
    logging.getLogger("registry").addHandler(logging.NullHandler())
    return run_on_backend(
        settings,
        lambda backend: work(backend.router, backend.store),
        create_if_missing=create_data_directory,
        interrupted_text=interrupted_text,
    )


def load_mirror_settings(config: Path | None, data: str | None, mirror: list[str] | None) -> Settings:
    """Returns the settings. Ends the command with an error if they are not valid or name no upstream."""
    settings = load_or_fail(config, data=data, mirror=mirror).settings
    if not settings.upstream:
        fail(
            "nothing is mirrored: name an upstream with --mirror docker.io, or the server's settings with --config",
            USAGE_ERROR,
        )
    return settings


def _parse_platforms(texts: list[str]) -> list[Platform] | None:
    """Returns the platforms to fetch. If `all` is among the texts, returns None, which means all platforms. If `texts`
    is empty, returns this machine's platform. Ends the command with an error if a text is not valid."""
    from registry.mirror.warm.targets import parse_platforms

    try:
        return parse_platforms(texts)
    except ValueError as error:
        fail(f"--platform: {error}", USAGE_ERROR)


def _parse_references(references: list[str]) -> list[ImageReference]:
    """Returns the image references. Ends the command with an error if one is not valid."""
    from registry.mirror.warm.targets import ReferencesError, parse_references

    try:
        return parse_references(references)
    except ReferencesError as error:
        fail(str(error), USAGE_ERROR)


def _has_tag_or_digest(text: str) -> bool:
    """Returns whether a reference has a tag or a digest. A colon before the last slash belongs to a port."""
    return "@" in text or ":" in text.rpartition("/")[2]
