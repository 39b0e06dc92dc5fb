"""The command `entrepot restore`: restores a backup into an empty data directory. A *snapshot* is one backup in the
directory of backups. A `SnapshotManifest` describes a snapshot; it is not the manifest of an image."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from registry.cli.interrupts import run_interruptible
from registry.cli.options import ConfigOption, DataOption, load_or_fail, one_line_errors
from registry.cli.output import human_size, local_time, plural, print_line, print_rows
from registry.cli.upkeep.upkeep_run import JsonLinesOption, print_done, print_json_line, progress_bar

if TYPE_CHECKING:
    from storage.upkeep.backup.backup_directory import SnapshotManifest

HELP = "Restore a backup into an empty data directory. Every byte is compared with its digest."
EXAMPLES = """\b
Examples:
  entrepot restore /mnt/backups --list
  entrepot restore /mnt/backups --data /var/lib/entrepot
  entrepot restore /mnt/backups --snapshot 2026-01-31T09-30-00Z --data /var/lib/entrepot

The data directory must be missing or empty. After an interruption, run the same command again. No server starts on the
data directory until the restore is complete."""
INTERRUPTED = "interrupted; run the same command again to continue"
"""The message after Ctrl-C."""


def restore(
    backups: Annotated[Path, typer.Argument(metavar="DIR", help="The directory that `entrepot backup` wrote.")],
    snapshot: Annotated[
        str | None,
        typer.Option("--snapshot", metavar="TIME", help="The backup to restore, as --list shows it. [default: newest]"),
    ] = None,
    show_list: Annotated[bool, typer.Option("--list", help="Only list the backups in DIR.")] = False,
    skip_damaged: Annotated[
        bool,
        typer.Option("--skip-damaged", help="Restore the backup without its missing or damaged blobs."),
    ] = False,
    link: Annotated[
        bool,
        typer.Option("--link", help="Make hard links to the files of the backup, if it is on the same file system."),
    ] = False,
    config: ConfigOption = None,
    data: DataOption = None,
    as_json: JsonLinesOption = False,
) -> None:
    """Restores a backup, or lists the backups. Ends the command with exit code 1 if a blob could not be restored."""
    from registry.cli.data_owner import become_owner
    from storage.composition import restore_data_dir
    from storage.upkeep.backup.restore import RestoreOptions
    from storage.upkeep.reporter import PlainReporter

    settings = load_or_fail(config, data=data).settings
    with one_line_errors():
        if show_list:
            _print_list(_read_list(backups), as_json=as_json)
            return
        become_owner(settings.data)
        options = RestoreOptions(backups, snapshot, may_link=link, skip_damaged=skip_damaged)
        with progress_bar(hidden=as_json) as on_progress:
            reporter = PlainReporter(print_json_line if as_json else _print_problem, on_progress)
            result: Any = run_interruptible(restore_data_dir(settings.data, options, reporter), INTERRUPTED)
    if as_json:
        print_done(result)
    else:
        print_line(
            f"{result['data']}: {plural(result['tags'], 'tag')}, {plural(result['manifests'], 'manifest')}, "
            f"{plural(result['blobs'], 'blob')} ({human_size(result['size'])}) as of {result['snapshot']}"
        )
        if result["healed_blobs"]:
            # The restored backup records these blobs as damaged, but the directory of backups has their right bytes.
            healed = plural(result["healed_blobs"], "blob")
            print_line(f"{healed} restored completely, although damaged in the registry when the backup was made")
    if result["damaged"]:
        print_line(f"entrepot: {plural(len(result['damaged']), 'blob')} could not be restored", err=True)
    raise typer.Exit(1 if result["damaged"] else 0)


def _print_problem(step: Mapping[str, Any]) -> None:
    """Prints a warning, or a problem with a blob, on stderr. Prints nothing for a restored blob."""
    if step["event"] == "warning":
        print_line(f"entrepot: warning: {step['reason']}", err=True)
    elif step["event"] == "damaged":
        print_line(f"entrepot: {step['digest']} cannot be restored: {step['reason']}", err=True)


def _read_list(backups: Path) -> list[SnapshotManifest]:
    """Returns the complete backups in the directory, oldest first. Raises BackupFailed."""
    from storage.data_dir.system import System
    from storage.upkeep.backup.backup_directory import BackupDirectory, with_backup_errors

    def read() -> list[SnapshotManifest]:
        directory = BackupDirectory(backups, System())
        directory.check()
        return directory.snapshots()

    return with_backup_errors(f"cannot read {backups}", read)


def _print_list(snapshots: list[SnapshotManifest], *, as_json: bool) -> None:
    if as_json:
        for snapshot in snapshots:
            print_json_line({"name": snapshot.name, **snapshot.as_json()})
        return
    rows = [
        (
            snapshot.name,
            local_time(snapshot.time),
            str(snapshot.totals.tags),
            str(snapshot.totals.blobs),
            human_size(snapshot.totals.size),
            str(len(snapshot.missing)),
        )
        for snapshot in snapshots
    ]
    print_rows(("backup", "made", "tags", "blobs", "size", "missing"), rows, "there is no complete backup")
