"""Backups and restores that end early: killed before a step, or cancelled."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from storage.backups import BackupFailed
from storage.composition import prepare_data_dir
from storage.data_dir.check import DataDirectoryError
from storage.data_dir.system import System
from storage.errors import BlobUnknown
from storage.jobs import JSON
from storage.names import Digest
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.backup.backup import BackupOptions, make_backup
from storage.upkeep.backup.backup_directory import BackupDirectory
from storage.upkeep.backup.file_copies import THREADS
from storage.upkeep.reporter import PlainReporter
from tests.fakes.registry_content import BY, push_blob, push_image
from tests.unit.storage.upkeep.test_backup import LARGE, REPO, backup, check_image, restore
from tests.unit.storage.upkeep.test_backup import store as store

MAX_EXTRA_STEPS = 2 * (THREADS - 1)
"""By how many steps two runs of the same backup or restore can differ. The threads that start at the same time may all
create a file and try to clone into it, before one of them finds that the file system cannot clone."""


class Ended(BaseException):
    """Raised where a test would kill the process."""


class EndingSystem(System):
    """A system that raises `Ended` instead of step number `number`, and instead of every later step. A step is a call
    that changes files."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.steps_left = number

    def _step(self) -> None:
        self.steps_left -= 1
        if self.steps_left <= 0:
            raise Ended

    def __getattribute__(self, name: str) -> Any:
        if name in ("open", "write", "sync", "rename", "unlink", "mkdir", "link", "clone"):
            call: Callable[..., Any] = super().__getattribute__(name)

            def count_step_and_call(*args: Any, **options: Any) -> Any:
                if name != "open" or args[1] & (os.O_CREAT):  # other calls of `open` change no file
                    self._step()
                return call(*args, **options)

            return count_step_and_call
        return super().__getattribute__(name)


class SystemWithoutManifest(System):
    """A system that performs all steps except the one that completes a snapshot: instead of giving the file
    `manifest.json` its name, it raises `Ended`."""

    def rename(self, source: Path, target: Path) -> None:
        if target.name == "manifest.json":
            raise Ended
        super().rename(source, target)


def chosen_steps(count: int) -> list[int]:
    """Returns the numbers of the steps before which the tests end a run of `count` steps: the first and the last steps,
    and a few steps in the middle, because the steps in the middle are alike."""
    return sorted({*range(1, min(30, count)), *range(30, count, 211), *range(max(count - 12, 30), count + 1)})


@pytest.mark.slow
async def test_a_backup_that_is_killed_at_any_step(store: StoredRegistry, tmp_path: Path) -> None:
    """Ends a backup before each of the chosen steps, as a kill would. The next backup is complete, and each snapshot
    that is listed can be restored."""
    manifest = await push_image(store, REPO, "one", "v1")
    await push_blob(store, REPO, LARGE)
    counting = EndingSystem(10**9)
    await backup(store, tmp_path / "whole", system=counting)
    steps = chosen_steps(10**9 - counting.steps_left)
    ended_runs = 0
    for number in steps:
        target = tmp_path / f"backups{number}"
        ending = EndingSystem(number)
        with suppress(Ended):
            await backup(store, target, system=ending)
        ended_runs += ending.steps_left <= 0
        if (target / "snapshots").exists() and BackupDirectory(target, System()).snapshots():
            await restore(target, tmp_path / f"early{number}")
            await check_image(tmp_path / f"early{number}", "v1", manifest.digest)
        await backup(store, target, now=2e9)
        assert [snapshot.name for snapshot in BackupDirectory(target, System()).snapshots()][
            -1
        ] == "2033-05-18T03-33-20Z"
        shutil.rmtree(target)
    assert ended_runs >= len(steps) - MAX_EXTRA_STEPS


@pytest.mark.slow
async def test_a_restore_that_is_killed_at_any_step(store: StoredRegistry, tmp_path: Path) -> None:
    """Ends a restore before each of the chosen steps, as a kill would. No server starts with the incomplete data
    directory. The next restore completes it."""
    manifest = await push_image(store, REPO, "one", "v1")
    await push_blob(store, REPO, LARGE)
    await backup(store, tmp_path / "backups")
    counting = EndingSystem(10**9)
    await restore(tmp_path / "backups", tmp_path / "whole", system=counting)
    steps = chosen_steps(10**9 - counting.steps_left)
    ended_runs = 0
    for number in steps:
        data = tmp_path / f"new{number}"
        ending = EndingSystem(number)
        with suppress(Ended):
            await restore(tmp_path / "backups", data, system=ending)
        ended_runs += ending.steps_left <= 0
        if not (data / "entrepot.db").exists() or (data / "restore.json").exists():  # the restore is incomplete
            if (data / "restore.json").exists():
                with pytest.raises(DataDirectoryError):
                    prepare_data_dir(data)
            await restore(tmp_path / "backups", data)
        prepare_data_dir(data)
        await check_image(data, "v1", manifest.digest)
        shutil.rmtree(data)
    assert ended_runs >= len(steps) - MAX_EXTRA_STEPS


