"""Restores a registry from a backup into an empty data directory (`restore_backup`). A *snapshot* is the copy of a
registry that one backup has added to the directory of backups.

The snapshot's database can record a blob as damaged although the directory of backups has its right bytes: an earlier
backup copied them, or an operator put them there. The restore *heals* such a blob: the restored registry has its bytes
and does not record it as damaged.

The bytes of each blob are compared with its digest before the blob gets its name in the data directory. The database
gets its name last. Until the restore is complete, the data directory contains a marker file, so that no server uses the
directory. After an interruption, the same call continues the restore: it skips the blobs that already have their names.
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
"""The reason of the damage that the restored registry records for the blobs that it lacks."""


@dataclass(frozen=True, slots=True)
class RestoreOptions:
    """The options of a restore. `backups`: the directory of backups. `snapshot`: the name of the snapshot (None: the
    newest). `may_link`: whether files of the data directory may be hard links to files of the backup. `skip_damaged`:
    whether the restore succeeds even if blobs of the backup are missing or damaged. The restored registry then records
    these blobs as damaged."""

    backups: Path
    snapshot: str | None = None
    may_link: bool = False
    skip_damaged: bool = False


@dataclass(slots=True)
class _RestoreCounts:
    """The blobs that a restore has handled.

    - `restored`: number of blobs that this run has restored.
    - `present`: number of blobs that earlier, interrupted runs have restored.
    - `healed`: the blobs that this or an earlier run has restored, and that the snapshot's database records as damaged.
    - `damaged`: the blobs that are missing or damaged in the backup, without those that the snapshot's database already
      records as damaged.
    - `forbidden`: the blobs whose file in the backup this process has no permission to open."""

    restored: int = 0
    present: int = 0
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
    """Restores a snapshot into the data directory of `layout`, which must be missing or empty, and returns a report as
    JSON. Afterwards, the caller must call `storage.composition.prepare_data_dir`. `clock` returns seconds since 1970.
    If `options` name no snapshot, this function chooses the newest one, and reports a step `warning` in two cases:

    - The times of some snapshots are in the future, so that the chosen snapshot may not be the newest.
    - Some snapshots are of another registry.

    Raises BackupFailed if the restore fails. A restore also fails if blobs are missing or damaged and `skip_damaged` is
    False, or if this process has no permission to open the file of a blob. After an error or a cancellation, the
    restored blobs stay in the directory, and a further call restores the remaining ones."""
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
                reason = f"restoring {snapshot.name}; {foreign_warning(backups, foreign, 'that of this backup')}"
                reporter.step("warning", reason=reason)
        stack.enter_context(_locked_data_dir(layout, snapshot.name, system))
        restore = _Restore(snapshots, backups, snapshot, layout, copier, system, reporter)
        await restore.restore_database()
        counts = await restore.restore_blobs()
        if counts.forbidden:
            raise BackupFailed(
                f"this backup has the files of {len(counts.forbidden)} blobs that this process may not open, among "
                f"them {counts.forbidden[0]}; give the user with uid {os.geteuid()} access to them, and run the same "
                "command again"
            )
        if counts.damaged and not options.skip_damaged:
            raise BackupFailed(
                f"{len(counts.damaged)} blobs of this backup are missing or damaged, among them {counts.damaged[0]}; "
                "restore another snapshot, or run the command again with --skip-damaged to do without them"
            )
        await copier.run(restore.complete)
        return {
            "snapshot": snapshot.name,
            "data": str(layout.root),
            "blobs": snapshot.totals.blobs,
            "size": snapshot.totals.size,
            "manifests": snapshot.totals.manifests,
            "tags": snapshot.totals.tags,
            "restored_blobs": counts.restored,
            "present_blobs": counts.present,
            "healed_blobs": len(counts.healed),
            "damaged": list(counts.damaged),
        }


def choose_snapshot(snapshots: list[SnapshotManifest], name: str | None, root: Path) -> SnapshotManifest:
    """Returns the snapshot with this name, or the newest snapshot if `name` is None. `snapshots`: oldest first. `root`:
    the directory of backups. Raises BackupFailed if there is no such snapshot; the text lists the ten newest names."""
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
    """Returns a sentence for operators if the times of some snapshots are in the future, so that `chosen` may not be
    the newest one; otherwise an empty text."""
    from_future = [snapshot.name for snapshot in snapshots if is_future(snapshot.time, now)]
    if not from_future:
        return ""
    return (
        f"the times of {len(from_future)} of {len(snapshots)} backups are in the future, up to {from_future[-1]}: "
        f"the clock was wrong then or is wrong now; restoring {chosen.name}; "
        "to restore another one, name it with --snapshot"
    )


@contextmanager
def _locked_data_dir(layout: Layout, snapshot: str, system: System) -> Iterator[None]:
    """Context manager that checks that a restore into the data directory is possible, creates the directory with the
    marker file, and holds a lock on the marker file. Raises BackupFailed."""
    with ExitStack() as stack:
        fd = with_backup_errors(f"cannot restore into {layout.root}", lambda: _open_marker(layout, system))
        stack.callback(os.close, fd)
        if not try_flock(fd):
            raise BackupFailed(f"another process is restoring into {layout.root}; wait until it has ended")
        written: Any = {}
        with suppress(ValueError):
            written = json.loads(os.pread(fd, 4096, 0) or b"{}")
        if (other_snapshot := written.get("snapshot", snapshot)) != snapshot:
            raise BackupFailed(
                f"a restore of the snapshot {other_snapshot} has not ended in {layout.root}; go on with it by "
                f"--snapshot {other_snapshot}, or delete the directory"
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
    durable_files.make_root(system, layout.root)
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
        self._counts = _RestoreCounts()
        self._new_database = layout.root / "restored.db"

    async def restore_database(self) -> None:
        """Copies the database and checks the copy. The copy has a temporary name, which `complete` replaces by the name
        that a server uses. Raises BackupFailed."""
        source = self._backups.database(self._snapshot.name)
        await self._reporter.report(message="copying the database")

        def copy() -> None:
            shutil.copyfile(source, self._new_database)
            os.chmod(self._new_database, 0o660)
            durable_files.sync_file(self._system, self._new_database)

        await self._copier.run(copy)
        if (await self._copier.run(lambda: hash_file(self._new_database)))[0] != self._snapshot.database_sha256:
            raise BackupFailed(
                f"{source} is damaged: it does not have the SHA-256 that its manifest.json says; restore another "
                "snapshot with --snapshot"
            )
        with self._snapshots.open(self._new_database) as database:
            if database.is_too_new:
                raise BackupFailed("a newer Entrepot made this backup; restore it with the `entrepot` of that version")

    async def restore_blobs(self) -> _RestoreCounts:
        """Restores the blobs and checks them. Returns their counts."""
        await self._reporter.report(0, total=self._snapshot.totals.size, unit="bytes", message="restoring blobs")
        with self._snapshots.open(self._new_database) as database:
            await self._restore_blobs_of(database)
        return self._counts

    async def _restore_blobs_of(self, database: DatabaseSnapshot) -> None:
        after = ""
        while batch := await self._copier.run(partial(database.blobs, after, BATCH_SIZE)):
            after = batch[-1].digest
            await run_together(self._restore_blob(blob) for blob in batch)
            await self._reporter.report(self._done_bytes)

    async def _restore_blob(self, blob: SnapshotBlob) -> None:
        final = self._layout.blob(blob.digest)
        if final.is_file() and final.stat().st_size == blob.size:  # its bytes were checked before it got this name
            self._counts.present += 1
            self._note_bytes(blob.size)
            self._note_healed(blob)
            return
        try:
            async with self._copier.in_thread(self._copier.opened(self._backups.blob(blob.digest))) as fd:
                # If an interrupted restore leaves this file in the trash, garbage collection deletes it.
                temporary = self._layout.trash / f"{blob.digest.encoded}.restored"
                await self._copier.copy_file(fd, blob.digest, blob.size, temporary, final, self._note_bytes)
        except BlobDamaged as error:
            is_forbidden = isinstance(error, BlobForbidden)
            if is_forbidden or blob.place:  # otherwise the database already records the blob as damaged
                (self._counts.forbidden if is_forbidden else self._counts.damaged).append(blob.digest)
                self._reporter.step("damaged", digest=blob.digest, size=blob.size, reason=str(error))
        else:
            self._counts.restored += 1
            self._note_healed(blob)
            self._reporter.step("blob", digest=blob.digest, size=blob.size)
        await self._reporter.report(self._done_bytes)

    def _note_bytes(self, count: int) -> None:
        self._done_bytes += count

    def _note_healed(self, blob: SnapshotBlob) -> None:
        """Counts a restored blob as healed if the snapshot's database records it as damaged: its `place` is empty."""
        if not blob.place:
            self._counts.healed.append(blob.digest)

    def complete(self) -> None:
        """Completes the data directory, so that a server can use it. Blocks."""
        for shard in self._layout.shards():
            durable_files.sync_directory(self._system, shard)
        if self._counts.damaged:
            self._snapshots.mark_damaged(self._new_database, self._counts.damaged, DAMAGED_IN_BACKUP)
        if self._counts.healed:
            places = {digest: self._layout.blob_place(digest) for digest in self._counts.healed}
            self._snapshots.mark_healed(self._new_database, places)
        self._snapshots.mark_restored(self._new_database, self._snapshot.time)
        for suffix in ("-wal", "-shm"):
            with suppress(FileNotFoundError):
                self._system.unlink(Path(f"{self._layout.metadata}{suffix}"))
        self._system.rename(self._new_database, self._layout.metadata)
        durable_files.sync_directory(self._system, self._layout.root)
        self._system.unlink(self._layout.restore_marker)
        durable_files.sync_directory(self._system, self._layout.root)
