"""Makes a backup of a registry, also while servers use it (`make_backup`).

A backup adds a *snapshot*, the state of the registry at one moment, to the directory of backups. It first copies the
metadata database, and then the blobs that the copied database names. The other order could miss blobs that are pushed
in between. Until the backup has copied the blobs, the store removes no blob (module `storage.upkeep.removal_gate`).

A run copies only blobs that the directory does not have yet, for example from an interrupted run. At its end, it writes
the file `manifest.json`, which describes the snapshot and makes it complete. The next run removes incomplete snapshots.
Blobs that no snapshot needs stay until a run removes old snapshots and unneeded blobs (`BackupOptions.keep`).
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, aclosing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from storage.backups import DatabaseSnapshot, SnapshotBlob, Snapshots
from storage.blobs.blob_store import BlobStore, BytesMissing
from storage.data_dir.system import System
from storage.errors import StorageFailed
from storage.future_times import is_future
from storage.jobs import JSON
from storage.leases import Leases
from storage.names import ALGORITHMS, Digest
from storage.upkeep.backup.backup_directory import BackupDirectory, SnapshotManifest, by_age, with_backup_errors
from storage.upkeep.backup.earlier_backups import (
    EarlierBackup,
    check_mounted,
    find_foreign_snapshots,
    foreign_warning,
    mount_point,
)
from storage.upkeep.backup.file_copies import CHUNK_BYTES, BlobDamaged, FileCopier, run_together
from storage.upkeep.removal_gate import blob_removals_blocked
from storage.upkeep.reporter import Reporter

BATCH_SIZE: Final = 500
"""Number of blobs that are looked up at a time."""
_KEPT_FILE_NOTE: Final = "; the backup keeps its older file of the blob, which failed its check: {}"
"""Added to the reason why a blob could not be copied, if the directory has a file of the blob from an earlier run."""


@dataclass(frozen=True, slots=True)
class BackupOptions:
    """The options of a backup.

    - `target`: the directory of backups.
    - `keep`: how many snapshots of this registry to keep; None: all.
    - `verify`: whether to check the digests of all blobs. If False, the backup checks only some of them:
        - A blob whose bytes the backup copies is checked.
        - A blob that the directory has already is checked only if its file may have wrong bytes
          (`_Backup._copy_if_needed` lists the cases).
        - A blob for which the backup makes a hard link or a clone is checked only if the directory already has a file
          of the blob, and that file has failed its check. (A clone is a file that shares blocks on the disk with the
          file of the store.)
    - `may_link`: whether files of the backup may be hard links to files of the store, if both are on one file system.
    - `earlier`: the newest backup that was made to `target` (`find_earlier_backup`). If `target` has neither this
      backup nor a later one, `make_backup` checks that the disk of `target` is mounted. None: there is no check."""

    target: Path
    keep: int | None = None
    verify: bool = False
    may_link: bool = True
    earlier: EarlierBackup | None = None


@dataclass(slots=True)
class _BlobOutcomes:
    """Counts the blobs of a backup by outcome. Each blob is in one of four groups:

    - `present`: number of blobs that the directory had already. A file that failed its check does not count.
    - `damaged`: the blobs that the directory did not have, and that the registry had recorded as damaged.
    - `copied`: number of blobs that the backup copied. `copied_bytes`: number of copied bytes.
    - `not_copied`: the remaining blobs, which could not be copied."""

    copied: int = 0
    copied_bytes: int = 0
    present: int = 0
    damaged: list[Digest] = field(default_factory=list)
    not_copied: list[Digest] = field(default_factory=list)


async def make_backup(
    snapshots: Snapshots,
    blobs: BlobStore,
    leases: Leases,
    options: BackupOptions,
    reporter: Reporter,
    *,
    clock: Callable[[], float],
    holder: str,
    system: System | None = None,
) -> JSON:
    """Makes a backup and returns a report as JSON. `holder`: text that says who makes the backup, for the error of
    another process that tries to make a backup at the same time. Raises BackupFailed, StorageFull, StorageFailed,
    JobStopped. After an error, the copied blobs stay in the directory for the next run.

    The report has two lists of the blobs that the new snapshot lacks. (The field `missing` of `manifest.json` has the
    blobs of both lists.)

    - `damaged`: the blobs that the registry had recorded as damaged.
    - `missing`: other blobs that could not be copied, for example because their bytes are missing or damaged."""
    system = system or System()
    directory = BackupDirectory(options.target, system)
    copier = FileCopier(system, directory.root, may_link=options.may_link, verify=options.verify)
    async with AsyncExitStack() as stack:
        stack.callback(copier.close)
        known_backup = options.earlier
        if known_backup is not None and not await copier.run(
            partial(directory.has_snapshot_since, known_backup.snapshot)
        ):
            # Check that the disk of the backups is mounted, even if `directory.root` has snapshots that are older than
            # `known_backup`. Without the mount, the path `directory.root` leads to another disk, the one with the
            # mount point. That disk may have older snapshots at this path too.
            await copier.run(partial(check_mounted, directory.root, known_backup))
            if not await copier.run(directory.has_marker):
                reason = f"the earlier backups are gone from {directory.root}; this backup is the first one there now"
                reporter.step("warning", reason=reason)
        await copier.run(directory.create)
        mounted_at = await copier.run(partial(mount_point, directory.root))
        await stack.enter_async_context(copier.in_thread(directory.locked(holder)))
        await copier.run(directory.remove_unfinished)
        backup = _Backup(snapshots, blobs, directory, copier, options, reporter)
        async with AsyncExitStack() as removal_block:
            await reporter.report(message="waiting until no blob is being removed")
            await removal_block.enter_async_context(blob_removals_blocked(leases))
            name = await copier.run(lambda: directory.add_snapshot(clock()))
            manifest = await backup.copy(name, clock())
        await copier.run(lambda: directory.complete_snapshot(manifest))
        prune_report = await backup.prune(options.keep, manifest) if options.keep is not None else {}
        outcomes = backup.outcomes
        return {
            "target": str(directory.root),
            "mount_point": str(mounted_at),
            "snapshot": name,
            "blobs": manifest.totals.blobs,
            "size": manifest.totals.size,
            "manifests": manifest.totals.manifests,
            "tags": manifest.totals.tags,
            "copied_blobs": outcomes.copied,
            "new_bytes": outcomes.copied_bytes,
            "present_blobs": outcomes.present,
            "damaged": list(outcomes.damaged),
            "missing": list(outcomes.not_copied),
            **prune_report,
        }


class _Backup:
    """One run of a backup."""

    def __init__(
        self,
        snapshots: Snapshots,
        blobs: BlobStore,
        directory: BackupDirectory,
        copier: FileCopier,
        options: BackupOptions,
        reporter: Reporter,
    ) -> None:
        self._snapshots = snapshots
        self._blobs = blobs
        self._directory = directory
        self._copier = copier
        self._verify = options.verify
        self._reporter = reporter
        self._last_backup_time = 0.0
        """Time of the newest complete snapshot of this registry, in seconds since 1970; 0 if there is none."""
        self._foreign_snapshots: list[SnapshotManifest] = []
        """The snapshots of other registries in the directory."""
        self._missing_before: frozenset[Digest] = frozenset()
        """Blobs that at least one earlier snapshot lacks (`SnapshotManifest.missing`). The directory may have files of
        these blobs with wrong bytes."""
        self._done_bytes = 0
        self.outcomes = _BlobOutcomes()

    async def copy(self, name: str, now: float) -> SnapshotManifest:
        """Copies the database and the blobs that the copy names. Returns the content of `manifest.json`. `name`,
        `now`: the name and the time of the snapshot. The time is in seconds since 1970."""
        earlier_snapshots = by_age(await self._copier.run(self._directory.snapshots), now)
        self._missing_before = frozenset(digest for snapshot in earlier_snapshots for digest in snapshot.missing)
        path = self._directory.database(name)
        await self._reporter.report(0, unit="pages", message="copying the database")
        await self._copy_database(path)
        with self._snapshots.open(path) as snapshot:
            find = partial(find_foreign_snapshots, self._snapshots, self._directory, name, earlier_snapshots)
            self._foreign_snapshots = await self._copier.run(find)
            if self._foreign_snapshots:
                reason = foreign_warning(self._directory, self._foreign_snapshots, "this one")
                self._reporter.step("warning", reason=reason)
            times = [earlier.time for earlier in earlier_snapshots if earlier not in self._foreign_snapshots]
            self._last_backup_time = max((time for time in times if not is_future(time, now)), default=0.0)
            totals = await self._copier.run(snapshot.totals)
            await self._reporter.report(0, total=totals.size, unit="bytes", message="copying blobs")
            await self._copy_blobs(snapshot)
            sha256, size = await self._copier.run(lambda: hash_file(path))
            version = snapshot.table_version
        missing = tuple(sorted([*self.outcomes.damaged, *self.outcomes.not_copied]))
        return SnapshotManifest(name, now, sha256, size, version, totals, missing)

    async def _copy_database(self, path: Path) -> None:
        """Copies the database and reports the progress twice a second. Raises JobStopped, from `report`, soon after the
        job is stopped."""
        pages = [0, 0]  # the number of copied pages, and of all pages

        def note_pages(done: int, total: int) -> None:
            pages[:] = done, total

        copying = asyncio.create_task(self._snapshots.write(path, note_pages))
        try:
            while not (await asyncio.wait([copying], timeout=0.5))[0]:
                await self._reporter.report(pages[0], total=pages[1])
            copying.result()
        finally:
            copying.cancel()
            await asyncio.gather(copying, return_exceptions=True)
        self._reporter.step("database", pages=pages[1])

    async def _copy_blobs(self, snapshot: DatabaseSnapshot) -> None:
        after = ""
        while batch := await self._copier.run(partial(snapshot.blobs, after, BATCH_SIZE)):
            after = batch[-1].digest
            present = await self._copier.run(partial(self._find_present, batch))
            await run_together(self._copy_if_needed(blob, blob.digest in present) for blob in batch)
            await self._reporter.report(self._done_bytes)

    def _find_present(self, batch: list[SnapshotBlob]) -> set[Digest]:
        """Returns the digests of the blobs in `batch` that the directory has with the right size."""
        present_digests = set()
        for blob in batch:
            try:
                status = self._directory.blob(blob.digest).stat()
            except FileNotFoundError:
                continue
            if stat.S_ISREG(status.st_mode) and status.st_size == blob.size:
                present_digests.add(blob.digest)
        return present_digests

    async def _copy_if_needed(self, blob: SnapshotBlob, is_present: bool) -> None:
        """Copies a blob, unless the directory has a file of the blob with the right bytes. `is_present`: whether the
        directory has a file of the right size. An empty `blob.place` means that the registry has recorded the blob as
        damaged.

        The file may have wrong bytes, because it may be a hard link to a damaged file of the registry. So even if
        `verify` is False, this method compares the file with the digest in three cases:

        - The registry has recorded the blob as damaged.
        - The registry has stored the blob since the last backup, perhaps in place of damaged bytes.
        - An earlier snapshot lacks the blob.

        A file that fails the check stays until a copy from the registry replaces it. It may be the last right copy of
        the blob, because one failed read does not prove damage."""
        failed_check = ""
        if is_present and (
            self._verify
            or not blob.place
            or blob.created >= self._last_backup_time
            or blob.digest in self._missing_before
        ):
            path = self._directory.blob(blob.digest)
            try:
                await self._copier.check_file(path, blob.digest, blob.size, self._note_bytes)
            except BlobDamaged as error:
                failed_check = str(error)
                is_present = False
        elif is_present:
            self._note_bytes(blob.size)
        if is_present:
            self.outcomes.present += 1
            return
        if not blob.place:
            self.outcomes.damaged.append(blob.digest)
            reason = "the registry knows that it is damaged"
            if failed_check:
                reason += _KEPT_FILE_NOTE.format(failed_check)
            self._reporter.step("damaged", digest=blob.digest, reason=reason)
            self._note_bytes(blob.size)
            return
        try:
            await self._copy_blob(blob, verify=bool(failed_check))
        except (BlobDamaged, BytesMissing, StorageFailed) as error:
            reason = "its file is missing" if isinstance(error, BytesMissing) else str(error)
            if failed_check:
                reason += _KEPT_FILE_NOTE.format(failed_check)
            self.outcomes.not_copied.append(blob.digest)
            self._reporter.step("missing", digest=blob.digest, reason=reason)
        else:
            self.outcomes.copied += 1
            self.outcomes.copied_bytes = self._copier.copied_bytes
            if failed_check:
                self._reporter.step("damaged in the backup", digest=blob.digest, reason=failed_check)
            self._reporter.step("blob", digest=blob.digest, size=blob.size)
        await self._reporter.report(self._done_bytes)

    async def _copy_blob(self, blob: SnapshotBlob, *, verify: bool) -> None:
        """Copies one blob. `verify`: whether to check the bytes even if the copy is a hard link or a clone. Raises
        BlobDamaged, BytesMissing, StorageFailed, BackupFailed."""
        temporary = self._directory.incoming / blob.digest.encoded
        final = self._directory.blob(blob.digest)
        reader = await self._blobs.open(blob.digest, blob.size, blob.place, None)
        async with aclosing(reader):
            if reader.file is not None and reader.file.offset == 0:
                fd = reader.file.fd
                await self._copier.copy_file(
                    *(fd, blob.digest, blob.size, temporary, final, self._note_bytes), verify=verify
                )
            elif reader.data is not None:
                await self._copier.write_bytes(reader.data, blob.digest, temporary, final)
                self._note_bytes(blob.size)
            else:
                await self._copier.write_chunks(reader, blob.digest, temporary, final, self._note_bytes)

    def _note_bytes(self, count: int) -> None:
        self._done_bytes += count

    async def prune(self, keep: int, newest: SnapshotManifest) -> dict[str, JSON]:
        """Removes the oldest snapshots of this registry until `keep` of them are left. The snapshots of other
        registries stay. Then removes the blobs that no remaining snapshot names. The snapshot of this run must be
        complete, and this run must hold the lock on the directory.

        `newest`: the snapshot of this run. It counts as the newest even if a wrong clock gave another snapshot a later
        time. Returns the part of the report that lists the removals."""
        stored = await self._copier.run(self._directory.snapshots)
        others = [
            snapshot for snapshot in stored if snapshot.name != newest.name and snapshot not in self._foreign_snapshots
        ]
        snapshots = [*by_age(others, newest.time), newest]
        unneeded = snapshots[: max(len(snapshots) - keep, 0)]
        for snapshot in unneeded:
            await self._copier.run(partial(self._directory.remove_snapshot, snapshot.name))
            self._reporter.step("snapshot removed", snapshot=snapshot.name)
        removed_blobs = 0
        await self._reporter.report(message="removing blobs that no backup needs")
        # The newest snapshot comes first, because it names most of the stored blobs: `_remove_unneeded` stops reading
        # snapshots when it has found all blobs of a shard.
        kept = [*reversed(snapshots[len(unneeded) :]), *self._foreign_snapshots]
        kept_paths = [self._directory.database(snapshot.name) for snapshot in kept]
        with ExitStack() as stack:
            databases = [stack.enter_context(self._snapshots.open(path)) for path in kept_paths]
            for algorithm, first_byte in _shards():
                removed_blobs += await self._copier.run(
                    partial(self._remove_unneeded, databases, algorithm, first_byte)
                )
                await self._reporter.report()
        return {"removed_snapshots": [snapshot.name for snapshot in unneeded], "removed_blobs": removed_blobs}

    def _remove_unneeded(self, databases: list[DatabaseSnapshot], algorithm: str, first_byte: str) -> int:
        """Removes the blobs of one shard that no database names. The shard contains the blobs whose digests have the
        algorithm `algorithm` and begin with `first_byte`. Returns the number of removed blobs."""
        names = set(os.listdir(self._directory.shard(algorithm, first_byte)))
        for database in databases:
            after = ""
            while names and (batch := database.blobs(after, BATCH_SIZE, f"{algorithm}:{first_byte}")):
                after = batch[-1].digest
                names.difference_update(blob.digest.encoded for blob in batch)
        self._directory.remove_blobs(algorithm, first_byte, names)
        return len(names)


def _shards() -> Iterator[tuple[str, str]]:
    """Yields the algorithm and the first byte (in hex) of the digests of each shard."""
    for algorithm in ALGORITHMS:
        for number in range(256):
            yield algorithm, f"{number:02x}"


def hash_file(path: Path) -> tuple[str, int]:
    """Returns the SHA-256 of a file, in hex, and its size in bytes. Blocks. Raises BackupFailed."""

    def read() -> tuple[str, int]:
        with open(path, "rb") as file:
            sha256 = hashlib.sha256()
            while data := file.read(CHUNK_BYTES):
                sha256.update(data)
            return sha256.hexdigest(), file.tell()

    return with_backup_errors(f"cannot read {path}", read)
