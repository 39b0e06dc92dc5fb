"""Backups to a disk that is not mounted any more. The tests mount file systems in a mount namespace of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.fakes.commands import command_environment

BACKUP = f"{sys.executable} -m registry backup --data data"
PREPARE = f"{sys.executable} -m registry user add alice --generate --data data > output 2>&1 && mkdir disk other"


def run(folder: Path, *lines: str) -> list[str]:
    """Runs a shell script, one line after the other, in a mount namespace of its own. Returns the lines of its output,
    without those about blobs. Raises AssertionError if a line fails."""
    namespace_command = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    done = subprocess.run(
        [*namespace_command, "--propagation", "private", "sh", "-e", "-c", "\n".join((PREPARE, *lines))],
        cwd=folder,
        env=command_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout
    return [line for line in done.stdout.splitlines() if "already there" not in line]


def test_a_disk_that_is_not_mounted(tmp_path: Path) -> None:
    """If the disk of earlier backups is not mounted, a backup to the same directory fails and writes nothing, also if
    there were backups to other directories since. The same command works when the disk is mounted again, and `--new`
    begins a new directory of backups without the disk."""
    output = run(
        tmp_path,
        "mount -t tmpfs none disk",
        f"{BACKUP} disk/backups",
        f"{BACKUP} other",
        "mount --move disk other",
        f"{BACKUP} disk/backups && exit 1",
        '[ -z "$(ls disk)" ]',
        "mount --move other disk",
        f"{BACKUP} disk/backups",
        "umount disk",
        f"{BACKUP} disk/backups && exit 1",
        f"{BACKUP} disk/backups --new",
        f"{BACKUP} disk/backups",
    )
    target = tmp_path / "disk/backups"
    refusal = (
        f"entrepot: earlier backups to {target} are on the file system of {tmp_path}/disk, which is not mounted now; "
        "mount it, or begin a new directory of backups with --new"
    )
    assert [line for line in output if "/snapshots/" not in line] == [refusal, refusal]
    assert len([line for line in output if line.startswith(f"{target}/snapshots/")]) == 4


def test_backups_below_the_mount_point(tmp_path: Path) -> None:
    """If the disk is not mounted, a backup fails also if there are other backups below its mount point, as earlier
    versions made them. If only the newest backup was removed from the disk, the next one works without a warning."""
    output = run(
        tmp_path,
        f"{BACKUP} disk",
        "sleep 1",  # snapshots are named after the second in which they are made
        "mount -t tmpfs none disk",
        f"{BACKUP} disk",
        "umount disk",
        "touch reference",
        f"{BACKUP} disk && exit 1",
        '[ -z "$(find disk -newer reference)" ]',
        f"{BACKUP} disk --new",
        "rm -r disk/snapshots/*",
        f"{BACKUP} disk",
    )
    warning = (
        f"entrepot: warning: the earlier backups are gone from {tmp_path}/disk; this backup is the first one there now"
    )
    refusal = (
        f"entrepot: earlier backups to {tmp_path}/disk are on the file system of {tmp_path}/disk, which is not mounted "
        "now; mount it, or begin a new directory of backups with --new"
    )
    assert [line for line in output if "/snapshots/" not in line] == [warning, refusal]


def test_targets_used_in_turn(tmp_path: Path) -> None:
    """Neither a first backup to a directory, nor two directories used in turn, nor a new disk at the same path needs an
    option. If the earlier backups are gone although their file system is mounted, the backup only warns, and `--new`
    does not."""
    output = run(
        tmp_path,
        "mount -t tmpfs none disk",
        *(f"{BACKUP} {target}" for target in ("disk", "other", "disk", "other")),
        "umount disk",
        "mount -t tmpfs none disk",
        f"{BACKUP} disk",
        f"{BACKUP} disk",
        "rm -r disk/*",
        f"{BACKUP} disk --new",
        f"{BACKUP} disk --new",
    )
    warning = (
        f"entrepot: warning: the earlier backups are gone from {tmp_path}/disk; this backup is the first one there now"
    )
    assert [line for line in output if "/snapshots/" not in line] == [warning]
    assert len(output) == 9
