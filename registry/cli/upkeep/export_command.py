"""The command `entrepot export`: writes images into a file or directory."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from registry.cli.options import USAGE_ERROR, ConfigOption, DataOption, fail
from registry.cli.output import human_size, plural, print_line
from registry.cli.upkeep.upkeep_run import JsonLinesOption, print_done, print_json_line, progress_bar, with_upkeep

if TYPE_CHECKING:
    from registry.mirror.warm.targets import Platform
    from registry.upkeep.components import UpkeepComponents
    from registry.upkeep.images.image_file_writers import ImageFileWriter
    from storage.names import ImageReference

HELP = "Write images into a file or directory, for docker load, skopeo, or another registry."
EXAMPLES = """\b
Examples:
  entrepot export team/app:1 --to app.tar --format docker-archive     # for docker load
  entrepot export team/app:1 team/app:2 --to images/                  # for skopeo copy oci:images:1 …
  entrepot export ubuntu:24.04 --to ubuntu.tar --platform linux/arm64 --config entrepot.toml
  entrepot export team/app:1 --to - --format docker-archive | docker load

REF names a hosted or mirrored image. Mirrored content that is not in the cache is fetched. The images go into a tar
archive if the argument of `--to` is - or ends with .tar, or if the format is docker-archive; otherwise, they go into a
directory. If the directory already contains exported images, the export adds to them."""


class Format(StrEnum):
    """The formats of exported images."""

    OCI_LAYOUT = "oci-layout"
    DOCKER_ARCHIVE = "docker-archive"


def export(
    references: Annotated[list[str], typer.Argument(metavar="REF...", help="NAME, NAME:TAG or NAME@DIGEST.")],
    to: Annotated[str, typer.Option("--to", metavar="FILE|DIR", help="Where to write; - is the standard output.")],
    format_: Annotated[
        Format, typer.Option("--format", help="docker-archive: a tar archive that every docker loads.")
    ] = Format.OCI_LAYOUT,
    platform: Annotated[
        list[str] | None,
        typer.Option(
            "--platform",
            metavar="OS/ARCH",
            help="Only this platform. Repeat for more. [default: all; for docker-archive, this machine's platform]",
        ),
    ] = None,
    all_platforms: Annotated[bool, typer.Option("--all-platforms", help="All platforms of each image.")] = False,
    referrers: Annotated[
        bool, typer.Option("--referrers/--no-referrers", help="Also write signatures, SBOMs and other referrers.")
    ] = True,
    config: ConfigOption = None,
    data: DataOption = None,
    as_json: JsonLinesOption = False,
) -> None:
    """Exports the images. If an image cannot be exported, ends the command with exit code 1, creates no archive file,
    and leaves the index of a directory unchanged."""
    from registry.upkeep.images.image_export import ExportOptions, export_images
    from storage.upkeep.reporter import PlainReporter

    for_docker = format_ is Format.DOCKER_ARCHIVE
    platforms = _parse_platform_options(platform or [], all_platforms=all_platforms, for_docker=for_docker)
    images = _parse_or_fail(references)
    options = ExportOptions(platforms, with_referrers=referrers and not for_docker, for_docker=for_docker)
    if to == "-" and (sys.stdout.isatty() or as_json):
        fail(
            "`--to -` writes the archive to the standard output: pipe it to a command or file, and leave out `--json`",
            USAGE_ERROR,
        )
    logging.getLogger("registry").addHandler(logging.NullHandler())  # without it, Python prints warnings on stderr

    async def work(upkeep: UpkeepComponents) -> Any:
        writer = _open_writer(to, for_docker=for_docker)
        with progress_bar(hidden=as_json) as on_progress:
            reporter = PlainReporter(print_json_line if as_json else _ignore, on_progress)
            return await export_images(upkeep.router, images, writer, options, reporter)

    result = with_upkeep(config, data, work)
    if as_json:
        print_done(result)
    else:
        text = f"{plural(result['images'], 'image')}, {human_size(result['size'])}"
        print_line(f"{to}: {text}", err=to == "-")


def _open_writer(to: str, *, for_docker: bool) -> ImageFileWriter:
    """Returns the object that writes the images to `to`. It writes a tar archive if `to` is `-` (the standard output)
    or ends with `.tar`, or if `for_docker` is True; otherwise a directory. Ends the command if `to` is a directory, but
    the archive needs a file.

    `LayoutArchive` writes the archives of both formats, because a docker archive is an OCI layout with one more
    file."""
    from registry.upkeep.images.image_file_writers import LayoutArchive, LayoutDirectory

    if to == "-":
        return LayoutArchive(None, sys.stdout.buffer)
    path = Path(to)
    if for_docker or path.suffix == ".tar":
        if path.is_dir():
            fail(f"{to} is a directory; name a file for the archive", USAGE_ERROR)
        return LayoutArchive(path)
    return LayoutDirectory(path)


def _parse_platform_options(texts: list[str], *, all_platforms: bool, for_docker: bool) -> list[Platform] | None:
    """Returns the platforms to export; None: all platforms. For a docker archive, the default is this machine's
    platform. Ends the command if the options contradict each other, or if one of `texts` is not a platform."""
    from registry.mirror.warm.targets import parse_platforms

    if all_platforms and texts:
        fail("--platform and --all-platforms contradict each other; give one of them", USAGE_ERROR)
    if for_docker and (all_platforms or len(texts) > 1):
        fail("a docker archive has one platform; give one --platform, or --format oci-layout", USAGE_ERROR)
    try:
        return parse_platforms(texts) if texts or for_docker else None
    except ValueError as error:
        fail(f"--platform: {error}", USAGE_ERROR)


def _parse_or_fail(references: list[str]) -> list[ImageReference]:
    """Parses the references. Ends the command if one is not valid."""
    from registry.mirror.warm.targets import ReferencesError, parse_references

    try:
        return parse_references(references)
    except ReferencesError as error:
        fail(str(error), USAGE_ERROR)


def _ignore(_step: Mapping[str, Any]) -> None:
    """Ignores a step of an export: without `--json`, the command does not print steps."""
