"""Backups of a registry and restores from them."""

from __future__ import annotations

import errno
import json
import os
import stat
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from storage.access import AccountName, LoginSession
from storage.backups import BackupFailed
from storage.composition import open_registry, prepare_data_dir, restore_data_dir
from storage.data_dir.system import System, boot_id
from storage.jobs import JSON, JobRunning, JobState
from storage.metadata.sqlite.upkeep.sqlite_snapshots import MIN_EVENT_GAP, SqliteSnapshots
from storage.names import Digest, RepositoryName, Tag
from storage.outbox import LIST_READER, EventAction, EventReader
from storage.retention import LostTags, UnusedSince
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.backup.backup import BackupOptions, hash_file, make_backup
from storage.upkeep.backup.backup_directory import BackupDirectory
from storage.upkeep.backup.restore import RestoreOptions
from storage.upkeep.job_runner import JobContext, run_in_command
from storage.upkeep.reporter import PlainReporter
from tests.fakes import written_data_dir as previous_release
from tests.fakes.registry_content import BY, push_blob, push_image, read_blob
from tests.fakes.second_connection import second_connection

REPO = RepositoryName("team/app")
LARGE = os.urandom(200_000)  # more than 64 KiB: a backup makes hard links only to such blobs


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[StoredRegistry]:
    prepare_data_dir(tmp_path / "data")
    async with open_registry(tmp_path / "data", grace=0) as opened:
        yield opened


async def backup(
    store: StoredRegistry, target: Path, *, now: float = 1e9, system: System | None = None, **options: Any
) -> tuple[Any, list[Mapping[str, JSON]]]:
    """Makes a backup. Returns its result and the steps that it has reported."""
    steps: list[Mapping[str, JSON]] = []
    reporter = PlainReporter(steps.append, lambda _: None)
    backup_options = BackupOptions(target, **options)
    result: Any = await make_backup(
        *(store.snapshots, store.blobs, store.leases, backup_options, reporter),
        clock=lambda: now,
        holder="a test",
        system=system,
    )
    return result, steps


async def restore(target: Path, data: Path, *, now: float = 4e9, system: System | None = None, **options: Any) -> Any:
    reporter = PlainReporter(lambda _: None, lambda _: None)
    options_of_restore = RestoreOptions(target, **options)
    return await restore_data_dir(data, options_of_restore, reporter, clock=lambda: now, system=system)


async def check_image(data: Path, tag: str, digest: Digest) -> None:
    """Checks that the restored data directory has the complete image."""
    async with open_registry(data) as restored:
        manifest = await restored.get_manifest(REPO, Tag(tag))
        assert manifest.digest == digest
        for blob in manifest.blobs:
            assert len(await read_blob(restored, REPO, blob.digest)) == blob.size


async def test_a_backup_restores(store: StoredRegistry, tmp_path: Path) -> None:
    """The restored registry has the same tags and blobs. Unfinished jobs are stopped, and unfinished uploads are not
    restored. No browser session is restored: a session that was ended after the backup would be valid again."""
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


async def test_pulls_after_the_backup_may_be_missing(store: StoredRegistry, tmp_path: Path) -> None:
    """A restored registry does not know the pulls between the backup and the restore. So retention treats the restored
    content as pulled at the time of the restore (`unrecorded_until`)."""
    await push_image(store, REPO, "one", "v1")
    untagged = await push_image(store, REPO, "untagged")
    await backup(store, tmp_path / "backups")
    await restore(tmp_path / "backups", tmp_path / "new")

    async with open_registry(tmp_path / "new", clock=lambda: 4e9 + 100) as restored:
        [tag] = await restored.retention.tag_facts(REPO, None)
        assert tag.unrecorded_until == 4e9
        for pulled, expected in ((4e9 - 1, []), (4e9 + 1, [untagged.digest])):
            page = await restored.retention.unused_orphans(REPO, UnusedSince(4e9, 4e9, pulled), None, LostTags())
            assert [manifest.digest for manifest in page.items] == expected
        await push_image(restored, REPO, "two", "v2")
        assert [tag.unrecorded_until for tag in await restored.retention.tag_facts(REPO, None)] == [4e9, None]


async def test_a_backup_of_a_version_that_recorded_no_pulls(tmp_path: Path) -> None:
    """The database of an earlier version, without records of pulls, can be marked as restored. The migration then sets
    the time since which pulls are recorded."""
    started = time.time()
    previous_release.write_data_dir(tmp_path / "data", boot_id())
    database = tmp_path / "data" / "entrepot.db"
    SqliteSnapshots(database).mark_restored(database, started)
    prepare_data_dir(tmp_path / "data")
    async with open_registry(tmp_path / "data") as restored:
        [tag, *_] = await restored.retention.tag_facts(REPO, None)
        assert tag.unrecorded_until is not None
        assert tag.unrecorded_until >= started


