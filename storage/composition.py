"""The composition root: chooses SQLite for metadata and files for blobs, and opens a registry over them.

A data directory is prepared once (`prepare_data_dir`), then opened by each process for itself (`open_registry`).
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
)
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
from storage.data_dir.check import DataDirectoryError, check_writable, describe_error
from storage.data_dir.digest_locks import FileDigestLocks
from storage.data_dir.disk import Disk
from storage.data_dir.file_leases import FileLeases
from storage.data_dir.layout import Layout
from storage.data_dir.locks import Flock
from storage.data_dir.reserve import Reserve
from storage.data_dir.system import System, boot_id
from storage.errors import StorageFull
from storage.inventory import Inventory
from storage.leases import DigestLocks
from storage.metadata.catalog import Metadata
from storage.metadata.sqlite import inventory, setup
from storage.metadata.sqlite.immutable_database import NO_ROOM, ImmutableDatabase
from storage.metadata.sqlite.sqlite_database import SqliteDatabase
from storage.partials import Partials
from storage.store.publication import Publication
from storage.store.stored_registry import StorageHealth, StoredRegistry
from storage.upkeep.collector import Collector
from storage.upkeep.disk_space import DiskSpaceMonitor
from storage.upkeep.schedule import cancel_all, run_rounds

DAY = 86400.0
log = logging.getLogger("storage")

OpenContent = Callable[[Disk, str, Metadata, DigestLocks], AbstractAsyncContextManager[tuple[BlobStore, Partials]]]
"""Opens where the bytes lie, given the machine's run (`boot_id`) and what publishing needs."""


def prepare_data_dir(data: Path, system: System | None = None) -> None:
    """Makes the data directory, or migrates it to this version; leaves nothing open. Called before any fork. On a full
    disk it uses the reserve, and drops the trash and idle partial blobs; where that is not enough, it leaves a data
    directory of this version as it is, for reads. Raises DataDirectoryError."""
    layout = layout_of(data)
    system = system or System()
    check_writable(layout.root)
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
        where = error.filename or layout.root
        raise DataDirectoryError(f"cannot set up the data directory: {where}: {describe_error(error)}") from None
    except StorageFull:
        setup.check_readable(layout)
    with closing(Reserve(layout.reserve, system)) as reserve:
        reserve.establish()


def layout_of(data: Path) -> Layout:
    """Returns the paths in a data directory, absolute: the process may change its working directory later."""
    return Layout(data.absolute())


def has_data(data: Path) -> bool:
    """Returns whether there is a registry in the data directory."""
    return layout_of(data).metadata.exists()


def check_version(data: Path) -> None:
    """For commands that only read. Raises DataDirectoryError: no registry in there, one of another version, or a
    database that cannot be read."""
    setup.check_database_version(layout_of(data), data)


def has_had_account(data: Path) -> bool:
    """Returns whether a prepared data directory ever had an account (`Accounts.closed`). Leaves nothing open, so it may
    be called before a fork. Raises StorageFailed."""
    return setup.read_had_account(layout_of(data))


def list_partials(data: Path) -> list[PartialSummary]:
    """Returns the blobs that are being fetched, or can still be completed. Changes nothing. Raises OSError."""
    return leftovers.list_partials(layout_of(data), boot_id())


def open_inventory(data: Path) -> AbstractContextManager[Inventory]:
    """Opens the inventory of a data directory of this version (`check_version`)."""
    return inventory.open_inventory(layout_of(data).metadata)


@asynccontextmanager
async def open_files(
    disk: Disk, boot: str, metadata: Metadata, locks: DigestLocks
) -> AsyncIterator[tuple[BlobStore, Partials]]:
    """Opens blobs, uploads and partial blobs as files in the data directory."""
    with closing(FileBlobStore(disk, boot)) as blobs:
        publication = Publication(blobs, metadata, locks)
        async with aclosing(FilePartialStore(disk, boot, publication.adopt)) as partials:
            yield blobs, partials


