"""The command `entrepot gc`: runs one round of garbage collection, also while a server runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from registry.cli.options import ConfigOption, DataOption
from registry.cli.output import print_line
from registry.cli.upkeep.upkeep_run import JsonLinesOption

HELP = """Remove what nothing refers to any more: blobs, abandoned uploads, cut-off downloads and stray files.

A server collects garbage by itself, at an interval. This command does a round at once, and says for each thing what it
was, how many bytes it took and why it goes. It has the same age limits as the server: what is younger than the setting
gc.grace stays. Manifests stay, with or without a tag. If an earlier round was interrupted, this one also frees the
space of the blobs that the earlier one had removed.

Stray files are those that a crash has left without a record. To find them, a round lists a part of all blobs, each time
another part. With --strays it lists all of them, which takes long in a large store."""
EXAMPLES = "\b\nExamples:\n  entrepot gc --dry-run\n  entrepot gc\n  entrepot gc --strays --json"
# The names of the kinds of garbage in the table of totals. "Deleted manifests" were deleted earlier, but the store has
# kept them until now, so that they could be put back. Garbage collection deletes no other manifests. The kind "trash"
# is the bytes of blobs that an earlier, interrupted round has removed without freeing their disk space.
_KIND_NAMES = {
    "upload": "abandoned uploads",
    "partial": "cut-off downloads",
    "manifest": "deleted manifests",
    "link": "links to blobs",
    "blob": "blobs",
    "stray": "stray files",
    "trash": "leftovers of earlier rounds",
}


def gc(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Remove nothing; show what a round at this moment would remove.")
    ] = False,
    strays: Annotated[
        bool, typer.Option("--strays", help="Look for stray files among all blobs, instead of a part of them.")
    ] = False,
    as_json: JsonLinesOption = False,
    config: ConfigOption = None,
    data: DataOption = None,
) -> None:
    """Runs a round as a job, and prints each removal and the totals."""
    verb = "would remove" if dry_run else "removed"

    def show(step: Mapping[str, Any]) -> None:
        print_line(removal_text(verb, step))

    from registry.cli.upkeep.upkeep_run import print_done, run_as_job
    from storage.upkeep.collection_job import GC, collection_work

    result: Any = run_as_job(
        config,
        data,
        GC,
        {"dry_run": dry_run, "strays": strays},
        lambda upkeep: collection_work(upkeep.store.collector),
        as_json=as_json,
        on_step=show,
    )
    if as_json:
        print_done(result)
        return
    _print_totals(result)


def removal_text(verb: str, step: Mapping[str, Any]) -> str:
    """Returns one line about a removal. `verb`: `removed` or `would remove`. `step`: the record of the removal that the
    job has reported."""
    from registry.cli.output import human_size

    # A link is only a record that a repository has a blob, so it takes no bytes.
    size = "" if step["kind"] == "link" else f" ({human_size(step['bytes'])})"
    repository = f" of {step['repository']}" if step["repository"] else ""
    item = f" {step['item']}" if step["item"] else ""
    return f"{verb} {step['kind']}{item}{repository}{size}: {step['reason']}"


def _print_totals(result: Mapping[str, Any]) -> None:
    """Prints the totals of a round: a table of the kinds, and the freed bytes."""
    from registry.cli.output import human_size, print_rows

    rows = [
        (_KIND_NAMES[kind], str(total["count"]), "-" if kind == "link" else human_size(total["bytes"]))
        for kind, total in result["totals"].items()
        if total["count"]
    ]
    print_rows(("garbage", "number", "size"), rows, "there is no garbage")
    if rows:
        freed = human_size(result["bytes"])
        print_line(f"{freed} would be freed; nothing was removed" if result["dry_run"] else f"{freed} freed")
