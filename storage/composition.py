"""The composition root of the store: builds a registry that keeps its metadata in SQLite and its blobs in files.

The server's parent process prepares the data directory (`prepare_data_dir`) and then forks the worker processes. Each
worker opens the registry in this directory (`open_registry`).

The *reserve* is a file that only occupies disk space. On a full disk, the store shrinks this file to free space for
changes that must not fail, such as deletions. A *partial blob* is a blob whose download from an upstream registry is
not complete.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    aclosing,
    asynccontextmanager,
    closing,
    suppress,
)
from functools import partial
from pathlib import Path

import apsw

from storage.accounts import Accounts
from storage.blobs.blob_store import BlobStore
from storage.blobs.files import leftovers
from storage.blobs.files.file_blob_store import FileBlobStore
from storage.blobs.files.file_partial_store import FilePartialStore
from storage.blobs.files.leftovers import free_disk_space
from storage.content import PartialSummary
from storage.data_dir import durable_files
from storage.data_dir.check import DataDirectoryError, describe_error, ensure_usable, read_only_reason
from storage.data_dir.digest_locks import FileDigestLocks
from storage.data_dir.disk import Disk
from storage.data_dir.file_leases import FileLeases
from storage.data_dir.layout import Layout
from storage.data_dir.locks import Flock
from storage.data_dir.reserve import MinFreeSpace, Reserve
from storage.data_dir.system import System, boot_id
from storage.errors import StorageFailed, StorageFull
from storage.inventory import Inventory
from storage.jobs import JSON
from storage.leases import DigestLocks
from storage.metadata.catalog import UNOBSERVED_COMMITS, CommitObserver, Metadata
from storage.metadata.sqlite import inventory, setup
from storage.metadata.sqlite.immutable_database import DISK_FULL_TEXT, ImmutableDatabase
from storage.metadata.sqlite.sqlite_database import SqliteDatabase
from storage.metadata.sqlite.upkeep.sqlite_snapshots import SqliteSnapshots
from storage.partials import Partials
from storage.store.publication import Publication
from storage.store.stored_registry import StorageHealth, StoredRegistry
from storage.tag_rules import NO_IMMUTABLE_TAGS, ImmutableTags
from storage.upkeep.backup.restore import RestoreOptions, restore_backup
from storage.upkeep.collector import Collector, OnRealRemoval, ignore_removal
from storage.upkeep.disk_space import DiskSpaceMonitor
from storage.upkeep.reporter import Reporter
from storage.upkeep.schedule import cancel_all, run_rounds

DAY_SECONDS = 86400.0
KEEP_UNUSED_TAGS_SECONDS = 365 * DAY_SECONDS
"""A mirrored tag is *unused* if it is not cached. The store deletes the history of an unused tag if the newest entry of
the history is older than this."""
log = logging.getLogger("storage")

OpenContent = Callable[[Disk, str, Metadata, DigestLocks], AbstractAsyncContextManager[tuple[BlobStore, Partials]]]
"""Type of a function that opens the blob store and the store of partial blobs. Its arguments: the disk, the id of the
machine's current boot (`boot_id`), the metadata store, and the locks of digests."""


def prepare_data_dir(data: Path, system: System | None = None) -> None:
    """Creates the data directory, or migrates an existing one to this version of the program. Leaves no file open, so
    the process may fork afterwards. Raises DataDirectoryError if a file cannot be created or read.

    On a full disk, frees space: shrinks the reserve, and deletes the trash (the files of deleted blobs) and the partial
    blobs that no process is downloading. If the disk is still full, does not change the database, and raises
    DataDirectoryError if the database is of another version or cannot be read."""
    layout = layout_of(data)
    system = system or System()
    ensure_usable(layout.root)
    try:
        durable_files.make_directories(system, layout.root, layout.directories())
        durable_files.make_files(system, layout.lock_files())
        lock = system.open(layout.metadata_lock, os.O_RDWR | os.O_CREAT)
        try:
            with Flock(lock):
                setup.prepare_database(layout, system, lambda: free_disk_space(layout, system, boot_id()))
                durable_files.sync_directory(system, layout.root)
        finally:
            os.close(lock)
    except OSError as error:
        path = error.filename or layout.root
        raise DataDirectoryError(f"cannot set up the data directory: {path}: {describe_error(error)}") from None
    except StorageFull:
        setup.check_readable_on_full_disk(layout)
    with closing(Reserve(layout.reserve, system)) as reserve:
        reserve.establish()