@asynccontextmanager
async def open_registry(
    data: Path,
    *,
    grace: float = DAY,
    expire: float = 7 * DAY,
    collect_every: float | None = None,
    watch_disk_space: bool = False,
    may_open_read_only: bool = False,
    keep_audit: float = 365 * DAY,
    clock: Callable[[], float] = time.time,
    system: System | None = None,
    boot: str | None = None,
    open_content: OpenContent = open_files,
) -> AsyncIterator[StoredRegistry]:
    """Opens the registry in a prepared data directory, for this process and its running event loop.

    Times are in seconds: `grace` for unreferenced blobs, `expire` for idle uploads and partial blobs, `keep_audit` for
    lines of the audit log, `collect_every` between rounds of the collector (None: no rounds; one process at a time does
    them). `watch_disk_space`: log when the disk becomes full. `may_open_read_only`: open the metadata read-only if
    there is no space to open it for changes (`StoredRegistry.retire`). `boot`: the machine's run, if not the real one.
    `open_content`: where the bytes lie. Raises StorageFull, StorageFailed.
    """
    layout = layout_of(data)
    system = system or System()
    boot = boot_id() if boot is None else boot
    async with AsyncExitStack() as stack:
        reserve = stack.enter_context(closing(Reserve(layout.reserve, system)))
        disk = stack.enter_context(closing(Disk(layout, system, reserve)))
        database = stack.enter_context(closing(_open_database(disk, clock, may_open_read_only=may_open_read_only)))
        metadata, immutable = database.metadata, database.immutable
        locks = FileDigestLocks(disk)
        blobs, partials = await stack.enter_async_context(open_content(disk, boot, metadata, locks))
        leases = stack.enter_context(closing(FileLeases(layout.leases, system)))

        def is_full() -> bool:
            return reserve.storage_problem() is not None

        collector = Collector(metadata, blobs, partials, locks, clock, grace, expire, is_full)
        registry = StoredRegistry(
            metadata,
            blobs,
            clock,
            collector,
            StorageHealth(reserve.storage_problem) if immutable is None else StorageHealth(_no_room, immutable.retire),
            partials=partials,
            records=database.records,
            locks=locks,
            leases=leases,
            accounts=database.accounts,
        )
        upkeep: list[asyncio.Task[None]] = []
        stack.push_async_callback(cancel_all, upkeep)
        if immutable is not None:
            log.warning("%s (data directory %s)", NO_ROOM, layout.root)
        elif watch_disk_space:
            monitor = DiskSpaceMonitor(disk)
            await monitor.check()
            upkeep.append(asyncio.create_task(monitor.run()))
        if collect_every is not None and immutable is None:

            async def tidy() -> None:
                await collector.collect()
                await database.accounts.prune_audit(clock() - keep_audit)

            upkeep.append(asyncio.create_task(run_rounds(tidy, leases, collect_every, is_full)))
        yield registry


@asynccontextmanager
async def open_accounts(
    data: Path, *, clock: Callable[[], float] = time.time, system: System | None = None
) -> AsyncIterator[Accounts]:
    """Opens accounts and rights in a prepared data directory, and nothing else of it: for commands that work beside a
    running server. The server's workers see a change from its commit on. Raises StorageFull."""
    layout = layout_of(data)
    system = system or System()
    with (
        closing(Reserve(layout.reserve, system)) as reserve,
        closing(Disk(layout, system, reserve)) as disk,
        closing(_open_database(disk, clock)) as database,
    ):
        yield database.accounts


def _open_database(disk: Disk, clock: Callable[[], float], *, may_open_read_only: bool = False) -> SqliteDatabase:
    """Raises StorageFull."""
    parts = disk.layout, disk.system, clock, disk.reserve
    try:
        return SqliteDatabase(*parts)
    except apsw.FullError:
        if may_open_read_only:
            return SqliteDatabase(*parts, immutable=ImmutableDatabase(disk.layout))
        raise StorageFull(NO_ROOM) from None


def _no_room() -> str:
    return NO_ROOM
