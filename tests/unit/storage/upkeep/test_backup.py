"""A backup is complete and small, and a restore from it gives the same registry."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import stat
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import apsw
import pytest

from storage.access import AccountName, LoginSession
from storage.backups import BackupFailed
from storage.composition import open_registry, prepare_data_dir, restore_data_dir
from storage.data_dir.check import DataDirectoryError
from storage.data_dir.system import System
from storage.errors import BlobUnknown, ManifestUnknown
from storage.jobs import JSON, JobRunning, JobState
from storage.names import Digest, RepositoryName, Tag
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.backup.backup import BackupOptions, hash_file, make_backup
from storage.upkeep.backup.backup_directory import BackupDirectory
from storage.upkeep.backup.file_copies import THREADS
from storage.upkeep.backup.restore import DAMAGED_IN_BACKUP, RestoreOptions
from storage.upkeep.job_runner import JobContext, run_in_command
from storage.upkeep.reporter import PlainReporter
from tests.fakes.registry_content import BY, push_blob, push_image, read_blob
from tests.fakes.scrub_runs import file_of, flip_byte, scrub

REPO = RepositoryName("team/app")
LARGE = os.urandom(200_000)  # large enough to stay in its file
ROTTEN = bytes([LARGE[0] ^ 1]) + LARGE[1:]
"""`LARGE` with another first byte."""


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[StoredRegistry]:
    prepare_data_dir(tmp_path / "data")
    async with open_registry(tmp_path / "data", grace=0) as opened:
        yield opened


async def backup(
    store: StoredRegistry, target: Path, *, now: float = 1e9, system: System | None = None, **options: Any
) -> tuple[Any, list[Mapping[str, JSON]]]:
    steps: list[Mapping[str, JSON]] = []
    reporter = PlainReporter(steps.append, lambda _: None)
    made = BackupOptions(target, **options)
    result: Any = await make_backup(
        *(store.snapshots, store.blobs, store.leases, made, reporter), clock=lambda: now, holder="a test", system=system
    )
    return result, steps


async def restore(target: Path, data: Path, *, system: System | None = None, **options: Any) -> Any:
    reporter = PlainReporter(lambda _: None, lambda _: None)
    return await restore_data_dir(data, RestoreOptions(target, **options), reporter, system=system)


async def check_image(data: Path, tag: str, digest: Digest) -> None:
    """Checks that the restored data directory serves the complete image."""
    async with open_registry(data) as restored:
        manifest = await restored.get_manifest(REPO, Tag(tag))
        assert manifest.digest == digest
        for blob in manifest.blobs:
            assert len(await read_blob(restored, REPO, blob.digest)) == blob.size


async def test_a_backup_restores(store: StoredRegistry, tmp_path: Path) -> None:
    """The restored registry has the same tags and blobs. It has no unfinished jobs or uploads, and no browser sessions,
    because a session that was ended after the backup would be valid again."""
    manifest = await push_image(store, REPO, "one", "v1")
    large = await push_blob(store, REPO, LARGE)
    upload = await store.start_upload(REPO)
    await upload.write(b"half")
    await upload.aclose()
    job = await store.jobs.add("gc", {}, actor="alice", is_resumable=True)
    session = LoginSession("one", AccountName("alice"), "password", 1.0, 1e12, 1.0, "", "")
    await store.accounts.add_login_session(session, b"hash", by=BY)
    result, steps = await backup(store, tmp_path / "backups")

    assert (result["blobs"], result["copied_blobs"], result["missing"]) == (3, 3, [])
    assert {step["digest"] for step in steps if step["event"] == "blob"} >= {large.digest}
    restored = await restore(tmp_path / "backups", tmp_path / "new")
    assert (restored["restored_blobs"], restored["manifests"], restored["tags"]) == (3, 1, 1)
    await check_image(tmp_path / "new", "v1", manifest.digest)
    async with open_registry(tmp_path / "new") as opened:
        assert await read_blob(opened, REPO, large.digest) == LARGE
        assert (await opened.jobs.job(job.id)).state is JobState.STOPPED
        assert not await opened.metadata.stale_uploads(1e12, 10)
        assert opened.accounts.login_sessions(session.account) == []
        await push_image(opened, REPO, "after the restore", "v2")


async def test_a_second_backup_copies_what_is_new(store: StoredRegistry, tmp_path: Path) -> None:
    await push_image(store, REPO, "one", "v1")
    first, _ = await backup(store, tmp_path / "backups")
    await push_image(store, REPO, "two", "v2")
    second, _ = await backup(store, tmp_path / "backups", now=2e9)

    assert (first["copied_blobs"], second["copied_blobs"], second["present_blobs"]) == (2, 2, 2)
    assert [first["snapshot"], second["snapshot"]] == ["2001-09-09T01-46-40Z", "2033-05-18T03-33-20Z"]
    written = json.loads((tmp_path / "backups/snapshots" / second["snapshot"] / "manifest.json").read_text())
    assert (written["version"], written["blobs"], written["tags"], written["missing"]) == (1, 4, 2, [])


async def test_files_on_one_file_system_are_linked(store: StoredRegistry, tmp_path: Path) -> None:
    """Files on the same file system are hard-linked, but only if the caller allows it. Only the owner can read the
    backup."""
    large = await push_blob(store, REPO, LARGE)
    row = await store.metadata.blob(REPO, large.digest)
    await backup(store, tmp_path / "linked")
    await backup(store, tmp_path / "copied", may_link=False)

    source = (tmp_path / "data" / row.place).stat()
    linked, copied = (BackupDirectory(tmp_path / name, System()).blob(large.digest) for name in ("linked", "copied"))
    assert linked.stat().st_ino == source.st_ino != copied.stat().st_ino
    assert linked.read_bytes() == copied.read_bytes() == LARGE
    assert stat.S_IMODE((tmp_path / "linked").stat().st_mode) == 0o700


async def test_old_snapshots_and_their_blobs_go(store: StoredRegistry, tmp_path: Path) -> None:
    old = await push_image(store, REPO, "old", "v1")
    await backup(store, tmp_path / "backups", now=1e9)
    await store.delete_manifest(REPO, old.digest, by=BY)
    await store.collector.collect()
    new = await push_image(store, REPO, "new", "v2")
    result, _ = await backup(store, tmp_path / "backups", now=2e9, keep=1)

    assert (result["removed_snapshots"], result["removed_blobs"]) == (["2001-09-09T01-46-40Z"], 2)
    files = [path.name for path in (tmp_path / "backups/blobs").rglob("*") if path.is_file()]
    assert sorted(files) == sorted(blob.digest.encoded for blob in new.blobs)
    await restore(tmp_path / "backups", tmp_path / "new")
    await check_image(tmp_path / "new", "v2", new.digest)


async def test_collection_leaves_the_blobs_of_a_running_backup(store: StoredRegistry, tmp_path: Path) -> None:
    """An image that is deleted after the database was copied is in the backup. It is collected after the end of the
    backup."""
    manifest = await push_image(store, REPO, "one", "v1")
    blobs = [await store.metadata.blob(REPO, blob.digest) for blob in manifest.blobs]
    reports: list[int] = []

    class Deleting(PlainReporter):
        async def report(self, *args: Any, **fields: Any) -> None:
            if fields.get("message") == "copying blobs":
                await store.delete_manifest(REPO, manifest.digest, by=BY)
                reports.append((await store.collector.collect()).blobs)

    reporter = Deleting(lambda _: None, lambda _: None)
    options = BackupOptions(tmp_path / "backups")
    await make_backup(
        *(store.snapshots, store.blobs, store.leases, options, reporter), clock=lambda: 1e9, holder="a test"
    )

    assert reports == [0]
    assert (await store.collector.collect()).blobs == 2
    assert not [row for row in blobs if (tmp_path / "data" / row.place).exists()]
    await restore(tmp_path / "backups", tmp_path / "new")
    await check_image(tmp_path / "new", "v1", manifest.digest)


async def test_a_blob_without_bytes_is_reported(store: StoredRegistry, tmp_path: Path) -> None:
    """A backup without one blob is complete except for this blob, and names it. A restore has to be told that it may
    leave it out."""
    large = await push_blob(store, REPO, LARGE)
    manifest = await push_image(store, REPO, "one", "v1")
    (tmp_path / "data" / (await store.metadata.blob(REPO, large.digest)).place).unlink()
    result, steps = await backup(store, tmp_path / "backups")

    assert result["missing"] == [large.digest]
    assert {"event": "missing", "digest": large.digest, "reason": "its file is missing"} in steps
    with pytest.raises(BackupFailed, match=f"1 blobs .* among them {large.digest}.*--skip-damaged"):
        await restore(tmp_path / "backups", tmp_path / "new")
    with pytest.raises(DataDirectoryError, match="a restore from a backup has not ended"):
        prepare_data_dir(tmp_path / "new")
    restored = await restore(tmp_path / "backups", tmp_path / "new", skip_damaged=True)
    assert restored["damaged"] == [large.digest]
    await check_image(tmp_path / "new", "v1", manifest.digest)
    async with open_registry(tmp_path / "new") as opened:
        [damaged] = (await opened.damage.damaged_blobs(None, 10)).items
        assert (damaged.digest, damaged.reason, damaged.repositories) == (large.digest, DAMAGED_IN_BACKUP, [REPO])
        with pytest.raises(BlobUnknown, match="push the image again"):
            await read_blob(opened, REPO, large.digest)
        await push_blob(opened, REPO, LARGE)
        assert await read_blob(opened, REPO, large.digest) == LARGE


async def test_damage_that_is_known_is_left_out(store: StoredRegistry, tmp_path: Path) -> None:
    """The backup names a blob that is known to be damaged, and ends without an error. So does a restore, and the
    restored registry knows of the damage. If the backup has the blob's right bytes from before, it keeps them."""
    linked = await push_blob(store, REPO, LARGE + b"linked")
    await backup(store, tmp_path / "backups")
    before = await push_blob(store, REPO, LARGE + b"copied")
    await backup(store, tmp_path / "backups", now=15e8, may_link=False)
    after = await push_blob(store, REPO, LARGE)
    manifest = await push_image(store, REPO, "one", "v1")
    broken = await push_image(store, REPO, "two", "v2")
    for blob in (linked, before, after):
        flip_byte(file_of(store, blob.digest))
    change_manifest(tmp_path / "data", broken.digest)
    await scrub(store)
    result, steps = await backup(store, tmp_path / "backups", now=2e9)

    assert (sorted(result["damaged"]), result["missing"]) == (sorted([linked.digest, after.digest]), [])
    assert {"event": "damaged", "digest": after.digest, "reason": "the registry knows that it is damaged"} in steps
    for target in ("backups", "other"):
        if target == "other":
            result, _ = await backup(store, tmp_path / target)
            assert sorted(result["damaged"]) == sorted([linked.digest, before.digest, after.digest])
        restored = await restore(tmp_path / target, tmp_path / f"new from {target}")
        assert (restored["damaged"], restored["healed_blobs"]) == ([], 1 if target == "backups" else 0)
        await check_image(tmp_path / f"new from {target}", "v1", manifest.digest)
    await push_blob(store, REPO, LARGE + b"linked")
    result, _ = await backup(store, tmp_path / "backups", now=3e9)
    assert (result["damaged"], result["copied_blobs"]) == ([after.digest], 1)
    async with open_registry(tmp_path / "new from backups") as opened:
        assert await read_blob(opened, REPO, before.digest) == LARGE + b"copied"
        assert await opened.damage.damaged_count() == 3
    async with open_registry(tmp_path / "new from other") as opened:
        assert await opened.damage.damaged_count() == 4
        with pytest.raises(ManifestUnknown, match="push the image again"):
            await opened.get_manifest(REPO, Tag("v2"))
        result, _ = await scrub(opened)
        assert (result["damaged"], await opened.damage.damaged_count()) == (0, 4)