def layout_of(data: Path) -> Layout:
    """Returns the paths of the files in a data directory. The paths are absolute, because the process may change its
    working directory later."""
    return Layout(data.absolute())


def has_data(data: Path) -> bool:
    """Returns whether the directory contains the data of a registry."""
    return layout_of(data).metadata.exists()


def check_version(data: Path) -> None:
    """Checks, for a command that only reads, that the data directory is of this version. Raises DataDirectoryError if
    it contains no registry, if another version wrote it, or if its database cannot be read."""
    setup.check_database_version(layout_of(data), data)


def has_had_account(data: Path) -> bool:
    """Returns whether a prepared data directory ever had an account. Leaves no file open, so the process may fork
    afterwards. Raises StorageFailed."""
    return setup.has_had_account(layout_of(data))


def list_partials(data: Path) -> list[PartialSummary]:
    """Returns all partial blobs: those that a process is downloading, and those whose download was interrupted and can
    be continued. Changes nothing. Raises OSError."""
    return leftovers.list_partials(layout_of(data), boot_id())


def open_inventory(data: Path) -> AbstractContextManager[Inventory]:
    """Opens the inventory (statistics) of a data directory. Call `check_version` first. Raises StorageFailed if the
    database cannot be read, either when it is opened or inside the `with` block."""
    return inventory.open_inventory(layout_of(data).metadata)


def database_sizes(data: Path) -> tuple[int, int]:
    """Returns the sizes of the database file and of its write-ahead log, in bytes; 0 for a file that does not exist."""
    database = layout_of(data).metadata
    sizes = [0, 0]
    for index, file in enumerate((database, database.with_name(f"{database.name}-wal"))):
        with suppress(FileNotFoundError):
            sizes[index] = file.stat().st_size
    return sizes[0], sizes[1]


async def restore_data_dir(
    data: Path,
    options: RestoreOptions,
    reporter: Reporter,
    *,
    clock: Callable[[], float] = time.time,
    system: System | None = None,
) -> JSON:
    """Restores a backup into the data directory, which must be missing or empty. Then prepares the directory
    (`prepare_data_dir`). `clock` returns seconds since 1970. Returns the report of
    `storage.upkeep.backup.restore.restore_backup`. Raises BackupFailed, DataDirectoryError."""
    layout = layout_of(data)
    result = await restore_backup(
        SqliteSnapshots(layout.metadata, clock, system=system), layout, options, reporter, clock=clock, system=system
    )
    prepare_data_dir(data, system)
    return result


@asynccontextmanager
async def open_file_stores(
    disk: Disk, boot: str, metadata: Metadata, locks: DigestLocks
) -> AsyncIterator[tuple[BlobStore, Partials]]:
    """Opens the stores that keep blobs, uploads and partial blobs as files in the data directory."""
    with closing(FileBlobStore(disk, boot)) as blobs:
        publication = Publication(blobs, metadata, locks)
        # After the download of a partial blob, `commit_download` turns it into a stored blob.
        async with aclosing(FilePartialStore(disk, boot, publication.commit_download)) as partials:
            yield blobs, partials