async def test_a_cancelled_backup_leaves_no_snapshot(store: StoredRegistry, tmp_path: Path) -> None:
    """A backup that is cancelled in the middle leaves no snapshot, and no longer prevents garbage collection."""
    manifest = await push_image(store, REPO, "one", "v1")
    for blob in range(20):
        await push_blob(store, REPO, LARGE + bytes([blob]))
    first_blob_copied = asyncio.Event()

    class WaitingReporter(PlainReporter):
        """Sets `first_blob_copied` when the backup reports a copied blob. The test waits for this event."""

        def step(self, event: str, /, **fields: JSON) -> None:
            if event == "blob":
                first_blob_copied.set()

    reporter = WaitingReporter(lambda _: None, lambda _: None)
    options = BackupOptions(tmp_path / "backups")
    arguments = store.snapshots, store.blobs, store.leases, options, reporter
    running = asyncio.create_task(make_backup(*arguments, clock=lambda: 1e9, holder="a test"))
    await first_blob_copied.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running

    assert BackupDirectory(tmp_path / "backups", System()).snapshots() == []
    with pytest.raises(BackupFailed, match="has no complete snapshot"):
        await restore(tmp_path / "backups", tmp_path / "new")
    await store.delete_manifest(REPO, manifest.digest, by=BY)
    assert (await store.collector.collect()).blobs == 22  # 20 pushed blobs, and the config and layer of the image
    with pytest.raises(BlobUnknown):
        await store.resolve_blob(REPO, manifest.blobs[0].digest)


async def delete_image(store: StoredRegistry, digest: Digest) -> None:
    """Deletes an image and its blobs from the store."""
    await store.delete_manifest(REPO, digest, by=BY)
    assert (await store.collector.collect()).blobs == 2


def blobs_in(target: Path) -> set[str]:
    """Returns the names of the blobs in a directory of backups."""
    return {path.name for path in (target / "blobs").rglob("*") if path.is_file()}


@pytest.mark.slow
async def test_blobs_of_an_interrupted_backup_are_removed(store: StoredRegistry, tmp_path: Path) -> None:
    """A backup is killed after it has copied all blobs, and then the registry deletes some of them. The next backup,
    without `keep`, copies no blob again and removes none. A further backup with `keep` removes the deleted blobs,
    although it removes no snapshot."""
    first = await push_image(store, REPO, "one", "v1")
    await backup(store, tmp_path / "backups", now=1e9)
    deleted = await push_image(store, REPO, "two", "v2")
    kept = await push_image(store, REPO, "three", "v3")
    with pytest.raises(Ended):
        await backup(store, tmp_path / "backups", now=11e8, system=SystemWithoutManifest())
    every_blob = {blob.digest.encoded for image in (first, deleted, kept) for blob in image.blobs}
    assert blobs_in(tmp_path / "backups") == every_blob
    await delete_image(store, deleted.digest)

    result, _ = await backup(store, tmp_path / "backups", now=12e8)
    assert blobs_in(tmp_path / "backups") == every_blob
    assert result["copied_blobs"] == 0
    result, _ = await backup(store, tmp_path / "backups", now=13e8, keep=5)
    assert (result["removed_snapshots"], result["removed_blobs"]) == ([], 2)
    assert blobs_in(tmp_path / "backups") == every_blob - {blob.digest.encoded for blob in deleted.blobs}
    for snapshot, image, tag in (("2001-09-09T01-46-40Z", first, "v1"), (None, kept, "v3")):
        await restore(tmp_path / "backups", tmp_path / tag, snapshot=snapshot)
        await check_image(tmp_path / tag, tag, image.digest)


@pytest.mark.slow
async def test_a_killed_removal_of_a_snapshot_is_completed(store: StoredRegistry, tmp_path: Path) -> None:
    """A backup is killed after it has removed an old snapshot, and before it removes the blobs that only this snapshot
    needs. The next backup with `keep` removes them, although it removes no snapshot."""
    old = await push_image(store, REPO, "old", "v1")
    await backup(store, tmp_path / "backups", now=1e9)
    await delete_image(store, old.digest)
    new = await push_image(store, REPO, "new", "v2")

    class EndingReporter(PlainReporter):
        def step(self, event: str, /, **fields: JSON) -> None:
            if event == "snapshot removed":
                raise Ended

    reporter = EndingReporter(lambda _: None, lambda _: None)
    arguments = store.snapshots, store.blobs, store.leases, BackupOptions(tmp_path / "backups", keep=1), reporter
    with pytest.raises(Ended):
        await make_backup(*arguments, clock=lambda: 11e8, holder="a test")
    assert len(blobs_in(tmp_path / "backups")) == 4

    result, _ = await backup(store, tmp_path / "backups", now=12e8, keep=2)
    assert (result["removed_snapshots"], result["removed_blobs"]) == ([], 2)
    assert blobs_in(tmp_path / "backups") == {blob.digest.encoded for blob in new.blobs}