@pytest.mark.parametrize("is_interrupted", [False, True])
async def test_right_bytes_of_a_damaged_blob_are_restored(
    store: StoredRegistry, tmp_path: Path, is_interrupted: bool
) -> None:
    """If the snapshot says that a blob is damaged, but the backup has its right bytes, the restored registry serves the
    blob and knows of no damage, also after an interrupted restore. Wrong bytes are not restored."""
    image = await push_image(store, REPO, "one", "v1")
    healed, left = await push_blob(store, REPO, LARGE), await push_blob(store, REPO, LARGE + b"left")
    for blob in (healed, left):
        flip_byte(file_of(store, blob.digest))
    await scrub(store)
    result, _ = await backup(store, tmp_path / "backups")
    assert sorted(result["damaged"]) == sorted([healed.digest, left.digest])
    directory = BackupDirectory(tmp_path / "backups", System())
    directory.blob(healed.digest).write_bytes(LARGE)
    directory.blob(left.digest).write_bytes(LARGE + b"LEFT")
    if is_interrupted:
        rotten = directory.blob(image.blobs[0].digest)
        content = rotten.read_bytes()
        rotten.unlink()
        with pytest.raises(BackupFailed, match="1 blobs of this backup are missing"):
            await restore(tmp_path / "backups", tmp_path / "new")
        rotten.write_bytes(content)
    restored = await restore(tmp_path / "backups", tmp_path / "new")

    assert (restored["damaged"], restored["healed_blobs"]) == ([], 1)
    await check_image(tmp_path / "new", "v1", image.digest)
    async with open_registry(tmp_path / "new") as opened:
        assert await read_blob(opened, REPO, healed.digest) == LARGE
        assert [blob.digest for blob in (await opened.damage.damaged_blobs(None, 10)).items] == [left.digest]
        result, _ = await scrub(opened)
        assert result["damaged"] == 0