@asynccontextmanager
async def open_registry(
    data: Path,
    *,
    grace: float = DAY_SECONDS,
    expire: float = 7 * DAY_SECONDS,
    collect_every: float | None = None,
    starts_rounds: bool = True,
    watch_disk_space: bool = False,
    may_open_read_only: bool = False,
    keep_audit: float = 365 * DAY_SECONDS,
    immutable_tags: ImmutableTags = NO_IMMUTABLE_TAGS,
    min_free: MinFreeSpace | None = None,
    clock: Callable[[], float] = time.time,
    system: System | None = None,
    boot: str | None = None,
    open_content: OpenContent = open_file_stores,
    commit_observer: CommitObserver = UNOBSERVED_COMMITS,
    on_real_removal: OnRealRemoval = ignore_removal,
) -> AsyncIterator[StoredRegistry]:
    """Opens the registry in a prepared data directory, for this process and its running event loop.

    - `grace`: seconds for which the garbage collector keeps deleted manifests, and blobs that no manifest refers to.
    - `expire`: seconds for which an upload session or partial blob is kept without progress.
    - `collect_every`: seconds between two *rounds*. In a round, one process runs the garbage collector, and deletes old
      lines of the audit log and the old history of mirrored tags. None: this process runs no rounds.
    - `starts_rounds`: True: the rounds start now. False: the caller runs `StoredRegistry.run_upkeep_rounds` later.
    - `watch_disk_space`: whether this process watches the disk. It then logs when the disk becomes full, and restores
      the full size of the reserve when there is space again.
    - `may_open_read_only`: what to do if the disk is too full to open the metadata for changes. True: opens the
      metadata read-only (`StoredRegistry.is_read_only`). False: raises StorageFull.
    - `keep_audit`: seconds for which lines of the audit log are kept.
    - `immutable_tags`: the rules about tags that clients cannot change.
    - `min_free`: free space that each push must leave on the disk. None: the registry refuses pushes only on a full
      disk.
    - `clock`: returns the time in seconds since 1970.
    - `boot`: the id of the machine's current boot; None: the real id (`boot_id`). Only tests pass an id.
    - `open_content`: opens the blob store and the store of partial blobs.
    - `commit_observer`: measures the changes of the metadata.
    - `on_real_removal`: called for each removal of the garbage collector, except in dry runs.

    Raises StorageFull, StorageFailed."""
    layout = layout_of(data)
    _check_writable(layout)
    system = system or System()
    boot = boot_id() if boot is None else boot
    async with AsyncExitStack() as stack:
        reserve = stack.enter_context(closing(Reserve(layout.reserve, system, min_free)))
        disk = stack.enter_context(closing(Disk(layout, system, reserve)))
        opening = _open_database_in_thread(disk, clock, commit_observer, may_open_read_only=may_open_read_only)
        database = stack.enter_context(closing(await opening))
        metadata = database.metadata
        # None: the database was opened for changes. Not None: it was opened read-only, because the disk is too full.
        read_only_database = database.immutable
        locks = FileDigestLocks(disk)
        blobs, partials = await stack.enter_async_context(open_content(disk, boot, metadata, locks))
        leases = stack.enter_context(closing(FileLeases(layout.lease_file, system)))

        def is_full() -> bool:
            return reserve.disk_full_reason() is not None

        if read_only_database is None:
            # `problem` returns why nothing can be stored now. `refusal` returns why a push of a given size must not be
            # stored: too little of the disk would stay free.
            health = StorageHealth(
                problem=reserve.disk_full_reason,
                refusal=reserve.low_disk_reason,
                free_bytes=reserve.free_bytes,
                directory_problem=disk.opened_directory.problem,
            )
        else:
            health = StorageHealth(
                problem=lambda: DISK_FULL_TEXT,
                retire=read_only_database.retire,  # ends all reads; called when a writable registry replaces this one
                directory_problem=disk.opened_directory.problem,
            )
        collector = Collector(
            *(metadata, blobs, partials, locks, clock, grace, expire, is_full),
            leases=leases,
            check_directory=disk.opened_directory.check,
            on_real_removal=on_real_removal,
        )

        async def do_upkeep() -> None:
            await collector.collect()
            await database.accounts.prune_audit(clock() - keep_audit)
            await database.upstream_tags.forget_unused(clock() - KEEP_UNUSED_TAGS_SECONDS)

        run_upkeep_rounds = None
        if collect_every is not None and read_only_database is None:
            run_upkeep_rounds = partial(run_rounds, do_upkeep, leases, collect_every, is_urgent=is_full)
        registry = StoredRegistry(
            metadata,
            blobs,
            clock,
            collector,
            health,
            partials=partials,
            records=database.records,
            locks=locks,
            leases=leases,
            accounts=database.accounts,
            jobs=database.jobs,
            upstream_tags=database.upstream_tags,
            tag_history=database.tag_history,
            tag_listing=database.tag_listing,
            tag_removals=database.tag_removals,
            immutable_tags=immutable_tags,
            usage=database.usage,
            cached_images=database.cached_images,
            pulls=database.pulls,
            retention=database.retention,
            consistency=database.consistency,
            damage=database.damage,
            snapshots=database.snapshots,
            imports=database.imports,
            descriptions=database.descriptions,
            activity=database.activity,
            outbox=database.outbox,
            search=database.search,
            search_index=database.search,
            run_upkeep_rounds=run_upkeep_rounds,
        )
        background_tasks: list[asyncio.Task[None]] = []
        stack.push_async_callback(cancel_all, background_tasks)
        if read_only_database is not None:
            log.warning("%s (data directory %s)", DISK_FULL_TEXT, layout.root)
        elif watch_disk_space:
            monitor = DiskSpaceMonitor(disk)
            await monitor.check()
            background_tasks.append(asyncio.create_task(monitor.run()))
        if registry.run_upkeep_rounds is not None and starts_rounds:
            background_tasks.append(asyncio.create_task(registry.run_upkeep_rounds()))
        yield registry


