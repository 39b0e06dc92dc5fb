"""From a data directory to a registry: checked and migrated once, then opened by each process for itself."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, closing, suppress
from pathlib import Path

import apsw

from storage.accounts import Accounts
from storage.blobs.files.file_blob_store import FileBlobStore
from storage.data_dir import durable_files
from storage.data_dir.check import DataDirectoryError, check_writable, describe_error
from storage.data_dir.file_leases import FileLeases
from storage.data_dir.layout import Layout
from storage.data_dir.reserve import Reserve
from storage.data_dir.system import System, boot_id
from storage.errors import RegistryError, StorageFailed, StorageFull
from storage.metadata.sqlite.access.account_table import READ_CLOSED
from storage.metadata.sqlite.database import connect, create, is_full, migrate, migrations
from storage.metadata.sqlite.immutable_database import NO_ROOM, ImmutableDatabase
from storage.metadata.sqlite.sqlite_metadata import SqliteMetadata
from storage.store.stored_partials import StoredPartials
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.collector import Collector
from storage.upkeep.disk_space import DiskSpaceMonitor, free_disk_space, wait_until_due

DAY = 86400.0
FIRST_ROUND = 300.0
"""Seconds after the start until the collector's first round, at the most."""
URGENT = 30.0
"""Seconds between its rounds on a full disk, at the most."""
log = logging.getLogger("storage")


def prepare_data_dir(data: Path, system: System | None = None) -> None:
    """Makes the data directory, or brings it to this version; leaves nothing open. Called before any fork. On a full
    disk it takes what it needs from the reserve, and drops what nobody will miss; where that is not enough, a data
    directory of this version is left as it is, for reads. Raises DataDirectoryError."""
    layout = layout_of(data)
    system = system or System()
    check_writable(layout.root)
    try:
        durable_files.make_directories(system, layout.root, layout.directories())
        durable_files.make_files(system, layout.lock_files())
        lock = system.open(layout.metadata_lock, os.O_RDWR | os.O_CREAT)
        try:
            with durable_files.Flock(lock):
                _prepare_metadata(layout, system)
                durable_files.sync_directory(system, layout.root)
        finally:
            os.close(lock)
    except OSError as error:
        where = error.filename or layout.root
        raise DataDirectoryError(f"cannot set up the data directory: {where}: {describe_error(error)}") from None
    except apsw.FullError:
        if not _can_be_read(layout):
            raise DataDirectoryError(
                f"the disk is full, and there is no room to open {layout.metadata}; free some space there"
            ) from None
    except apsw.Error as error:
        raise DataDirectoryError(f"{layout.metadata} cannot be used: {error}") from None
    with closing(Reserve(layout.reserve, system)) as reserve:
        reserve.establish()


def _prepare_metadata(layout: Layout, system: System) -> None:
    try:
        db = create(layout.metadata)
    except apsw.FullError:
        free_disk_space(layout, system, boot_id())
        db = create(layout.metadata)

    def bring_up_to_date() -> None:
        try:
            migrate(db)
        except apsw.Error as error:
            full = is_full(db, error)
            with suppress(apsw.Error):
                db.execute("ROLLBACK")
            if full:
                raise apsw.FullError(str(error)) from error
            raise

    try:
        bring_up_to_date()
    except apsw.FullError:
        with closing(Reserve(layout.reserve, system)) as reserve:
            reserve.spend(bring_up_to_date, apsw.FullError)
    finally:
        db.close()


def _can_be_read(layout: Layout) -> bool:
    """Whether the database is of this version and can be read without any room."""
    try:
        with closing(ImmutableDatabase(layout)) as frozen:
            return bool(frozen.db.pragma("user_version") == migrations()[-1][0])
    except (OSError, StorageFull, apsw.Error):
        return False


def check_version(data: Path) -> None:
    """For who only looks: a server of the older version may be running, so nothing is brought up to date. Raises
    DataDirectoryError: no registry in there, one of another version, or a database that cannot be read."""
    file = layout_of(data).metadata
    if not file.is_file():
        raise DataDirectoryError(f"{data} holds no registry yet; `entrepot serve --data {data}` makes one there")
    try:
        db = connect(file, read_only=True)
        try:
            have, newest = db.pragma("user_version"), migrations()[-1][0]
        finally:
            db.close()
    except apsw.Error as error:
        raise DataDirectoryError(f"{file} cannot be used: {error}") from None
    if have > newest:
        raise DataDirectoryError(f"{data} was written by a newer Entrepot; use the `entrepot` of that version")
    if have < newest:
        raise DataDirectoryError(f"{data} is of an older Entrepot; start `entrepot serve` once to bring it up to date")


