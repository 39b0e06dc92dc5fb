"""The command `entrepot fsck`: checks the store. A server may be running."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from registry.cli.options import ConfigOption, DataOption
from registry.cli.output import print_line
from registry.cli.upkeep.upkeep_run import JsonLinesOption

HELP = """Check that the metadata and the stored files agree, and that garbage collection can find all unused content.

A server may be running meanwhile. Prints one line for each problem, with a code. Exits with 1 if there is a problem;
with --repair, only if a problem is left."""
EXAMPLES = "\b\nExamples:\n  entrepot fsck\n  entrepot fsck --hash --json\n  entrepot fsck --repair"


def fsck(
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Repair what can be repaired without losing data. Never deletes a manifest."),
    ] = False,
    hash_bytes: Annotated[
        bool, typer.Option("--hash", help="Also read all stored bytes, and compare them with their digests.")
    ] = False,
    as_json: JsonLinesOption = False,
    config: ConfigOption = None,
    data: DataOption = None,
) -> None:
    """Runs the check as a job. Prints each problem, and then a summary. Exits with 1 if a problem is left."""
    from registry.cli.upkeep.upkeep_run import print_done, run_as_job
    from registry.upkeep.fsck import FSCK, fsck_work

    result: Any = run_as_job(
        config,
        data,
        FSCK,
        {"repair": repair, "hash": hash_bytes},
        lambda upkeep: fsck_work(upkeep.settings, upkeep.store),
        as_json=as_json,
        on_step=lambda step: print_line(problem_text(step)),
    )
    if as_json:
        print_done(result)
    else:
        print_line(_summary(result, repair=repair))
    if result["left"]:
        raise typer.Exit(1)


def problem_text(step: Mapping[str, Any]) -> str:
    """Returns one line about a problem, and about its repair if it was repaired."""
    item = f"{step['item']}: " if step["item"] else ""
    repository = f"{step['repository']}: " if step["repository"] else ""
    repair = f" [repaired: {step['repair']}]" if step["repair"] else ""
    return f"{step['code']}: {repository}{item}{step['problem']}{repair}"


def _summary(result: Mapping[str, Any], *, repair: bool) -> str:
    """Returns the last line that the command prints: the number of problems, and what to do next."""
    from registry.cli.output import plural

    count = sum(result["found"].values())
    if not count:
        text = "nothing is wrong"
    elif repair:
        text = f"{plural(count, 'problem')}, {result['repaired']} repaired, {result['left']} left"
    else:
        text = f"{plural(count, 'problem')}; to repair what can be repaired, run `entrepot fsck --repair`"
    if result["damaged"]:
        noun = "blob or manifest" if result["damaged"] == 1 else "blobs or manifests"
        text += f"; {result['damaged']} {noun} known to be damaged: push or pull the images again"
    return text
