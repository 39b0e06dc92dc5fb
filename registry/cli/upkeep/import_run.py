"""The options, the job and the output that all commands for imports from another registry share. During the import,
these commands print each problem (content that could not be imported) and each note (other information). At the end,
they print a summary."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from registry.cli.output import human_size, plural, print_line, print_text
from registry.cli.upkeep.upkeep_run import print_done, run_as_job

if TYPE_CHECKING:
    from storage.jobs import JSON

IncludeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--include", metavar="PATTERN", help="Only repositories that match, such as 'team/**'. Repeat for more."
    ),
]
ExcludeOption = Annotated[
    list[str] | None,
    typer.Option("--exclude", metavar="PATTERN", help="Leave out repositories that match. Repeat for more."),
]
OverwriteOption = Annotated[
    bool,
    typer.Option("--overwrite", help="Also set tags that somebody has changed here since the last import."),
]


def _print_step(step: Mapping[str, JSON]) -> None:
    """Prints a problem or a note as one line on stderr. Prints nothing for an image that was imported."""
    if step["event"] == "imported":
        return
    image = str(step["repository"])
    if "tag" in step:
        image += f":{step['tag']}"
    elif "digest" in step:
        image += f"@{step['digest']}" if image else str(step["digest"])
    print_line(f"{step['event']}: {image + ': ' if image else ''}{step['reason']}", err=True)


def run_import(
    config: Path | None, data: str | None, kind: str, arguments: Mapping[str, JSON], *, as_json: bool
) -> None:
    """Runs an import from another registry as a job of the kind `kind`, and prints its steps and its result. Creates
    the data directory if there is none. Ends the command with exit code 1 if there were problems."""
    result = run_as_job(
        config,
        data,
        kind,
        arguments,
        lambda upkeep: upkeep.work_by_kind[kind],
        as_json=as_json,
        on_step=_print_step,
        create_data_directory=True,
    )
    _end_import(result, as_json=as_json)


def _end_import(result: Any, *, as_json: bool) -> None:
    """Prints the result of an import, and ends the command with exit code 1 if there were problems."""
    if as_json:
        print_done(result)
    else:
        print_text(_summary(result))
    if result["problems"]:
        raise typer.Exit(1)


def _summary(result: Mapping[str, Any]) -> str:
    """Returns the summary of a result, in two or three lines."""
    blobs = [
        f"{result[name]} {text}"
        for name, text in (
            ("linked", "hard-linked"),
            ("copied", "copied"),
            ("fetched", "fetched"),
            ("shared", "already here in other repositories"),
        )
        if result[name]
    ]
    lines = [
        f"repositories: {result['repositories']}; tags: {result['tags']} imported, {result['present']} unchanged",
        f"new manifests: {result['manifests']}; new blobs: {', '.join(blobs) or '0'} ({human_size(result['bytes'])})",
    ]
    if result["problems"]:
        lines.append(f"{plural(result['problems'], 'problem')}: the lines above say what could not be imported")
    return "\n".join(lines)