def change_manifest(data: Path, digest: Digest) -> None:
    """Damages a stored manifest."""
    db = apsw.Connection(str(data / "entrepot.db"))
    db.execute("UPDATE manifest SET body = X'7b7d' WHERE digest = ?", (digest,))
    assert db.changes()
    db.close()


async def test_verify_finds_rotten_bytes(store: StoredRegistry, tmp_path: Path) -> None:
    """A restore refuses wrong bytes by their digest. A backup with `verify` replaces wrong bytes in the backup, and
    never copies wrong bytes from the store."""
    large = await push_blob(store, REPO, LARGE)
    await backup(store, tmp_path / "backups", may_link=False)
    copy = BackupDirectory(tmp_path / "backups", System()).blob(large.digest)
    copy.write_bytes(ROTTEN)

    with pytest.raises(BackupFailed, match=large.digest):
        await restore(tmp_path / "backups", tmp_path / "new")
    assert not (tmp_path / "new/entrepot.db").exists()
    result, steps = await backup(store, tmp_path / "backups", may_link=False, verify=True, now=2e9)
    assert (result["copied_blobs"], copy.read_bytes() == LARGE) == (1, True)
    assert steps[1]["event"] == "damaged in the backup"

    (tmp_path / "data" / (await store.metadata.blob(REPO, large.digest)).place).write_bytes(ROTTEN)
    copied, _ = await backup(store, tmp_path / "copied", may_link=False)
    linked, _ = await backup(store, tmp_path / "linked", verify=True)
    assert copied["missing"] == linked["missing"] == [large.digest]


