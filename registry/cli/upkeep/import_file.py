"""`entrepot import` with a file or directory stores the images in hosted repositories (those to which clients push)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import typer

from registry.cli.data_owner import operator_actor
from registry.cli.options import USAGE_ERROR, fail
from registry.cli.output import human_size, plural, print_line
from registry.cli.upkeep.upkeep_run import print_done, print_json_line, progress_bar, with_upkeep

if TYPE_CHECKING:
    from registry.upkeep.components import UpkeepComponents
    from registry.upkeep.images.image_import import ImportName


def import_file(path: Path, as_name: str | None, config: Path | None, data: str | None, *, as_json: bool) -> None:
    """Imports the images of a file or directory. Ends the command with an error if `path` does not exist or `as_name`
    is invalid, and with exit code 1 if the import could not set a tag.

    - `as_name`: the name under which to import, `NAME` or `NAME:TAG`. None: the names in the file.
    - `config`, `data`: the values of the options `--config` and `--data`.
    - `as_json`: whether to print lines of JSON instead of text."""
    name = None if as_name is None else _parse_import_name(as_name)
    if not path.exists():
        fail(f"there is no file or directory {path}")

    async def work(upkeep: UpkeepComponents) -> Any:
        import asyncio

        from registry.upkeep.images.file_sources import open_file_source
        from registry.upkeep.images.found_images import find_images
        from registry.upkeep.images.image_import import import_images
        from storage.upkeep.reporter import PlainReporter

        with progress_bar(hidden=as_json) as on_progress, open_file_source(path) as source:
            reporter = PlainReporter(print_json_line if as_json else _print_step, on_progress)
            await reporter.report(message=f"reading {path}")
            content = await asyncio.to_thread(find_images, source)
            own_host = urlsplit(upkeep.settings.public_url or "").netloc
            return await import_images(
                *(upkeep.router, content, name, operator_actor(), reporter, upkeep.store.imports),
                *(own_host, upkeep.store.immutable_tags),
            )

    result = with_upkeep(config, data, work, create_data_directory=True)
    if as_json:
        print_done(result)
    else:
        print_line(
            f"{plural(result['images'], 'image')}: {plural(result['new_blobs'], 'blob')} new "
            f"({human_size(result['size'])}), {result['present_blobs']} already here"
        )
    if result["problems"]:
        raise typer.Exit(1)


def _parse_import_name(as_name: str) -> ImportName:
    from registry.upkeep.images.image_import import ImportName
    from storage.errors import RegistryError

    try:
        return ImportName.parse(as_name)
    except RegistryError as error:
        fail(f"--as: {error.message}", USAGE_ERROR)


def _print_step(step: Mapping[str, Any]) -> None:
    """Prints a step of the import. `event` is the kind of the step:

    - `image`: an image is stored. Prints the name and the digest, and a note if the file lacks some platforms.
    - `problem`: the tag of an image could not be set. Prints why."""
    if step["event"] == "problem":
        print_line(f"problem: {step['image']}: {step['reason']}", err=True)
    if step["event"] == "image":
        print_line(f"{step['image']}: {step['digest']}")
        if step["missing"]:
            print_line(
                f"entrepot: {step['image']}: the file lacks {plural(len(step['missing']), 'platform')} of the image; "
                "the registry has stored a new index that lists only the platforms in the file",
                err=True,
            )
