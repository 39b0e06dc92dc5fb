"""Tests that interrupt a backup or a restore by SIGKILL or by a simulated power cut. The complete snapshots can be
restored, and the next run completes the work."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
from contextlib import closing
from functools import partial
from pathlib import Path

import apsw
import pytest

from storage.composition import has_data, open_registry, prepare_data_dir
from storage.content import Manifest, digest_of
from storage.data_dir.layout import Layout
from storage.data_dir.system import System
from storage.metadata.sqlite.upkeep.sqlite_snapshots import SqliteSnapshots
from storage.names import Tag
from storage.upkeep.backup.backup_directory import BackupDirectory
from storage.upkeep.backup.restore import RestoreOptions, restore_backup
from tests.fakes.registry_content import all_tags
from tests.fakes.upkeep_store import APP
from tests.system.crash.crash_runs import assert_consistent, check_killed_runs, check_power_cuts, pulled_blobs
from tests.system.crash.killed_backup import back_up_in, make_source, quiet_reporter, restore_in
from tests.system.crash.power_cut_disk import DiskAfterCut, RecordingSystem
from tests.system.crash.workload import files_below

OLD_TAGS, NEW_TAGS = ["kept", "old"], ["again", "kept", "new"]
"""The tags in the backup that `make_source` makes, and the tags that the store has after `make_source`."""


def snapshot_names(folder: Path) -> list[str]:
    """Returns the names of the complete snapshots."""
    return [snapshot.name for snapshot in BackupDirectory(folder / "backups", System()).snapshots()]


def contents(folder: Path) -> dict[str, bytes]:
    """Returns the bytes of all files below `folder`, by name."""
    return {file.name: file.read_bytes() for file in files_below(folder)}


async def check_data(data: Path, kept_image: Manifest) -> list[str]:
    """Checks that the restored store is complete. Returns its tags."""
    prepare_data_dir(data)
    async with open_registry(data) as store:
        await assert_consistent(store)
        tags = await all_tags(store, APP)
        for tag in tags:
            await pulled_blobs(store, APP, Tag(tag))
        assert (await store.get_manifest(APP, Tag("kept"))).body == kept_image.body
    return tags


async def check_newest(folder: Path, kept_image: Manifest, tags: list[str]) -> None:
    """Checks that the newest snapshot can be restored completely and has these tags."""
    await restore_in(folder / "backups", folder / "restored", System())
    assert await check_data(folder / "restored" / "data", kept_image) == tags
    shutil.rmtree(folder / "restored")


async def check_backups(folder: Path, source: Path, kept_image: Manifest) -> None:
    """Checks that a complete snapshot exists and can be restored. Then checks the next backup."""
    names = snapshot_names(folder)
    assert names
    # The name begins with the year. The first backup is from 2001.
    await check_newest(folder, kept_image, OLD_TAGS if names[-1].startswith("2001") else NEW_TAGS)
    await check_next_backup(folder, source)


async def check_next_backup(folder: Path, source: Path) -> None:
    """Makes the next backup. Checks that it has all blobs of the store byte for byte, and no other files."""
    await back_up_in(source, folder, System())
    assert len(snapshot_names(folder)) == 1
    assert len(list((folder / "backups" / "snapshots").iterdir())) == 1
    assert not list((folder / "backups" / "incoming").iterdir())
    assert contents(folder / "backups" / "blobs") == contents(source / "blobs")


async def check_restored(folder: Path, backups: Path, kept_image: Manifest) -> None:
    """Restores the backup again if the interrupted restore is not complete. Then checks the store."""
    data = folder / "data"
    if not has_data(data) or Layout(data).restore_marker.exists():
        await restore_in(backups, folder, System())
    assert await check_data(data, kept_image) == OLD_TAGS


def look_at_backups(disk: DiskAfterCut) -> None:
    """Checks that each snapshot with a manifest file has its database and all blobs that the database names."""
    manifests = [name for name in disk.names if name.startswith("backups/snapshots/") and name.endswith(".json")]
    for name in manifests:
        fields = json.loads(disk.names[name] or b"")
        database = disk.names[f"{Path(name).parent}/entrepot.db"] or b""
        assert hashlib.sha256(database).hexdigest() == fields["database"]["sha256"]
        with closing(apsw.Connection(":memory:")) as db:
            db.deserialize("main", database)
            for (digest,) in db.execute("SELECT digest FROM blob"):
                algorithm, _, encoded = digest.partition(":")
                blob = disk.names[f"backups/blobs/{algorithm}/{encoded[:2]}/{encoded}"]
                assert digest_of(blob or b"") == digest


def look_at_restored(disk: DiskAfterCut) -> None:
    """Checks that the data directory is empty, has its database, or is marked as unfinished. No server starts on a
    marked directory."""
    if any(name.startswith("data/") for name in disk.names):
        assert "data/restore.json" in disk.names or "data/entrepot.db" in disk.names


@pytest.mark.slow
def test_next_backup_completes_a_killed_backup(memory_folder: Path) -> None:
    """After a SIGKILL, a complete snapshot exists and can be restored, and the next backup succeeds."""
    source = memory_folder / "source"
    kept_image = asyncio.run(make_source(source, memory_folder / "start" / "backups"))

    async def check(folder: Path, _: int) -> None:
        await check_backups(folder, source, kept_image)

    assert check_killed_runs("tests.system.crash.killed_backup", memory_folder, str(source), "backup", check=check) > 15


@pytest.mark.slow
async def test_snapshots_are_complete_after_a_power_cut(memory_folder: Path) -> None:
    """After a power cut, the complete snapshots can be restored and the next backup succeeds. A finished backup
    survives the power cut. `look_at_backups` checks every disk that the power cut could leave. The slow `check` runs
    only for a sample of these disks."""
    source, start = memory_folder / "source", memory_folder / "start"
    kept_image = await make_source(source, start / "backups")
    system = RecordingSystem(start)
    system.trust(source)  # the power cut does not affect the source

    async def check(folder: Path, _: int) -> None:
        await check_backups(folder, source, kept_image)

    async def check_end(folder: Path) -> None:
        assert len(snapshot_names(folder)) == 1
        await check_newest(folder, kept_image, NEW_TAGS)

    cuts = await check_power_cuts(
        start, partial(back_up_in, source), check,
        system=system, write_disk=DiskAfterCut.write_as_directory, every=23,
        look_at=look_at_backups, check_end=check_end,
    )  # fmt: skip
    assert cuts > 30


@pytest.mark.slow
async def test_first_backup_is_complete_or_absent_after_a_power_cut(memory_folder: Path) -> None:
    """After a power cut, the first backup is either complete or absent. A finished backup is complete."""
    source, start = memory_folder / "source", memory_folder / "start"
    kept_image = await make_source(source, memory_folder / "other backups")
    start.mkdir()
    system = RecordingSystem(start)
    system.trust(source)  # the power cut does not affect the source

    async def check(folder: Path, _: int) -> None:
        if snapshot_names(folder):
            await check_newest(folder, kept_image, NEW_TAGS)
        else:
            await check_next_backup(folder, source)

    async def check_end(folder: Path) -> None:
        await check_newest(folder, kept_image, NEW_TAGS)

    cuts = await check_power_cuts(
        start, partial(back_up_in, source), check,
        system=system, write_disk=DiskAfterCut.write_as_directory, every=151,
        look_at=look_at_backups, check_end=check_end,
    )  # fmt: skip
    assert cuts > 500


@pytest.mark.slow
def test_next_restore_completes_a_killed_restore(memory_folder: Path) -> None:
    """After a SIGKILL, the restore is complete or marked as unfinished, and the next restore completes it."""
    backups = memory_folder / "backups"
    kept_image = asyncio.run(make_source(memory_folder / "source", backups))
    (memory_folder / "start").mkdir()

    async def check(folder: Path, _: int) -> None:
        await check_restored(folder, backups, kept_image)

    assert (
        check_killed_runs("tests.system.crash.killed_backup", memory_folder, str(backups), "restore", check=check) > 15
    )


@pytest.mark.slow
@pytest.mark.parametrize("may_link", [False, True])
async def test_next_restore_completes_a_restore_after_a_power_cut(memory_folder: Path, *, may_link: bool) -> None:
    """After a power cut, an unfinished restore is marked, and the next restore completes it. A finished restore
    survives the power cut. `may_link`: whether restored files may be hard links to files of the backup."""
    backups, start = memory_folder / "backups", memory_folder / "start"
    kept_image = await make_source(memory_folder / "source", backups)
    start.mkdir()

    async def check(folder: Path, _: int) -> None:
        await check_restored(folder, backups, kept_image)

    async def check_end(folder: Path) -> None:
        assert await check_data(folder / "data", kept_image) == OLD_TAGS

    async def run(folder: Path, system: System) -> None:
        layout = Layout(folder / "data")
        snapshots, options = SqliteSnapshots(layout.metadata, system=system), RestoreOptions(backups, may_link=may_link)
        await restore_backup(snapshots, layout, options, quiet_reporter(), system=system)

    cuts = await check_power_cuts(
        start, run, check,
        write_disk=DiskAfterCut.write_as_directory, every=211, look_at=look_at_restored, check_end=check_end,
    )  # fmt: skip
    assert cuts > 500