async def test_two_at_once(store: StoredRegistry, tmp_path: Path) -> None:
    """A second backup at the same time is refused, with the name of who runs the first, in the same store and in the
    same directory."""
    await push_image(store, REPO, "one", "v1")

    async def work(context: JobContext) -> JSON:
        async def again() -> None:
            await run_in_command(store.jobs, store.leases, "backup", {}, work, actor="cli:bob")

        with pytest.raises(JobRunning, match="cli:alice is running backup already"):
            await again()
        return None

    await run_in_command(store.jobs, store.leases, "backup", {}, work, actor="cli:alice")
    await backup(store, tmp_path / "backups")
    with BackupDirectory(tmp_path / "backups", System()).locked("the backup of alice"):
        with pytest.raises(BackupFailed, match="the backup of alice is using"):
            await backup(store, tmp_path / "backups")
        with pytest.raises(BackupFailed, match="the backup of alice is using"):
            await restore(tmp_path / "backups", tmp_path / "new")


async def test_bad_directories(store: StoredRegistry, tmp_path: Path) -> None:
    """A backup needs a new directory or one with backups. A restore needs an empty one."""
    await push_image(store, REPO, "one", "v1")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").touch()
    with pytest.raises(BackupFailed, match="is not empty and is no directory of backups"):
        await backup(store, tmp_path / "other")
    with pytest.raises(BackupFailed, match="is no directory of backups"):
        await restore(tmp_path / "other", tmp_path / "new")
    await backup(store, tmp_path / "backups")
    with pytest.raises(BackupFailed, match="is not empty; name a new directory"):
        await restore(tmp_path / "backups", tmp_path / "other")
    with pytest.raises(BackupFailed, match="has no snapshot 2020; it has 2001-09-09T01-46-40Z"):
        await restore(tmp_path / "backups", tmp_path / "new", snapshot="2020")
    database = tmp_path / "backups/snapshots/2001-09-09T01-46-40Z/entrepot.db"
    database.write_bytes(database.read_bytes()[:-1] + b"!")
    with pytest.raises(BackupFailed, match="does not have the SHA-256"):
        await restore(tmp_path / "backups", tmp_path / "new")


async def test_a_backup_of_a_newer_version_is_refused(store: StoredRegistry, tmp_path: Path) -> None:
    result, _ = await backup(store, tmp_path / "backups")
    folder = tmp_path / "backups/snapshots" / result["snapshot"]
    db = apsw.Connection(str(folder / "entrepot.db"))
    db.pragma("user_version", 1000)
    db.close()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["database"]["sha256"] = hash_file(folder / "entrepot.db")[0]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BackupFailed, match="a newer Entrepot made this backup"):
        await restore(tmp_path / "backups", tmp_path / "new")