def layout_of(data: Path) -> Layout:
    """The tree below a data directory, however the process changes its working directory later."""
    return Layout(data.absolute())


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
) -> AsyncIterator[StoredRegistry]:
    """The registry in a prepared data directory, for this process and its running event loop.
    Seconds: `grace` for unreferenced blobs, `expire` for idle upload sessions and partial blobs, `keep_audit` for lines
    of the audit log, `collect_every` between the rounds that take away what is past its time (None: there are none by
    themselves; one process at a time makes them). `watch_room`: the log says when the disk is full.
    `may_freeze`: where there is no room to open the database, it is only read (`StoredRegistry.retire`). `boot`: the
    machine's run.
    """
    layout = layout_of(data)
    system = system or System()
    async with AsyncExitStack() as stack:
        reserve = stack.enter_context(closing(Reserve(layout.reserve, system)))
        blobs = stack.enter_context(closing(FileBlobStore(layout, system, reserve)))
        metadata = stack.enter_context(
            closing(_open_metadata(layout, system, clock, reserve, may_freeze=may_open_read_only))
        )
        boot = boot_id() if boot is None else boot
        partials = await stack.enter_async_context(aclosing(StoredPartials(blobs, metadata, boot)))
        turns = stack.enter_context(closing(FileLeases(layout.leases, system)))
        collector = Collector(
            metadata, blobs, partials, clock, grace, expire, lambda: reserve.storage_problem() is not None
        )
        registry = StoredRegistry(
            *(metadata, blobs, clock, boot, collector),
            partials=partials,
            records=metadata.records,
            leases=turns,
            accounts=metadata.accounts,
            frozen=metadata.frozen,
        )
        upkeep: list[asyncio.Task[None]] = []
        stack.push_async_callback(_end, upkeep)
        if metadata.frozen is not None:
            log.warning("%s (data directory %s)", NO_ROOM, layout.root)
        elif watch_disk_space:
            room = DiskSpaceMonitor(blobs, layout.root)
            await room.look()
            upkeep.append(asyncio.create_task(room.run()))
        if collect_every is not None and metadata.frozen is None:

            async def tidy() -> None:
                await collector.collect()
                await metadata.accounts.prune_audit(clock() - keep_audit)

            upkeep.append(asyncio.create_task(_repeat(tidy, layout, collect_every, reserve)))
        yield registry


async def _end(upkeep: list[asyncio.Task[None]]) -> None:
    for task in upkeep:
        task.cancel()
    # Raises nothing of theirs, so a cancellation is our own.
    for ended in await asyncio.gather(*upkeep, return_exceptions=True):
        if isinstance(ended, Exception):
            log.error("a background task of the store had ended with an error", exc_info=ended)


def _open_metadata(
    layout: Layout, system: System, clock: Callable[[], float], reserve: Reserve, *, may_freeze: bool = False
) -> SqliteMetadata:
    """Raises StorageFull."""
    try:
        return SqliteMetadata(layout, system, clock, reserve)
    except apsw.FullError:
        if may_freeze:
            return SqliteMetadata(layout, system, clock, reserve, frozen=ImmutableDatabase(layout))
        raise StorageFull(NO_ROOM) from None


def has_had_account(data: Path) -> bool:
    """Whether a prepared data directory ever had an account (`Accounts.closed`). Leaves nothing open: it may be asked
    before a fork. Raises StorageFailed."""
    layout = layout_of(data)
    try:
        db = connect(layout.metadata, read_only=True)
    except apsw.FullError:
        with closing(ImmutableDatabase(layout)) as frozen:
            return bool(frozen.db.execute(READ_CLOSED).get)
    try:
        return bool(db.execute(READ_CLOSED).get)
    except apsw.Error as error:
        raise StorageFailed(f"cannot read {layout.metadata}: {error}") from error
    finally:
        db.close()


@asynccontextmanager
async def open_accounts(
    data: Path, *, clock: Callable[[], float] = time.time, system: System | None = None
) -> AsyncIterator[Accounts]:
    """Who may do what, in a prepared data directory, and nothing else of it: for commands that work beside a running
    server. What they change, its workers see from the commit on."""
    layout = layout_of(data)
    system = system or System()
    with closing(Reserve(layout.reserve, system)) as reserve:
        metadata = _open_metadata(layout, system, clock, reserve)
        try:
            yield metadata.accounts
        finally:
            metadata.close()


async def _repeat(tidy: Callable[[], Awaitable[None]], layout: Layout, every: float, reserve: Reserve) -> None:
    """The first process that takes the lock tidies up for all of them; when it dies, the next one does. On a full disk
    the rounds come sooner."""
    lock = os.open(layout.collect_lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        await wait_until_due(min(every, FIRST_ROUND), 0.0, reserve)
        while True:
            if durable_files.try_flock(lock):
                try:
                    await tidy()
                except RegistryError as error:
                    log.warning("a collection was broken off: %s", error, exc_info=error.__cause__)
                fcntl.flock(lock, fcntl.LOCK_UN)
            await wait_until_due(every, URGENT, reserve)
    finally:
        os.close(lock)
