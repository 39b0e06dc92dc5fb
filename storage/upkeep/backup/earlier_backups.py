"""Compares a backup with earlier backups, to notice that it goes to the wrong directory. A *snapshot* is the copy of a
registry that one backup has added to the directory. There are two checks:

- `check_mounted`: the earlier backups may be missing because the disk of the directory is not mounted. Without this
  check, the backup would fill the disk that contains the empty mount point, and succeed. The check needs the result of
  an earlier backup, which the store keeps with the job: the name of the snapshot, and where the file system of the
  directory was mounted (`mount_point`). The result has no device number, because a device may have another number
  after a restart of the machine.
- `find_foreign`: the directory may have snapshots of another registry. Somebody may have named the wrong directory. Or
  the disk with the registry's data was not mounted, and the server began a new registry at the mount point. A backup
  must not remove the snapshots of another registry when it removes its own old ones.
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
    """A complete earlier backup. `mount_point`: where the file system of its directory was mounted; empty if the backup
    was made by a version of this program that did not record it. `snapshot`: the name of its snapshot."""

    mount_point: str
    snapshot: str


def mount_point(path: Path) -> Path:
    """Returns the topmost directory of the file system of `path`. If `path` is missing, uses the file system in which
    `path` would be created. Ignores a bind mount within one file system, as systemd makes for a service, and returns
    the mount point above it. Blocks. Raises OSError."""
    place = Path(os.path.realpath(path))
    while not place.exists():
        place = place.parent
    device = place.stat().st_dev
    while place != place.parent and place.parent.stat().st_dev == device:
        place = place.parent
    return place


async def find_earlier(jobs: Jobs, target: Path) -> EarlierBackup | None:
    """Returns the newest complete backup to the directory `target`; None if `jobs` has no such backup. Raises
    StorageFailed."""
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
    """Raises BackupFailed if the file system that had the backup `earlier` is not mounted. Call it if `target` has
    neither the snapshot of `earlier` nor a later snapshot. Blocks. Raises OSError."""
    current_mount, earlier_mount = mount_point(target), Path(earlier.mount_point)
    is_below = earlier_mount != current_mount and earlier_mount.is_relative_to(current_mount)
    if earlier.mount_point and is_below:
        raise BackupFailed(
            f"earlier backups to {target} are on the file system of {earlier_mount}, which is not mounted now; "
            "mount it, or begin a new directory of backups with --new"
        )


def find_foreign(
    snapshots: Snapshots, directory: BackupDirectory, name: str, stored: Sequence[SnapshotManifest]
) -> list[SnapshotManifest]:
    """Returns the `stored` snapshots that belong to another registry than the snapshot `name`. Leaves out snapshots
    whose registry is not known (`_instance_id`). If the registry of `name` is not known, returns none. Blocks."""
    own = _instance_id(snapshots, directory, name)
    return [other for other in stored if own and _instance_id(snapshots, directory, other.name) not in ("", own)]


def _instance_id(snapshots: Snapshots, directory: BackupDirectory, name: str) -> str:
    """Returns the id of a snapshot's registry (`DatabaseSnapshot.instance_id`). Returns an empty text if the snapshot
    has no id or cannot be read."""
    with suppress(BackupFailed), snapshots.open(directory.database(name)) as snapshot:
        return snapshot.instance_id
    return ""


def foreign_warning(directory: BackupDirectory, foreign: Sequence[SnapshotManifest], registry: str) -> str:
    """Returns the text of a warning about snapshots of another registry. `foreign`: these snapshots, not empty.
    `registry`: the words after "of another registry than", such as `this one`."""
    number = len(foreign)
    return (
        f"{directory.root} has {number} {'backup' if number == 1 else 'backups'} of another registry than {registry}, "
        f"such as {foreign[-1].name}; give each registry a directory of its own"
    )
