"""What a registry knows about its earlier backups to a directory."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from registry.upkeep.backup_work import backup_arguments, backup_work
from storage.backups import BackupFailed
from storage.composition import open_registry, prepare_data_dir
from storage.jobs import JobState
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.backup.earlier_backups import EarlierBackup, find_earlier_backup, mount_point
from storage.upkeep.job_runner import run_in_command


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[StoredRegistry]:
    prepare_data_dir(tmp_path / "data")
    async with open_registry(tmp_path / "data") as opened:
        yield opened


def test_mount_points(tmp_path: Path) -> None:
    """The mount point of a path is the topmost directory of its file system, also if the path is missing or a symbolic
    link."""
    (tmp_path / "link").symlink_to("/proc/self")
    assert mount_point(Path("/proc/sys/kernel")) == Path("/proc")
    assert mount_point(Path("/")) == Path("/")
    assert mount_point(tmp_path / "link") == Path("/proc")
    expected = mount_point(tmp_path)
    assert os.path.ismount(expected)
    assert mount_point(tmp_path / "missing/below") == expected


async def test_the_newest_complete_backup_counts(store: StoredRegistry) -> None:
    """The newest complete backup to the same directory says where its file system was mounted. A backup that failed, a
    backup to another directory, and one of an earlier version, which did not record it, say nothing."""
    target = Path("/mnt/backups")

    async def add(state: JobState, directory: str, **result: object) -> None:
        job = await store.jobs.add("backup", {"target": directory}, actor="cli:alice")
        await store.jobs.end(job.id, state, "", {"target": directory, "snapshot": "s", **result})

    assert await find_earlier_backup(store.jobs, target) is None
    await add(JobState.DONE, "/mnt/backups", mount_point="/mnt")
    for _ in range(120):  # more than a page of the list
        await add(JobState.DONE, "/mnt/other", mount_point="/mnt/other")
    await add(JobState.FAILED, "/mnt/backups")
    assert await find_earlier_backup(store.jobs, target) == EarlierBackup("/mnt", "s")
    await add(JobState.DONE, "/mnt/backups")
    assert await find_earlier_backup(store.jobs, target) == EarlierBackup("", "s")


async def test_a_queued_backup_without_its_disk(store: StoredRegistry, tmp_path: Path) -> None:
    """A backup that a server runs fails as well if the file system of the earlier ones is not mounted. With
    `ignores_earlier_backups`, it succeeds. A job that an earlier version has queued runs like one without
    `ignores_earlier_backups`."""
    target, work = tmp_path / "disk/backups", backup_work(store, tmp_path / "data")
    job = await store.jobs.add("backup", {"target": str(target)}, actor="cli:alice")
    await store.jobs.end(job.id, JobState.DONE, "", {"mount_point": str(tmp_path / "disk")})
    arguments = backup_arguments(target, None, verify=False)
    del arguments["new"]
    with pytest.raises(BackupFailed, match=r"which is not mounted now; mount it, or .* with --new"):
        await run_in_command(store.jobs, store.leases, "backup", arguments, work, actor="cli:alice")
    assert not (tmp_path / "disk").exists()
    arguments = backup_arguments(target, None, verify=False, ignores_earlier_backups=True)
    result = await run_in_command(store.jobs, store.leases, "backup", arguments, work, actor="cli:alice")
    assert result["mount_point"] == str(mount_point(tmp_path))


async def test_a_restored_registry_knows_no_later_backup(store: StoredRegistry, tmp_path: Path) -> None:
    """If a directory has a later snapshot than the newest backup that the registry knows, it is the right one, wherever
    it is mounted: a restored registry does not know the backup from which it was restored. If all snapshots are older,
    the disk is not mounted."""
    target, work = tmp_path / "disk/backups", backup_work(store, tmp_path / "data")
    arguments = backup_arguments(target, None, verify=False)
    await run_in_command(store.jobs, store.leases, "backup", arguments, work, actor="cli:alice")

    async def add_earlier(snapshot: str) -> None:
        job = await store.jobs.add("backup", arguments, actor="cli:alice")
        result = {"mount_point": str(tmp_path / "disk"), "snapshot": snapshot}
        await store.jobs.end(job.id, JobState.DONE, "", result)

    await add_earlier("2001-01-31T09-30-00Z")
    await run_in_command(store.jobs, store.leases, "backup", arguments, work, actor="cli:alice")
    await add_earlier("2999-01-31T09-30-00Z")
    with pytest.raises(BackupFailed, match="not mounted now"):
        await run_in_command(store.jobs, store.leases, "backup", arguments, work, actor="cli:alice")