@asynccontextmanager
async def open_accounts(
    data: Path, *, clock: Callable[[], float] = time.time, system: System | None = None
) -> AsyncIterator[Accounts]:
    """Opens only the store of accounts and rights in a prepared data directory, for a command. A server may use the
    directory at the same time. It sees each change as soon as the change is committed.
    Raises StorageFull, StorageFailed."""
    layout = layout_of(data)
    _check_writable(layout)
    system = system or System()
    with (
        closing(Reserve(layout.reserve, system)) as reserve,
        closing(Disk(layout, system, reserve)) as disk,
        closing(_open_database(disk, clock)) as database,
    ):
        yield database.accounts


def _check_writable(layout: Layout) -> None:
    """Raises StorageFailed if the file system of the data directory is mounted read-only. Every process opens the
    database and the lock files for writing, even if the process only reads."""
    if (reason := read_only_reason(layout.root)) is not None:
        raise StorageFailed(reason)


async def _open_database_in_thread(
    disk: Disk, clock: Callable[[], float], commit_observer: CommitObserver, *, may_open_read_only: bool
) -> SqliteDatabase:
    """Opens the database like `_open_database`, without blocking the event loop. Opening takes about 10 ms. If another
    program has locked the database, opening takes up to `BUSY_TIMEOUT_MILLISECONDS`. If cancelled, waits until the
    thread has ended, and closes the database."""
    call = partial(_open_database, disk, clock, commit_observer, may_open_read_only=may_open_read_only)
    opening = asyncio.create_task(asyncio.to_thread(call))
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        await asyncio.wait([opening])
        if opening.exception() is None:
            opening.result().close()
        raise


def _open_database(
    disk: Disk,
    clock: Callable[[], float],
    commit_observer: CommitObserver = UNOBSERVED_COMMITS,
    *,
    may_open_read_only: bool = False,
) -> SqliteDatabase:
    """Opens the database for changes. If the disk is too full for this, opens the database read-only if
    `may_open_read_only` is True, and otherwise raises StorageFull."""
    arguments = disk.layout, disk.system, clock, disk.reserve
    try:
        return SqliteDatabase(*arguments, observer=commit_observer, directory=disk.opened_directory)
    except apsw.FullError:
        if may_open_read_only:
            return SqliteDatabase(*arguments, immutable=ImmutableDatabase(disk.layout))
        raise StorageFull(DISK_FULL_TEXT) from None
