"""From a data directory to a registry: checked and migrated once, then opened by each process for itself."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import apsw

from storage.accounts import Accounts
from storage.blobs import files
from storage.blobs.disk import DiskBlobs
from storage.blobs.layout import Layout
from storage.data_directory import DataDirectoryError, check_writable
from storage.errors import RegistryError, StorageFailed
from storage.metadata.access.epoch import CLOSED
from storage.metadata.connection import connect, create
from storage.metadata.migrate import migrate, steps
from storage.metadata.sqlite import SqliteMetadata
from storage.partials import StoredPartials
from storage.stored import StoredRegistry
from storage.system import System, boot_id
from storage.turns import FileTurns
from storage.upkeep.collect import Collector

DAY = 86400.0
FIRST_ROUND = 300.0
"""Seconds after the start until the collector's first round, at the most."""
log = logging.getLogger("storage")


def prepare(data: Path, system: System | None = None) -> None:
    """Makes the data directory, or brings it to this version; leaves nothing open. Called before any fork. Raises
    DataDirectoryError."""
    layout = layout_of(data)
    system = system or System()
    check_writable(layout.root)
    try:
        files.make_directories(system, layout.root, layout.directories())
        lock = os.open(layout.metadata_lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            with files.Locked(lock):
                db = create(layout.metadata)
                try:
                    migrate(db)
                finally:
                    db.close()
                files.sync_directory(system, layout.root)
        finally:
            os.close(lock)
    except OSError as error:
        where = error.filename or layout.root
        raise DataDirectoryError(f"cannot set up the data directory: {where}: {error.strerror}") from None
    except apsw.Error as error:
        raise DataDirectoryError(f"{layout.metadata} cannot be used: {error}") from None


def check_version(data: Path) -> None:
    """For who only looks: a server of the older version may be running, so nothing is brought up to date. Raises
    DataDirectoryError: no registry in there, one of another version, or a database that cannot be read."""
    file = layout_of(data).metadata
    if not file.is_file():
        raise DataDirectoryError(f"{data} holds no registry yet; `entrepot serve --data {data}` makes one there")
    try:
        db = connect(file, read_only=True)
        try:
            have, newest = db.pragma("user_version"), steps()[-1][0]
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
    keep_audit: float = 365 * DAY,
    clock: Callable[[], float] = time.time,
    system: System | None = None,
    boot: str | None = None,
) -> AsyncIterator[StoredRegistry]:
    """The registry in a prepared data directory, for this process and its running event loop.
    Seconds: `grace` for unreferenced blobs, `expire` for idle upload sessions and partial blobs, `keep_audit` for lines
    of the audit log, `collect_every` between the rounds that take away what is past its time (None: there are none by
    themselves; one process at a time makes them). `boot`: the machine's run.
    """
    layout = layout_of(data)
    system = system or System()
    blobs = DiskBlobs(layout, system)
    metadata = SqliteMetadata(layout, system, clock)
    boot = boot_id() if boot is None else boot
    partials = StoredPartials(blobs, metadata, boot)
    turns = FileTurns(layout.turns, system)
    collector = Collector(metadata, blobs, partials, clock, grace, expire)
    registry = StoredRegistry(
        *(metadata, blobs, clock, boot, collector),
        partials=partials,
        records=metadata.records,
        turns=turns,
        accounts=metadata.accounts,
    )
    rounds = None
    if collect_every is not None:

        async def tidy() -> None:
            await collector.collect()
            await metadata.accounts.prune_audit(clock() - keep_audit)

        rounds = asyncio.create_task(_repeat(tidy, layout, collect_every))
    try:
        yield registry
    finally:
        if rounds is not None:
            rounds.cancel()
            # Raises nothing of theirs, so a cancellation is our own.
            (ended,) = await asyncio.gather(rounds, return_exceptions=True)
            if isinstance(ended, Exception):
                log.error("the rounds of collection ended long ago", exc_info=ended)
        turns.close()
        await partials.aclose()
        metadata.close()
        blobs.close()


def is_closed(data: Path) -> bool:
    """Whether a prepared data directory ever had an account (`Accounts.closed`). Leaves nothing open: it may be asked
    before a fork. Raises StorageFailed."""
    db = connect(layout_of(data).metadata, read_only=True)
    try:
        return bool(db.execute(CLOSED).get)
    except apsw.Error as error:
        raise StorageFailed(f"cannot read {layout_of(data).metadata}: {error}") from error
    finally:
        db.close()


@asynccontextmanager
async def open_accounts(
    data: Path, *, clock: Callable[[], float] = time.time, system: System | None = None
) -> AsyncIterator[Accounts]:
    """Who may do what, in a prepared data directory, and nothing else of it: for commands that work beside a running
    server. What they change, its workers see from the commit on."""
    metadata = SqliteMetadata(layout_of(data), system or System(), clock)
    try:
        yield metadata.accounts
    finally:
        metadata.close()


async def _repeat(tidy: Callable[[], Awaitable[None]], layout: Layout, every: float) -> None:
    """The first process that takes the lock tidies up for all of them; when it dies, the next one does."""
    lock = os.open(layout.collect_lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        await asyncio.sleep(min(every, FIRST_ROUND))
        while True:
            if files.try_lock(lock):
                try:
                    await tidy()
                except RegistryError as error:
                    log.warning("a collection was broken off: %s", error, exc_info=error.__cause__)
                fcntl.flock(lock, fcntl.LOCK_UN)
            await asyncio.sleep(every)
    finally:
        os.close(lock)