EVENTS = [
    EventReader(LIST_READER, frozenset(EventAction), ("**",)),
    EventReader("hook", frozenset(EventAction), ("**",)),
]


async def test_no_event_after_a_restore_has_an_earlier_number(store: StoredRegistry, tmp_path: Path) -> None:
    """Events after a restore have higher numbers than all earlier events. The event list begins with the first event
    after the restore. A backup has only the newest event, without the data about the client that caused it, and no
    delivery."""
    await store.outbox.configure(EVENTS)
    for number in range(5):
        await push_image(store, REPO, f"image {number}", "v1")
    result, _ = await backup(store, tmp_path / "backups")
    at_backup = await store.outbox.newest_number()
    await push_image(store, REPO, "after the backup", "v1")
    newest = await store.outbox.newest_number()
    assert newest > at_backup > 0
    await restore(tmp_path / "backups", tmp_path / "new")

    copy = second_connection(tmp_path / "backups/snapshots" / result["snapshot"] / "entrepot.db")
    columns = "id, kept, actor, address, request_id, user_agent, reason"
    assert copy.execute(f"SELECT {columns} FROM event").fetchall() == [(at_backup, 0, *5 * [""])]
    assert copy.execute("SELECT count(*) FROM event_delivery").get == 0
    copy.close()
    async with open_registry(tmp_path / "new") as restored:
        after_restore, first = await restored.outbox.newest_number(), await restored.outbox.first_complete_number()
        assert after_restore > newest
        assert first == after_restore + 1, "a reader that knows an earlier event learns that it has missed events"
        assert (await restored.outbox.after(0, 100)).events == []
        await restored.outbox.configure(EVENTS)
        await push_image(restored, REPO, "after the restore", "v1")
        events = (await restored.outbox.after(newest, 100)).events
        assert [event.number for event in events] == list(range(first, first + len(events)))
        assert len(events) == await restored.outbox.newest_number() - after_restore > 0


async def test_a_backup_without_events(store: StoredRegistry, tmp_path: Path) -> None:
    """A backup may have no event, although the registry has had some since. The first event after the restore gets a
    higher number than all of them."""
    await push_image(store, REPO, "one", "v1")
    await backup(store, tmp_path / "backups")
    await restore(tmp_path / "backups", tmp_path / "new")
    async with open_registry(tmp_path / "new") as restored:
        first = await restored.outbox.first_complete_number()
        assert first > MIN_EVENT_GAP
        assert (await restored.outbox.after(0, 100)).events == []
        await restored.outbox.configure(EVENTS)
        await push_image(restored, REPO, "two", "v1")
        assert (await restored.outbox.after(0, 1)).events[0].number == first


async def test_a_second_backup_copies_only_new_blobs(store: StoredRegistry, tmp_path: Path) -> None:
    """A second backup to the same directory copies only new blobs."""
    await push_image(store, REPO, "one", "v1")
    first, _ = await backup(store, tmp_path / "backups")
    await push_image(store, REPO, "two", "v2")
    second, _ = await backup(store, tmp_path / "backups", now=2e9)

    assert (first["copied_blobs"], second["copied_blobs"], second["present_blobs"]) == (2, 2, 2)
    assert [first["snapshot"], second["snapshot"]] == ["2001-09-09T01-46-40Z", "2033-05-18T03-33-20Z"]
    snapshot_manifest = json.loads((tmp_path / "backups/snapshots" / second["snapshot"] / "manifest.json").read_text())
    assert (
        snapshot_manifest["version"],
        snapshot_manifest["blobs"],
        snapshot_manifest["tags"],
        snapshot_manifest["missing"],
    ) == (1, 4, 2, [])


async def test_files_on_one_file_system_are_linked(store: StoredRegistry, tmp_path: Path) -> None:
    """If the backup and the data are on one file system, the files of large blobs are hard links. With
    `may_link=False`, they are copies. Only the owner can read the backup."""
    large = await push_blob(store, REPO, LARGE)
    row = await store.metadata.blob(REPO, large.digest)
    await backup(store, tmp_path / "linked")
    await backup(store, tmp_path / "copied", may_link=False)

    source = (tmp_path / "data" / row.place).stat()
    linked, copied = (BackupDirectory(tmp_path / name, System()).blob(large.digest) for name in ("linked", "copied"))
    assert linked.stat().st_ino == source.st_ino != copied.stat().st_ino
    assert linked.read_bytes() == copied.read_bytes() == LARGE
    assert stat.S_IMODE((tmp_path / "linked").stat().st_mode) == 0o700


