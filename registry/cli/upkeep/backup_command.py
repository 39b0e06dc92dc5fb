"""The command `entrepot backup`: makes a backup of a registry, also while a server runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from registry.cli.options import USAGE_ERROR, ConfigOption, DataOption, fail, load_or_fail
from registry.cli.output import human_size, plural, print_line
from registry.cli.upkeep.upkeep_run import JsonLinesOption, print_done, run_as_job

if TYPE_CHECKING:
    from registry.upkeep.components import UpkeepComponents
    from storage.upkeep.job_runner import Work

HELP = "Make a backup of everything: images, accounts, keys and history. This is also possible while a server runs."
EXAMPLES = """\b
Examples:
  entrepot backup /mnt/backups --data /var/lib/entrepot
  entrepot backup /mnt/backups --keep 7 --config /etc/entrepot.toml
  entrepot backup /mnt/backups --verify --json

Use DIR only for backups. A backup copies only the blobs that DIR does not have yet. After an interruption,
run the same command again. DIR contains the accounts' password hashes and the signing keys: keep it safe."""


def backup(
    target: Annotated[
        Path | None,
        typer.Argument(metavar="[DIR]", help="The directory of the backups. [default: the setting backup.target]"),
    ] = None,
    keep: Annotated[
        int | None,
        typer.Option(
            "--keep",
            metavar="N",
            min=1,
            max=1_000_000,
            help="Keep the newest N backups. [default: the setting backup.keep, or all]",
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Check the digests of all blobs in the backup. Without --verify, the command usually checks only the "
            "blobs whose bytes it copies.",
        ),
    ] = False,
    copy: Annotated[
        bool,
        typer.Option(
            "--copy",
            help="Always copy the bytes of blobs. Without --copy, files in DIR can be hard links to files of the "
            "registry, or share disk blocks with them.",
        ),
    ] = False,
    new: Annotated[
        bool,
        typer.Option(
            "--new",
            help="Begin a new directory of backups in DIR. Without --new, the command fails if earlier backups to DIR "
            "are on a disk that is not mounted.",
        ),
    ] = False,
    config: ConfigOption = None,
    data: DataOption = None,
    as_json: JsonLinesOption = False,
) -> None:
    """Makes the backup. Ends the command with exit code 1 if a blob could not be copied, except for blobs that the
    registry had recorded as damaged."""
    from registry.upkeep.backup_work import backup_arguments

    settings = load_or_fail(config, data=data).settings
    target = target or settings.backup.target
    if target is None:
        fail("name the directory of the backups, or set `target` in [backup] of the settings", USAGE_ERROR)
    keep = settings.backup.keep if keep is None else keep
    arguments = backup_arguments(target, keep, verify=verify, may_link=not copy, ignores_earlier_backups=new)

    def get_work(upkeep: UpkeepComponents) -> Work:
        return upkeep.work_by_kind["backup"]

    result = run_as_job(config, data, "backup", arguments, get_work, as_json=as_json, on_step=_print_problem)
    if as_json:
        print_done(result)
    else:
        _print_result(result)
    raise typer.Exit(1 if result["missing"] else 0)


def _print_problem(step: Mapping[str, Any]) -> None:
    """Prints a step of the job on stderr if the step is a warning or a problem with a blob. The key `event` of `step`
    says what has happened."""
    if step["event"] == "warning":
        print_line(f"entrepot: warning: {step['reason']}", err=True)
    elif step["event"] in ("missing", "damaged"):
        print_line(f"entrepot: {step['digest']} is not in the backup: {step['reason']}", err=True)
    elif step["event"] == "damaged in the backup":
        print_line(
            f"entrepot: {step['digest']} was damaged in the backup and was copied again: {step['reason']}", err=True
        )


def _print_result(result: Mapping[str, Any]) -> None:
    print_line(
        f"{result['target']}/snapshots/{result['snapshot']}: {plural(result['tags'], 'tag')}, "
        f"{plural(result['manifests'], 'manifest')}, {plural(result['blobs'], 'blob')} ({human_size(result['size'])})"
    )
    print_line(
        f"{plural(result['copied_blobs'], 'blob')} new ({human_size(result['new_bytes'])} copied), "
        f"{result['present_blobs']} already there"
    )
    if result.get("removed_snapshots") or result.get("removed_blobs"):
        print_line(
            f"{plural(len(result['removed_snapshots']), 'old backup')} and {plural(result['removed_blobs'], 'blob')} "
            "removed"
        )
    if result["damaged"]:
        print_line(
            f"entrepot: left out {plural(len(result['damaged']), 'blob')} known to be damaged; push or pull the images "
            "again",
            err=True,
        )
    if result["missing"]:
        print_line(
            f"entrepot: {plural(len(result['missing']), 'blob')} could not be copied; the backup has all other blobs. "
            "Run `entrepot scrub`: it takes these blobs out of use, and downloads mirrored blobs again",
            err=True,
        )
