"""Backups of damaged blobs and manifests, and backups whose own files are damaged."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from storage.backups import BackupFailed
from storage.composition import open_registry, prepare_data_dir
from storage.data_dir.check import DataDirectoryError
from storage.data_dir.system import System
from storage.errors import BlobUnknown, ManifestUnknown
from storage.names import Digest, Tag
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.backup.backup_directory import BackupDirectory
from storage.upkeep.backup.restore import DAMAGED_IN_BACKUP
from tests.fakes.forbidden_files import ForbiddenFiles
from tests.fakes.registry_content import push_blob, push_image, read_blob
from tests.fakes.scrub_runs import file_of, flip_byte, scrub
from tests.fakes.second_connection import second_connection
from tests.unit.storage.upkeep.test_backup import LARGE, REPO, backup, check_image, restore
from tests.unit.storage.upkeep.test_backup import store as store

CORRUPT = bytes([LARGE[0] ^ 1]) + LARGE[1:]
"""`LARGE` with another first byte."""


async def test_a_blob_without_bytes_is_reported(store: StoredRegistry, tmp_path: Path) -> None:
    """If the file of a blob is missing, the backup names the blob and has all other content. A restore from this backup
    needs the option `skip_damaged`. In the restored registry, the blob counts as damaged until it is pushed again."""
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


@pytest.mark.slow
async def test_known_damage_does_not_fail_a_backup(store: StoredRegistry, tmp_path: Path) -> None:
    """If a scrub has marked blobs as damaged, a backup succeeds, and names the blobs of which its directory does not
    have the right bytes. A restore from this backup succeeds as well, and marks these blobs as damaged in the restored
    registry. If an earlier backup to the same directory has copied the right bytes of a blob, they are restored."""
    linked = await push_blob(store, REPO, LARGE + b"linked")
    await backup(store, tmp_path / "backups")
    copied = await push_blob(store, REPO, LARGE + b"copied")
    await backup(store, tmp_path / "backups", now=15e8, may_link=False)
    not_in_backup = await push_blob(store, REPO, LARGE)
    manifest = await push_image(store, REPO, "one", "v1")
    damaged_manifest = await push_image(store, REPO, "two", "v2")
    for blob in (linked, copied, not_in_backup):
        # The first backup has a hard link to the file of `linked`, so this changes the bytes in the backup as well.
        flip_byte(file_of(store, blob.digest))
    change_manifest(tmp_path / "data", damaged_manifest.digest)
    await scrub(store)
    result, steps = await backup(store, tmp_path / "backups", now=2e9)

    assert (sorted(result["damaged"]), result["missing"]) == (sorted([linked.digest, not_in_backup.digest]), [])
    # The step goes on with the digest of the wrong bytes in the older file.
    [reason] = [step["reason"] for step in steps if step.get("digest") == linked.digest]
    assert "older file of the blob, which failed its check: its bytes have the digest" in str(reason)
    assert {
        "event": "damaged",
        "digest": not_in_backup.digest,
        "reason": "the registry knows that it is damaged",
    } in steps
    for target in ("backups", "other"):
        if target == "other":
            result, _ = await backup(store, tmp_path / target)
            assert sorted(result["damaged"]) == sorted([linked.digest, copied.digest, not_in_backup.digest])
        restored = await restore(tmp_path / target, tmp_path / f"new from {target}")
        assert (restored["damaged"], restored["healed_blobs"]) == ([], 1 if target == "backups" else 0)
        await check_image(tmp_path / f"new from {target}", "v1", manifest.digest)
    await push_blob(store, REPO, LARGE + b"linked")
    result, _ = await backup(store, tmp_path / "backups", now=3e9)
    assert (result["damaged"], result["copied_blobs"]) == ([not_in_backup.digest], 1)
    async with open_registry(tmp_path / "new from backups") as opened:
        assert await read_blob(opened, REPO, copied.digest) == LARGE + b"copied"
        assert await opened.damage.damaged_count() == 3  # two blobs and a manifest
    async with open_registry(tmp_path / "new from other") as opened:
        assert await opened.damage.damaged_count() == 4  # three blobs and a manifest
        with pytest.raises(ManifestUnknown, match="push the image again"):
            await opened.get_manifest(REPO, Tag("v2"))
        result, _ = await scrub(opened)
        assert (result["damaged"], await opened.damage.damaged_count()) == (0, 4)


@pytest.mark.parametrize("is_interrupted", [False, True])
@pytest.mark.slow
async def test_right_bytes_of_a_damaged_blob_are_restored(
    store: StoredRegistry, tmp_path: Path, is_interrupted: bool
) -> None:
    """A blob is marked as damaged in the database of a backup, but the backup has the right bytes of the blob. After a
    restore, also one that was interrupted and run again, the registry serves the blob, and it is not marked as damaged.
    Wrong bytes are not restored."""
    image = await push_image(store, REPO, "one", "v1")
    healed = await push_blob(store, REPO, LARGE)
    still_damaged = await push_blob(store, REPO, LARGE + b"left")
    for blob in (healed, still_damaged):
        flip_byte(file_of(store, blob.digest))
    await scrub(store)
    result, _ = await backup(store, tmp_path / "backups")
    assert sorted(result["damaged"]) == sorted([healed.digest, still_damaged.digest])
    directory = BackupDirectory(tmp_path / "backups", System())
    directory.blob(healed.digest).write_bytes(LARGE)
    directory.blob(still_damaged.digest).write_bytes(LARGE + b"LEFT")
    if is_interrupted:
        missing_file = directory.blob(image.blobs[0].digest)
        content = missing_file.read_bytes()
        missing_file.unlink()
        with pytest.raises(BackupFailed, match="1 blobs of this backup are missing"):
            await restore(tmp_path / "backups", tmp_path / "new")
        missing_file.write_bytes(content)
    restored = await restore(tmp_path / "backups", tmp_path / "new")

    assert (restored["damaged"], restored["healed_blobs"]) == ([], 1)
    await check_image(tmp_path / "new", "v1", image.digest)
    async with open_registry(tmp_path / "new") as opened:
        assert await read_blob(opened, REPO, healed.digest) == LARGE
        assert [blob.digest for blob in (await opened.damage.damaged_blobs(None, 10)).items] == [still_damaged.digest]
        result, _ = await scrub(opened)
        assert result["damaged"] == 0


@pytest.mark.parametrize("is_readable_again", [True, False])
@pytest.mark.slow
async def test_a_failed_read_deletes_no_bytes_of_a_backup(
    store: StoredRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_readable_again: bool
) -> None:
    """Only a backup has the right bytes of a damaged blob. If the disk cannot read them, the next backup names the
    blob and keeps the file, also when it deletes old snapshots. If the disk can read the file again later, a restore
    restores the blob."""
    blob = await push_blob(store, REPO, LARGE)
    await backup(store, tmp_path / "backups", may_link=False)
    flip_byte(file_of(store, blob.digest))
    await scrub(store)
    file = BackupDirectory(tmp_path / "backups", System()).blob(blob.digest)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", failing_pread(file))
        result, steps = await backup(store, tmp_path / "backups", now=2e9, keep=1)
        assert (result["damaged"], result["missing"], result["removed_blobs"]) == ([blob.digest], [], 0)
        assert "the disk cannot read it" in str([step for step in steps if step["event"] == "damaged"])
        assert file.exists()
        if not is_readable_again:
            restored = await restore(tmp_path / "backups", tmp_path / "new")
            assert (restored["healed_blobs"], restored["restored_blobs"]) == (0, 0)
            return
    restored = await restore(tmp_path / "backups", tmp_path / "new")
    assert (restored["healed_blobs"], restored["restored_blobs"]) == (1, 1)
    result, _ = await backup(store, tmp_path / "backups", now=3e9)
    assert (result["damaged"], result["present_blobs"], file.read_bytes() == LARGE) == ([], 1, True)


@pytest.mark.slow
async def test_forbidden_files_of_a_backup(
    store: StoredRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a restore may not open the file of a blob in the backup, it names the blob and the file, and restores all
    other blobs. It fails also with `skip_damaged`, because the file may be right, and does not advise that option. The
    next run continues once the file may be read. A backup with `verify` replaces such a file."""
    blob = await push_blob(store, REPO, LARGE)
    manifest = await push_image(store, REPO, "one", "v1")
    await backup(store, tmp_path / "backups", may_link=False)
    file = BackupDirectory(tmp_path / "backups", System()).blob(blob.digest)
    with monkeypatch.context() as patch:
        ForbiddenFiles(patch).paths.add(file)
        for skip_damaged in (False, True):
            with pytest.raises(
                BackupFailed,
                match=f"no permission to open the files of 1 blobs of this backup, among them {blob.digest}",
            ) as caught:
                await restore(tmp_path / "backups", tmp_path / "new", skip_damaged=skip_damaged)
            assert f"uid {os.geteuid()}" in caught.value.message
            assert "--skip-damaged" not in caught.value.message
    restored = await restore(tmp_path / "backups", tmp_path / "new")
    assert (restored["restored_blobs"], restored["damaged"]) == (1, [])
    await check_image(tmp_path / "new", "v1", manifest.digest)
    with monkeypatch.context() as patch:
        ForbiddenFiles(patch).paths.add(file)
        result, steps = await backup(store, tmp_path / "backups", now=2e9, verify=True, may_link=False)
    assert (result["copied_blobs"], result["missing"]) == (1, [])
    assert f"{file} cannot be opened: Permission denied" in str(steps)