@pytest.mark.slow
async def test_old_snapshots_and_their_blobs_are_deleted(store: StoredRegistry, tmp_path: Path) -> None:
    """With `keep=1`, a backup deletes all older snapshots and the blobs that only these need."""
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
    """A backup copies the database first. If an image is deleted after that, its blobs stay until the backup ends."""
    manifest = await push_image(store, REPO, "one", "v1")
    blobs = [await store.metadata.blob(REPO, blob.digest) for blob in manifest.blobs]
    collected_counts: list[int] = []

    class DeletingReporter(PlainReporter):
        async def report(self, *args: Any, **fields: Any) -> None:
            if fields.get("message") == "copying blobs":
                await store.delete_manifest(REPO, manifest.digest, by=BY)
                collected_counts.append((await store.collector.collect()).blobs)

    reporter = DeletingReporter(lambda _: None, lambda _: None)
    options = BackupOptions(tmp_path / "backups")
    await make_backup(
        *(store.snapshots, store.blobs, store.leases, options, reporter), clock=lambda: 1e9, holder="a test"
    )

    assert collected_counts == [0]
    assert (await store.collector.collect()).blobs == 2
    assert not [row for row in blobs if (tmp_path / "data" / row.place).exists()]
    await restore(tmp_path / "backups", tmp_path / "new")
    await check_image(tmp_path / "new", "v1", manifest.digest)


@pytest.mark.slow
async def test_only_one_backup_at_a_time(store: StoredRegistry, tmp_path: Path) -> None:
    """While a backup runs, a second backup of the same store or to the same directory is refused."""
    await push_image(store, REPO, "one", "v1")

    async def work(context: JobContext) -> JSON:
        async def start_second_backup() -> None:
            await run_in_command(store.jobs, store.leases, "backup", {}, work, actor="cli:bob")

        with pytest.raises(JobRunning, match="cli:alice is running backup already"):
            await start_second_backup()
        return None

    await run_in_command(store.jobs, store.leases, "backup", {}, work, actor="cli:alice")
    with pytest.raises(FileNotFoundError), BackupDirectory(tmp_path / "backups", System()).locked("a writer"):
        pass  # a writer does not work without the lock
    await backup(store, tmp_path / "backups")
    with BackupDirectory(tmp_path / "backups", System()).locked("the backup of alice"):
        with pytest.raises(BackupFailed, match="the backup of alice is using"):
            await backup(store, tmp_path / "backups")
        with pytest.raises(BackupFailed, match="the backup of alice is using"):
            await restore(tmp_path / "backups", tmp_path / "new")


async def test_unsuitable_directories_are_refused(store: StoredRegistry, tmp_path: Path) -> None:
    """A backup needs a new directory or a directory with backups. A restore needs an empty data directory, an existing
    snapshot, and an unaltered copy of the database."""
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
    with pytest.raises(BackupFailed, match="its SHA-256 is not the one"):
        await restore(tmp_path / "backups", tmp_path / "new")


async def test_a_backup_of_a_newer_version_is_refused(store: StoredRegistry, tmp_path: Path) -> None:
    """A backup whose database has a newer schema version is not restored."""
    result, _ = await backup(store, tmp_path / "backups")
    folder = tmp_path / "backups/snapshots" / result["snapshot"]
    db = second_connection(folder / "entrepot.db")
    db.pragma("user_version", 1000)
    db.close()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["database"]["sha256"] = hash_file(folder / "entrepot.db")[0]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BackupFailed, match="a newer Entrepot made this backup"):
        await restore(tmp_path / "backups", tmp_path / "new")


async def test_a_share_without_private_directories(
    store: StoredRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On some shares, a backup cannot make its directories private. Then it fails before it copies anything."""
    target = tmp_path / "share"
    await backup(store, target)
    (target / "snapshots").chmod(0o755)

    def refuse(path: Path, mode: int) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))

    monkeypatch.setattr(Path, "chmod", refuse)
    with pytest.raises(BackupFailed, match=rf"other users can enter {target}/snapshots, .*uid={os.geteuid()}"):
        await backup(store, target)
    assert len(list((target / "snapshots").iterdir())) == 1
