"""Notices that a directory of backups has lost its earlier backups, above all because its disk is not mounted
(`check_earlier`). Without this check, a backup would then fill the disk on which the mount point lies, and succeed.

The result of each backup says where the file system of its directory was mounted (`mount_point`), and the store keeps
it with the job. This works after a restart of the machine too, when devices may have other numbers.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from storage.backups import BackupFailed
from storage.jobs import Jobs, JobState

KIND: Final = "backup"
"""The kind of the jobs that make backups."""
_JOBS_PER_READ: Final = 50
"""Number of jobs that are read from the store at a time."""


def mount_point(path: Path) -> Path:
    """Returns the topmost directory of the file system that contains `path`, or in which `path` would be created. A
    bind mount, as systemd makes for a service, does not count. Blocks. Raises OSError."""
    place = Path(os.path.realpath(path))
    while not place.exists():
        place = place.parent
    device = place.stat().st_dev
    while place != place.parent and place.parent.stat().st_dev == device:
        place = place.parent
    return place


async def find_mount_of_earlier(jobs: Jobs, target: Path) -> str | None:
    """Returns the mount point of the directory `target` during the newest complete backup to it. Empty if an earlier
    version of this program made that backup. None if no backup to it is known. Raises StorageFailed."""
    before = None
    while True:
        page = await jobs.jobs(before, _JOBS_PER_READ, KIND)
        for job in page.items:
            if job.state is JobState.DONE and job.arguments.get("target") == str(target):
                return str((job.result or {}).get("mount_point", ""))
        if not page.more:
            return None
        before = page.items[-1].id


def check_earlier(target: Path, mount_of_earlier: str) -> str:
    """Checks a directory `target` that has no backups now, although there were backups to it. `mount_of_earlier`: the
    result of `find_mount_of_earlier`. Raises BackupFailed if the file system of that time is not mounted; otherwise
    returns a warning for the operator. Blocks. Raises OSError."""
    now = mount_point(target)
    if mount_of_earlier and Path(mount_of_earlier) != now and Path(mount_of_earlier).is_relative_to(now):
        raise BackupFailed(
            f"earlier backups to {target} are on the file system of {mount_of_earlier}, which is not mounted now; "
            "mount it, or begin a new directory of backups with --new"
        )
    return f"{target} has none of its earlier backups any more; this one is the first"
