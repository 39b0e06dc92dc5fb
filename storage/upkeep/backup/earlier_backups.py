"""Looks at the earlier backups of a directory, to notice that it is the wrong one. A *snapshot* is the copy of a
registry that one backup has added to the directory.

- The directory may have lost the earlier backups, above all because its disk is not mounted (`check_mounted`). Without
  this check, a backup would then fill the disk on which the mount point lies, and succeed. The result of each backup
  says where the file system of its directory was mounted (`mount_point`), and the name of its snapshot. The store keeps
  the result with the job. The result has no device number, because a device may have another number after a restart of
  the machine.
- The directory may have snapshots of another registry (`find_foreign`): somebody names the wrong directory, or a server
  has begun a new registry at a mount point whose disk is not mounted. A backup must then not remove the snapshots of
  the other registry as old ones.
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
    """A complete backup that was made before. `mount_point`: where the file system of its directory was mounted; empty
    if an earlier version of this program made it. `snapshot`: the name of its snapshot."""

    mount_point: str
    snapshot: str


def mount_point(path: Path) -> Path:
    """Returns the topmost directory of the file system that contains `path`, or in which `path` would be created. Does
    not notice a bind mount of a directory of the same file system, as systemd makes for a service: then returns the
    mount point above the bind mount. Blocks. Raises OSError."""
    place = Path(os.path.realpath(path))
    while not place.exists():
        place = place.parent
    device = place.stat().st_dev
    while place != place.parent and place.parent.stat().st_dev == device:
        place = place.parent
    return place


async def find_earlier(jobs: Jobs, target: Path) -> EarlierBackup | None:
    """Returns the newest complete backup to the directory `target`; None if none is known. Raises StorageFailed."""
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
    """Raises BackupFailed if the file system of the backup `earlier` is not mounted. Call it if `target` has neither
    the snapshot of `earlier` nor a later one. Blocks. Raises OSError."""
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
    """Returns those of the `stored` snapshots that are of another registry than the snapshot `name`. A snapshot whose
    registry is unknown or cannot be read does not count. Blocks."""
    own = _instance_id(snapshots, directory, name)
    return [other for other in stored if own and _instance_id(snapshots, directory, other.name) not in ("", own)]


def _instance_id(snapshots: Snapshots, directory: BackupDirectory, name: str) -> str:
    """Returns the id of the registry of a snapshot (`DatabaseSnapshot.instance_id`); empty if it cannot be read."""
    with suppress(BackupFailed), snapshots.open(directory.database(name)) as snapshot:
        return snapshot.instance_id
    return ""


def foreign_warning(directory: BackupDirectory, foreign: Sequence[SnapshotManifest], registry: str) -> str:
    """Returns the text of a warning about `foreign` snapshots. `registry`: the words after "of another registry
    than", such as `this one`."""
    number = len(foreign)
    return (
        f"{directory.root} has {number} {'backup' if number == 1 else 'backups'} of another registry than {registry}, "
        f"such as {foreign[-1].name}; give each registry a directory of its own"
    )
