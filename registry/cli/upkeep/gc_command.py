"""The command `entrepot gc`: runs one round of garbage collection, also while a server runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from registry.cli.options import ConfigOption, DataOption
from registry.cli.output import print_line
from registry.cli.upkeep.upkeep_run import JsonLinesOption

HELP = """Remove what nothing refers to any more: blobs, abandoned uploads, cut-off downloads and stray files.

A server collects garbage by itself, at an interval. This command runs one round now. For each removal, it prints what
was removed, its size and the reason. Like the server, the command keeps what is younger than the setting gc.grace, and
every manifest that nobody has deleted, with or without a tag. It also frees the space of blobs that an interrupted
round has removed.

A stray file is left by a crash, and has no record. Each round looks for stray files among a different part of the
blobs. With `--strays`, a round looks among all blobs, which takes long in a large store."""
EXAMPLES = "\b\nExamples:\n  entrepot gc --dry-run\n  entrepot gc\n  entrepot gc --strays --json"
# The names of the kinds of garbage in the table of totals. A "deleted manifest" was deleted earlier, but could still be
# restored. Garbage collection removes no other manifests. "trash" is blobs that an interrupted round has removed
# without freeing their disk space.
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
        bool, typer.Option("--strays", help="Look for stray files among all blobs, not only among a part of the blobs.")
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
    """Returns one line about a removal. `verb`: `removed` or `would remove`. `step`: the removal, as the job reports
    it."""
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