class Ended(BaseException):
    """Takes the place of the end of the process."""


class EndingSystem(System):
    """A system that ends its process before step `number`, and makes no step after that."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.left = number

    def _step(self) -> None:
        self.left -= 1
        if self.left <= 0:
            raise Ended

    def __getattribute__(self, name: str) -> Any:
        if name in ("open", "write", "sync", "rename", "unlink", "mkdir", "link", "clone"):
            call: Callable[..., Any] = super().__getattribute__(name)

            def stepping(*args: Any, **options: Any) -> Any:
                if name != "open" or args[1] & (os.O_CREAT):
                    self._step()
                return call(*args, **options)

            return stepping
        return super().__getattribute__(name)


def chosen_steps(count: int) -> list[int]:
    """Returns the numbers of the steps before which a run is ended: the first and the last ones, and a few of those in
    the middle, which are alike."""
    return sorted({*range(1, min(30, count)), *range(30, count, 211), *range(max(count - 12, 30), count + 1)})


@pytest.mark.slow
async def test_ended_at_any_step(store: StoredRegistry, tmp_path: Path) -> None:
    """If a backup ends before any of its durable steps, the next backup is complete, and each snapshot that counts as
    complete can be restored."""
    manifest = await push_image(store, REPO, "one", "v1")
    await push_blob(store, REPO, LARGE)
    counting = EndingSystem(10**9)
    await backup(store, tmp_path / "whole", system=counting)
    for number in chosen_steps(10**9 - counting.left):
        target = tmp_path / f"backups{number}"
        with pytest.raises(Ended):
            await backup(store, target, system=EndingSystem(number))
        if (target / "snapshots").exists() and BackupDirectory(target, System()).snapshots():
            await restore(target, tmp_path / f"early{number}")
            await check_image(tmp_path / f"early{number}", "v1", manifest.digest)
        await backup(store, target, now=2e9)
        assert [made.name for made in BackupDirectory(target, System()).snapshots()][-1] == "2033-05-18T03-33-20Z"
        shutil.rmtree(target)


@pytest.mark.slow
async def test_a_restore_ended_at_any_step(store: StoredRegistry, tmp_path: Path) -> None:
    """No server starts on an incomplete restore. The next restore continues it."""
    manifest = await push_image(store, REPO, "one", "v1")
    await push_blob(store, REPO, LARGE)
    await backup(store, tmp_path / "backups")
    counting = EndingSystem(10**9)
    await restore(tmp_path / "backups", tmp_path / "whole", system=counting)
    steps = chosen_steps(10**9 - counting.left)
    ended = 0
    for number in steps:
        data = tmp_path / f"new{number}"
        ending = EndingSystem(number)
        with suppress(Ended):
            await restore(tmp_path / "backups", data, system=ending)
        ended += ending.left <= 0
        if not (data / "entrepot.db").exists() or (data / "restore.json").exists():
            if (data / "restore.json").exists():
                with pytest.raises(DataDirectoryError):
                    prepare_data_dir(data)
            await restore(tmp_path / "backups", data)
        prepare_data_dir(data)
        await check_image(data, "v1", manifest.digest)
        shutil.rmtree(data)
    # Threads that start at the same time may all try to share blocks before the first finds that this is impossible. So
    # a run can have a few steps more or less.
    assert ended >= len(steps) - THREADS


async def test_stopped_in_the_middle(store: StoredRegistry, tmp_path: Path) -> None:
    """A stopped backup leaves no snapshot, and no longer delays garbage collection."""
    manifest = await push_image(store, REPO, "one", "v1")
    for blob in range(20):
        await push_blob(store, REPO, LARGE + bytes([blob]))
    reached = asyncio.Event()

    class Waiting(PlainReporter):
        def step(self, event: str, /, **fields: JSON) -> None:
            if event == "blob":
                reached.set()

    reporter = Waiting(lambda _: None, lambda _: None)
    options = BackupOptions(tmp_path / "backups")
    parts = store.snapshots, store.blobs, store.leases, options, reporter
    running = asyncio.create_task(make_backup(*parts, clock=lambda: 1e9, holder="a test"))
    await reached.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running

    assert BackupDirectory(tmp_path / "backups", System()).snapshots() == []
    with pytest.raises(BackupFailed, match="has no complete snapshot"):
        await restore(tmp_path / "backups", tmp_path / "new")
    await store.delete_manifest(REPO, manifest.digest, by=BY)
    assert (await store.collector.collect()).blobs == 22
    with pytest.raises(BlobUnknown):
        await store.resolve_blob(REPO, manifest.blobs[0].digest)