async def test_wrong_bytes_of_a_backup_are_not_replaced_by_other_wrong_bytes(
    store: StoredRegistry, tmp_path: Path
) -> None:
    """The file of a blob has wrong bytes in the backup as well as in the registry, and no scrub has found the damage.
    Once a backup has found it, each further backup finds it again: no backup links the wrong bytes of the registry
    without a check. This holds also if the clock was ahead when the damage was found."""
    blob = await push_blob(store, REPO, LARGE)
    await backup(store, tmp_path / "backups", now=3e9)  # makes a hard link to the blob's file
    flip_byte(file_of(store, blob.digest))
    for now, verify in ((3.5e9, True), (3.1e9, False), (3.2e9, False)):
        result, steps = await backup(store, tmp_path / "backups", now=now, verify=verify)
        assert (result["missing"], result["copied_blobs"], result["present_blobs"]) == ([blob.digest], 0, 0)
        (reason,) = [step["reason"] for step in steps if step["event"] == "missing"]
        assert "the backup keeps its older file of the blob, which failed its check" in reason
        assert not [step for step in steps if step["event"] == "damaged in the backup"]


async def test_a_failed_read_does_not_replace_right_bytes_by_wrong_ones(
    store: StoredRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backup has the right bytes of a blob. The registry has wrong ones, and no scrub has found the damage. If the
    disk cannot read the backup's file, the next backup keeps this file."""
    blob = await push_blob(store, REPO, LARGE)
    # Makes a copy, which stays right. By its time, 2001, this backup is older than the push of the blob. So the next
    # backup checks the file, as the push may have replaced damaged bytes.
    await backup(store, tmp_path / "backups", now=1e9, may_link=False)
    flip_byte(file_of(store, blob.digest))
    file = BackupDirectory(tmp_path / "backups", System()).blob(blob.digest)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", failing_pread(file))
        result, _ = await backup(store, tmp_path / "backups", now=3e9)
    assert (result["missing"], file.read_bytes() == LARGE) == ([blob.digest], True)


def failing_pread(file: Path) -> Callable[[int, int, int], bytes]:
    """Returns a replacement for `os.pread` that cannot read `file`."""
    real_pread = os.pread

    def pread(fd: int, length: int, offset: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{fd}") == str(file):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real_pread(fd, length, offset)

    return pread


def change_manifest(data: Path, digest: Digest) -> None:
    """Replaces the body of a stored manifest, so that the manifest is damaged."""
    db = second_connection(data / "entrepot.db")
    db.execute("UPDATE manifest SET body = X'7b7d' WHERE digest = ?", (digest,))
    assert db.changes()
    db.close()


async def test_verify_replaces_corrupt_bytes_in_a_backup(store: StoredRegistry, tmp_path: Path) -> None:
    """A restore checks the digests and refuses corrupt bytes. A backup with `verify` replaces corrupt bytes in its
    directory. No backup copies corrupt bytes from the store, and a backup with `verify` does not link them either."""
    large = await push_blob(store, REPO, LARGE)
    await backup(store, tmp_path / "backups", may_link=False)
    copy = BackupDirectory(tmp_path / "backups", System()).blob(large.digest)
    copy.write_bytes(CORRUPT)

    with pytest.raises(BackupFailed, match=large.digest):
        await restore(tmp_path / "backups", tmp_path / "new")
    assert not (tmp_path / "new/entrepot.db").exists()
    result, steps = await backup(store, tmp_path / "backups", may_link=False, verify=True, now=2e9)
    assert (result["copied_blobs"], copy.read_bytes() == LARGE) == (1, True)
    assert steps[1]["event"] == "damaged in the backup"

    (tmp_path / "data" / (await store.metadata.blob(REPO, large.digest)).place).write_bytes(CORRUPT)
    copied, _ = await backup(store, tmp_path / "copied", may_link=False)
    linked, _ = await backup(store, tmp_path / "linked", verify=True)
    assert copied["missing"] == linked["missing"] == [large.digest]


@pytest.mark.parametrize("is_pushed", [True, False], ids=["pushed", "put into its place"])
@pytest.mark.slow
async def test_a_link_to_a_damaged_file_is_replaced_after_the_blob_is_healed(
    store: StoredRegistry, tmp_path: Path, is_pushed: bool
) -> None:
    """A backup makes a hard link to the file of a blob. Then the disk changes the bytes of the file. After a scrub has
    found the damage and the blob is pushed again, the next backup replaces its link by the right bytes. It does the
    same if an operator puts the right file back at the place of the blob, and a scrub finds it there."""
    blob = await push_blob(store, REPO, LARGE)
    await backup(store, tmp_path / "backups", now=time.time())
    flip_byte(file_of(store, blob.digest))
    await scrub(store)
    if is_pushed:
        await push_blob(store, REPO, LARGE)
    else:
        file_of(store, blob.digest).write_bytes(LARGE)
        assert (await scrub(store))[0]["healed"] == 1
    result, steps = await backup(store, tmp_path / "backups", now=time.time())
    assert (result["copied_blobs"], result["missing"], result["damaged"]) == (1, [], [])
    assert [step["digest"] for step in steps if step["event"] == "damaged in the backup"] == [blob.digest]
    assert BackupDirectory(tmp_path / "backups", System()).blob(blob.digest).read_bytes() == LARGE
    again, _ = await backup(store, tmp_path / "backups", now=time.time() + 1)
    assert (again["copied_blobs"], again["present_blobs"]) == (0, result["blobs"])
