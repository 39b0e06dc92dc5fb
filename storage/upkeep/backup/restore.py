"""Restores a registry from a backup into an empty data directory (`restore_backup`). A *snapshot* is the copy of a
registry that one backup has added to the directory of backups.

The snapshot's database can record a blob as damaged although the directory of backups has the correct bytes of the
blob, for example from an earlier backup. The restore *heals* such a blob: it restores the bytes, and removes the record
of the damage.

The restore checks the digest of each blob before the blob's file gets its final name in the data directory. The
database gets its final name last. Until the restore is complete, the data directory contains a marker file, and no
server uses the directory. After an interruption, a further call with the same arguments continues the restore. It skips
the blobs whose files already have their final names.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from storage.backups import BackupFailed, DatabaseSnapshot, SnapshotBlob, Snapshots
from storage.data_dir import durable_files
from storage.data_dir.layout import Layout
from storage.data_dir.locks import try_flock
from storage.data_dir.system import System
from storage.future_times import is_future
from storage.jobs import JSON
from storage.names import Digest
from storage.upkeep.backup.backup import BATCH_SIZE, hash_file
from storage.upkeep.backup.backup_directory import BackupDirectory, SnapshotManifest, by_age, with_backup_errors
from storage.upkeep.backup.earlier_backups import find_foreign_snapshots, foreign_warning
from storage.upkeep.backup.file_copies import BlobDamaged, BlobForbidden, FileCopier, run_together
from storage.upkeep.reporter import Reporter

DAMAGED_IN_BACKUP: Final = "it was missing or damaged in the backup"
"""If the backup lacks the correct bytes of a blob, the restored registry records the blob as damaged, with this
reason."""


@dataclass(frozen=True, slots=True)
class RestoreOptions:
    """The options of a restore.

    - `backups`: the directory of backups.
    - `snapshot`: the name of the snapshot to restore; None: the newest snapshot.
    - `may_link`: whether files of the data directory may be hard links to files of the backup.
    - `skip_damaged`: whether the restore succeeds even if blobs of the backup are missing or damaged. The restored
      registry then records these blobs as damaged."""

    backups: Path
    snapshot: str | None = None
    may_link: bool = False
    skip_damaged: bool = False


@dataclass(slots=True)
class _HandledBlobs:
    """The blobs that a restore has handled.

    - `restored_count`: number of blobs that this run has restored.
    - `present_count`: number of blobs that earlier, interrupted runs have restored.
    - `healed`: the restored blobs that the snapshot's database records as damaged, including those of earlier runs.
    - `damaged`: the blobs that are missing or damaged in the backup. Leaves out blobs that the snapshot's database
      already records as damaged.
    - `forbidden`: the blobs whose files in the backup this process has no permission to open."""

    restored_count: int = 0
    present_count: int = 0
    healed: list[Digest] = field(default_factory=list)
    damaged: list[Digest] = field(default_factory=list)
    forbidden: list[Digest] = field(default_factory=list)


async def restore_backup(
    snapshots: Snapshots,
    layout: Layout,
    options: RestoreOptions,
    reporter: Reporter,
    *,
    clock: Callable[[], float] = time.time,
    system: System | None = None,
) -> JSON:
    """Restores a snapshot into the data directory of `layout`, and returns a report as JSON. The data directory must be
    missing, empty, or left by an interrupted restore of the same snapshot. Afterwards, the caller must call
    `storage.composition.prepare_data_dir`. `clock` returns seconds since 1970.

    If `options.snapshot` is None, chooses the newest snapshot, and reports a step `warning` in two cases:

    - Some snapshots have times in the future. The chosen snapshot may then not be the newest.
    - Some snapshots are of another registry.

    Raises BackupFailed if the restore fails, and in two further cases:

    - Blobs are missing or damaged in the backup, and `options.skip_damaged` is False.
    - This process has no permission to open the file of a blob.

    After an error or a cancellation, the restored blobs stay in the data directory, and a further call restores the
    remaining blobs."""
    system = system or System()
    backups = BackupDirectory(options.backups, system)
    copier = FileCopier(system, layout.root, may_link=options.may_link, verify=True)
    with ExitStack() as stack:
        stack.callback(copier.close)
        await copier.run(backups.check)
        stack.enter_context(backups.locked("", shared=True))
        stored_snapshots = by_age(await copier.run(backups.snapshots), now := clock())
        snapshot = choose_snapshot(stored_snapshots, options.snapshot, backups.root)
        if options.snapshot is None and (warning := _clock_warning(stored_snapshots, snapshot, now)):
            reporter.step("warning", reason=warning)
        if options.snapshot is None:
            foreign = await copier.run(
                partial(find_foreign_snapshots, snapshots, backups, snapshot.name, stored_snapshots)
            )
            if foreign:
                # "that of this backup" ends the words "of another registry than", and means the registry of `snapshot`.
                reason = f"restoring {snapshot.name}; {foreign_warning(backups, foreign, 'that of this backup')}"
                reporter.step("warning", reason=reason)
        stack.enter_context(_locked_data_dir(layout, snapshot.name, system))
        restore = _Restore(snapshots, backups, snapshot, layout, copier, system, reporter)
        await restore.restore_database()
        handled = await restore.restore_blobs()
        if handled.forbidden:
            raise BackupFailed(
                f"this process has no permission to open the files of {len(handled.forbidden)} blobs of this backup, "
                f"among them {handled.forbidden[0]}; give the user with uid {os.geteuid()} access to the files, and "
                "run the same command again"
            )
        if handled.damaged and not options.skip_damaged:
            raise BackupFailed(
                f"{len(handled.damaged)} blobs of this backup are missing or damaged, among them {handled.damaged[0]}; "
                "restore another snapshot, or run the command again with --skip-damaged to restore the other blobs"
            )
        await copier.run(restore.complete)
        return {
            "snapshot": snapshot.name,
            "data": str(layout.root),
            "blobs": snapshot.totals.blobs,
            "size": snapshot.totals.size,
            "manifests": snapshot.totals.manifests,
            "tags": snapshot.totals.tags,
            "restored_blobs": handled.restored_count,
            "present_blobs": handled.present_count,
            "healed_blobs": len(handled.healed),
            "damaged": list(handled.damaged),
        }


def choose_snapshot(snapshots: list[SnapshotManifest], name: str | None, root: Path) -> SnapshotManifest:
    """Returns the snapshot with the name `name`; the newest snapshot if `name` is None. `snapshots`: all snapshots, the
    oldest first. `root`: the directory of backups. Raises BackupFailed if there is no such snapshot."""
    if not snapshots:
        raise BackupFailed(f"{root} has no complete snapshot; run `entrepot backup {root}` to its end")
    for snapshot in snapshots:
        if snapshot.name == name:
            return snapshot
    if name is not None:
        names = ", ".join(snapshot.name for snapshot in snapshots[-10:])
        raise BackupFailed(f"{root} has no snapshot {name}; it has {names}")
    return snapshots[-1]


def _clock_warning(snapshots: list[SnapshotManifest], chosen: SnapshotManifest, now: float) -> str:
    """If some snapshots have times in the future, returns a warning for operators: `chosen` may not be the newest
    snapshot. Otherwise returns an empty text."""
    from_future = [snapshot.name for snapshot in snapshots if is_future(snapshot.time, now)]
    if not from_future:
        return ""
    return (
        f"the times of {len(from_future)} of {len(snapshots)} backups are in the future, up to {from_future[-1]}: "
        f"the clock was wrong during these backups, or is wrong now; restoring {chosen.name}; "
        "to restore another one, name it with --snapshot"
    )


@contextmanager
def _locked_data_dir(layout: Layout, snapshot: str, system: System) -> Iterator[None]:
    """Context manager that holds a lock on the marker file of the data directory. First creates the directory and the
    marker file if they are missing. Raises BackupFailed if a restore into the directory is not possible."""
    with ExitStack() as stack:
        fd = with_backup_errors(f"cannot restore into {layout.root}", lambda: _open_marker(layout, system))
        stack.callback(os.close, fd)
        if not try_flock(fd):
            raise BackupFailed(f"another process is restoring into {layout.root}; wait until it has ended")
        marker: Any = {}
        with suppress(ValueError):
            marker = json.loads(os.pread(fd, 4096, 0) or b"{}")
        if (other_snapshot := marker.get("snapshot", snapshot)) != snapshot:
            raise BackupFailed(
                f"a restore of the snapshot {other_snapshot} has not ended in {layout.root}; to continue it, use "
                f"--snapshot {other_snapshot}; to restore another snapshot, first delete the directory"
            )

        def prepare() -> None:
            system.write(fd, [json.dumps({"snapshot": snapshot}).encode()], 0)
            system.sync(fd)
            # The marker must be durable before the directory has files that a server uses.
            durable_files.sync_directory(system, layout.root)
            durable_files.make_directories(system, layout.root, layout.directories())
            durable_files.sync_directory(system, layout.root)

        with_backup_errors(f"cannot restore into {layout.root}", prepare)
        yield


def _open_marker(layout: Layout, system: System) -> int:
    """Creates the data directory and its marker file if they are missing, and opens the marker file. Raises
    BackupFailed if the directory is not empty and has no marker file. Raises OSError."""
    durable_files.make_directory_and_parents(system, layout.root)
    names = set(os.listdir(layout.root)) - {"lost+found"}
    if names and layout.restore_marker.name not in names:
        raise BackupFailed(f"{layout.root} is not empty; name a new directory with --data")
    return system.open(layout.restore_marker, os.O_RDWR | os.O_CREAT, 0o600)


class _Restore:
    """One run of a restore."""

    def __init__(
        self,
        snapshots: Snapshots,
        backups: BackupDirectory,
        snapshot: SnapshotManifest,
        layout: Layout,
        copier: FileCopier,
        system: System,
        reporter: Reporter,
    ) -> None:
        self._snapshots = snapshots
        self._backups = backups
        self._snapshot = snapshot
        self._layout = layout
        self._copier = copier
        self._system = system
        self._reporter = reporter
        self._done_bytes = 0
        self._handled = _HandledBlobs()
        self._new_database = layout.root / "restored.db"

    async def restore_database(self) -> None:
        """Copies the database to a temporary file in the data directory, and checks the copy. `complete` renames the
        file. Raises BackupFailed."""
        source = self._backups.database(self._snapshot.name)
        await self._reporter.report(message="copying the database")

        def copy() -> None:
            shutil.copyfile(source, self._new_database)
            os.chmod(self._new_database, 0o660)
            durable_files.sync_file(self._system, self._new_database)

        await self._copier.run(copy)
        if (await self._copier.run(lambda: hash_file(self._new_database)))[0] != self._snapshot.database_sha256:
            raise BackupFailed(
                f"{source} is damaged: its SHA-256 is not the one in the snapshot's manifest.json; restore another "
                "snapshot with --snapshot"
            )
        with self._snapshots.open(self._new_database) as database:
            if database.is_too_new:
                raise BackupFailed("a newer Entrepot made this backup; restore it with the `entrepot` of that version")

    async def restore_blobs(self) -> _HandledBlobs:
        """Restores the blobs and checks their digests."""
        await self._reporter.report(0, total=self._snapshot.totals.size, unit="bytes", message="restoring blobs")
        with self._snapshots.open(self._new_database) as database:
            await self._restore_blobs_of(database)
        return self._handled

    async def _restore_blobs_of(self, database: DatabaseSnapshot) -> None:
        after = ""
        while batch := await self._copier.run(partial(database.blobs, after, BATCH_SIZE)):
            after = batch[-1].digest
            await run_together(self._restore_blob(blob) for blob in batch)
            await self._reporter.report(self._done_bytes)

    async def _restore_blob(self, blob: SnapshotBlob) -> None:
        final = self._layout.blob(blob.digest)
        if final.is_file() and final.stat().st_size == blob.size:  # the digest was checked before the rename to `final`
            self._handled.present_count += 1
            self._note_bytes(blob.size)
            self._note_healed(blob)
            return
        try:
            async with self._copier.in_thread(self._copier.open_file(self._backups.blob(blob.digest))) as fd:
                # Garbage collection deletes this file if an interrupted restore leaves it in the trash.
                temporary = self._layout.trash / f"{blob.digest.encoded}.restored"
                await self._copier.copy_file(fd, blob.digest, blob.size, temporary, final, self._note_bytes)
        except BlobDamaged as error:
            is_forbidden = isinstance(error, BlobForbidden)
            if is_forbidden or blob.place:  # `place` is empty if the database already records the damage
                (self._handled.forbidden if is_forbidden else self._handled.damaged).append(blob.digest)
                self._reporter.step("damaged", digest=blob.digest, size=blob.size, reason=str(error))
        else:
            self._handled.restored_count += 1
            self._note_healed(blob)
            self._reporter.step("blob", digest=blob.digest, size=blob.size)
        await self._reporter.report(self._done_bytes)

    def _note_bytes(self, count: int) -> None:
        self._done_bytes += count

    def _note_healed(self, blob: SnapshotBlob) -> None:
        """Counts a restored blob as healed if the snapshot's database records the blob as damaged."""
        if not blob.place:  # empty for a damaged blob
            self._handled.healed.append(blob.digest)

    def complete(self) -> None:
        """Makes the data directory usable for a server: records the damaged and healed blobs, renames the database, and
        deletes the marker file. Blocks the thread."""
        for shard in self._layout.shards():
            durable_files.sync_directory(self._system, shard)
        if self._handled.damaged:
            self._snapshots.mark_damaged(self._new_database, self._handled.damaged, DAMAGED_IN_BACKUP)
        if self._handled.healed:
            places = {digest: self._layout.blob_place(digest) for digest in self._handled.healed}
            self._snapshots.mark_healed(self._new_database, places)
        self._snapshots.mark_restored(self._new_database, self._snapshot.time)
        for suffix in ("-wal", "-shm"):
            with suppress(FileNotFoundError):
                self._system.unlink(Path(f"{self._layout.metadata}{suffix}"))
        self._system.rename(self._new_database, self._layout.metadata)
        durable_files.sync_directory(self._system, self._layout.root)
        self._system.unlink(self._layout.restore_marker)
        durable_files.sync_directory(self._system, self._layout.root)
