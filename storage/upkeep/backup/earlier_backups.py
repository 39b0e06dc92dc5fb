"""Checks that a backup goes to the right directory. A *snapshot* is the copy of a registry that one backup has added to
the directory. There are two checks:

- `check_mounted` fails if the earlier backups are on a disk that is not mounted. Without that disk, its mount point is
  an empty directory on another disk, and the new backup would fill this other disk. The check uses the result of the
  earlier backup's job: the name of the snapshot, and the mount point of the directory's file system. The result has no
  device number, because a restart of the machine can change the number.
- `find_foreign_snapshots` finds snapshots of another registry, which a backup must not remove. Such snapshots mean that
  the directory is the wrong one, or that the server began a new registry because the disk with the registry's data was
  not mounted.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from storage.backups import BackupFailed, Snapshots
from storage.jobs import Jobs, JobState
from storage.upkeep.backup.backup_directory import BackupDirectory, SnapshotManifest

KIND: Final = "backup"
"""The kind of the jobs that make backups."""
_JOBS_PER_READ: Final = 50
"""Number of jobs that are read from the store at a time."""


@dataclass(frozen=True, slots=True)
class EarlierBackup:
    """A complete earlier backup. `mount_point`: where the file system of the backup's directory was mounted; empty: not
    recorded, because an old version of this program made the backup. `snapshot`: the name of the backup's snapshot."""

    mount_point: str
    snapshot: str


def mount_point(path: Path) -> Path:
    """Returns the mount point of the file system of `path`. If `path` is missing, uses the file system in which `path`
    would be created. Blocks. Raises OSError.

    A bind mount of a directory within its own file system does not count as a mount point, because it has the device
    number of its parent directory. systemd makes such bind mounts for a service."""
    directory = Path(os.path.realpath(path))
    while not directory.exists():
        directory = directory.parent
    device = directory.stat().st_dev
    while directory != directory.parent and directory.parent.stat().st_dev == device:
        directory = directory.parent
    return directory


async def find_earlier_backup(jobs: Jobs, target: Path) -> EarlierBackup | None:
    """Returns the newest complete backup to the directory `target`; None if `jobs` lists no such backup.
    Raises StorageFailed."""
    before = None
    while True:
        page = await jobs.jobs(before, _JOBS_PER_READ, KIND)
        for job in page.items:
            if job.state is JobState.DONE and job.arguments.get("target") == str(target):
                result = job.result or {}
                return EarlierBackup(str(result.get("mount_point", "")), str(result.get("snapshot", "")))
        if not page.more:
            return None
        before = page.items[-1].id


def check_mounted(target: Path, earlier: EarlierBackup) -> None:
    """Raises BackupFailed if the file system that had the backup `earlier` is not mounted. Call this function only if
    `target` has neither the snapshot of `earlier` nor a later snapshot. Blocks. Raises OSError."""
    current_mount, earlier_mount = mount_point(target), Path(earlier.mount_point)
    is_below = earlier_mount != current_mount and earlier_mount.is_relative_to(current_mount)
    if earlier.mount_point and is_below:
        raise BackupFailed(
            f"earlier backups to {target} are on the file system of {earlier_mount}, which is not mounted now; "
            "mount it, or begin a new directory of backups with --new"
        )


def find_foreign_snapshots(
    snapshots: Snapshots, directory: BackupDirectory, name: str, stored: Sequence[SnapshotManifest]
) -> list[SnapshotManifest]:
    """Returns the `stored` snapshots that belong to another registry than the snapshot `name`. Leaves out snapshots
    whose registry is not known (`_instance_id`). Returns an empty list if the registry of the snapshot `name` is not
    known. Blocks."""
    own = _instance_id(snapshots, directory, name)
    return [other for other in stored if own and _instance_id(snapshots, directory, other.name) not in ("", own)]


def _instance_id(snapshots: Snapshots, directory: BackupDirectory, name: str) -> str:
    """Returns the id of a snapshot's registry (`DatabaseSnapshot.instance_id`). Returns an empty text if the snapshot
    has no id or cannot be read."""
    with suppress(BackupFailed), snapshots.open(directory.database(name)) as snapshot:
        return snapshot.instance_id
    return ""


def foreign_warning(directory: BackupDirectory, foreign: Sequence[SnapshotManifest], own_registry: str) -> str:
    """Returns the text of a warning about snapshots of another registry. `foreign`: the snapshots, at least one.
    `own_registry`: the words after "of another registry than", such as `this one`."""
    number = len(foreign)
    return (
        f"{directory.root} has {number} {'backup' if number == 1 else 'backups'} of another registry than "
        f"{own_registry}, such as {foreign[-1].name}; give each registry a directory of its own"
    )
