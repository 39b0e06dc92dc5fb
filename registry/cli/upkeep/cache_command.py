"""The command `entrepot cache`: shows the size and the content of the cache of mirrored content, and evicts images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from registry.cli.options import USAGE_ERROR, ConfigOption, DataOption, JsonOption, fail
from registry.cli.output import human_size, local_time, plural, print_json, print_line, print_rows

if TYPE_CHECKING:
    from registry.upkeep.components import UpkeepComponents
    from registry.upkeep.eviction import CachePart
    from storage.upkeep.job_runner import Work

HELP = "Show what is in the cache of mirrored content, and evict images that were not pulled for a long time."
app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None)
JsonLines = Annotated[
    bool, typer.Option("--json", help="Print one JSON object per line for each image, and the result at the end.")
]


@app.command(
    "status",
    help="Show the size, the budget and the images of each upstream's cache.",
    epilog="\b\nExamples:\n  entrepot cache status -c entrepot.toml\n  entrepot cache status -c entrepot.toml --json",
)
def show_status(config: ConfigOption = None, data: DataOption = None, as_json: JsonOption = False) -> None:
    """Prints the cached content of each upstream and of all upstreams together, as a table or as JSON."""
    from registry.admin.cache_models import CachePartResponse
    from registry.cli.upkeep.upkeep_run import with_upkeep
    from registry.upkeep.eviction import read_cache_status

    async def read(upkeep: UpkeepComponents) -> list[CachePart]:
        return await read_cache_status(upkeep.settings, upkeep.store)

    parts = with_upkeep(config, data, read)
    if as_json:
        print_json([CachePartResponse.from_part(part) for part in parts])
        return
    rows = [
        (
            part.upstream or "all",
            human_size(part.size) if part.is_complete else f"{human_size(part.size)} (still counting)",
            "-" if part.max_size is None else human_size(part.max_size),
            str(part.blobs),
            str(part.images),
            local_time(part.oldest_pull),
        )
        for part in parts
    ]
    columns = ("upstream", "size", "budget", "blobs", "images", "oldest pull")
    print_rows(columns, rows, "no upstream is mirrored, so there is no cache")


@app.command(
    "evict",
    help="Evict the images that were not pulled for the longest time, until the cache is within the limits of the "
    "settings, or has the size that --to gives. A pull fetches them again.",
    epilog="\b\nExamples:\n  entrepot cache evict -c entrepot.toml --to 200GiB --dry-run"
    "\n  entrepot cache evict -c entrepot.toml --upstream docker.io --to 50GiB",
)
def evict(
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="SIZE", help="The size that the cache may have afterwards, such as 200GiB."),
    ] = None,
    upstream: Annotated[
        str | None, typer.Option("--upstream", metavar="NAME", help="Only images of this upstream.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be evicted.")] = False,
    config: ConfigOption = None,
    data: DataOption = None,
    as_json: JsonLines = False,
) -> None:
    """Evicts images. Prints a line for each image, and at the end the number and the size of all images."""
    from registry.cli.upkeep.upkeep_run import print_done, run_as_job
    from registry.upkeep.eviction import EVICTION_KIND, eviction_arguments

    arguments = eviction_arguments(None if to is None else _size_or_fail(to), upstream, dry_run=dry_run)

    def get_work(upkeep: UpkeepComponents) -> Work:
        return upkeep.work_by_kind[EVICTION_KIND]

    result = run_as_job(config, data, EVICTION_KIND, arguments, get_work, as_json=as_json, on_step=_print_image)
    if as_json:
        print_done(result)
        return
    images, size = plural(result["images"], "image"), human_size(result["bytes"])
    print_line(f"{images} would be evicted, which frees {size}" if dry_run else f"{images} evicted, {size} freed")


def _size_or_fail(text: str) -> int:
    """Returns a size such as `200GiB` in bytes. Ends the command if the text is not a size."""
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        size = -1
    if size < 0:
        fail(f"--to: {text!r} is not a size; write it like 200GiB", USAGE_ERROR)
    return size


def _print_image(image: Mapping[str, Any]) -> None:
    """Prints the line for one evicted image."""
    tags = ", ".join(image["tags"])
    name = f"{image['repository']}:{tags}" if tags else f"{image['repository']}@{image['digest']}"
    print_line(f"{name}  last pulled {local_time(image['last_pulled'])}  {human_size(image['bytes'])}")
