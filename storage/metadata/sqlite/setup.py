"""Prepares the metadata database for use: creates it, migrates it, and checks its version.

The *table version* of a database is the number of the last migration that was applied to it. A program can use only one
table version: the number of the last migration that the program contains (`newest_table_version`).

The *writers' lock* is a lock file that every process locks exclusively while it writes to the database.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import apsw

from storage.data_dir.blocking_calls import as_storage_errors
from storage.data_dir.check import (
    DataDirectoryError,
    NewerRegistry,
    NoRegistry,
    OlderRegistry,
    check_database_not_lost,
    check_restore_ended,
)
from storage.data_dir.layout import Layout
from storage.data_dir.reserve import Reserve
from storage.data_dir.system import System
from storage.errors import StorageFailed, StorageFull
from storage.metadata.sqlite.access.account_table import SELECT_HAS_HAD_ACCOUNT
from storage.metadata.sqlite.database import connect, create, means_full_disk, migrate, newest_table_version
from storage.metadata.sqlite.immutable_database import DISK_FULL_TEXT, ImmutableDatabase


def prepare_database(layout: Layout, system: System, free_space: Callable[[], None]) -> None:
    """Creates the database if it is missing, and migrates it to the table version of this program. The caller holds the
    writers' lock.

    On a full disk, uses the *reserve*: disk space that the registry keeps allocated for this case. If the reserve is
    too small for opening the database, calls `free_space`, and opens the database again. `free_space` deletes files
    that the registry can do without. Raises StorageFull if there is still too little space to open or migrate the
    database. Raises DataDirectoryError if the database cannot be used for another reason. Raises OSError."""
    try:
        _create_and_migrate(layout, system, free_space)
    except apsw.FullError:
        raise StorageFull(DISK_FULL_TEXT) from None
    except apsw.Error as error:
        raise DataDirectoryError(f"{layout.metadata} cannot be used: {error}") from None


def check_readable_on_full_disk(layout: Layout) -> None:
    """Checks that a server can at least read the database. Called after `prepare_database` has raised StorageFull.
    Raises DataDirectoryError, which says that the disk is full, in two cases:

    - The database cannot be opened read-only.
    - The database does not have the table version of this program: the full disk has prevented the migration.

    The check takes the writers' lock in shared mode, so the caller must not hold this lock."""
    if not _is_readable_on_full_disk(layout):
        raise DataDirectoryError(
            f"the disk is full, and there is no room to open {layout.metadata}; free some space there"
        )


def _create_and_migrate(layout: Layout, system: System, free_space: Callable[[], None]) -> None:
    try:
        db = create(layout.metadata)  # uses the reserve on a full disk
    except apsw.FullError:
        free_space()
        db = create(layout.metadata)

    def migrate_or_roll_back() -> None:
        try:
            migrate(db)
        except apsw.Error as error:
            is_disk_full = means_full_disk(db, error)
            with suppress(apsw.Error):
                db.execute("ROLLBACK")
            if is_disk_full:
                raise apsw.FullError(str(error)) from error
            raise

    try:
        migrate_or_roll_back()
    except apsw.FullError:
        with closing(Reserve(layout.reserve, system)) as reserve:
            # `spend` frees a part of the reserve and calls the function. After a FullError, `spend` frees another part
            # and calls the function again.
            reserve.spend(migrate_or_roll_back, full_error=apsw.FullError)
    finally:
        db.close()


def _is_readable_on_full_disk(layout: Layout) -> bool:
    try:
        with closing(ImmutableDatabase(layout)) as immutable:
            return bool(immutable.db.pragma("user_version") == newest_table_version())
    except (OSError, StorageFull, apsw.Error):
        return False


def check_database_version(layout: Layout, data: Path) -> None:
    """Checks that the database exists and has the table version of this program. Commands that do not start a server
    call this. Does not migrate an older database, because a server of the older version may be running. `data` is the
    data directory as error messages show it. Raises DataDirectoryError in these cases:

    - A restore from a backup has not ended.
    - There is no database.
    - The database has another table version.
    - The database cannot be read."""
    file = layout.metadata
    try:
        check_restore_ended(layout, data)
        check_database_not_lost(layout, data)
        if not file.is_file():
            raise NoRegistry(f"{data} holds no registry yet; `entrepot serve --data {data}` makes one there")
    except OSError as error:
        raise DataDirectoryError(f"{file} cannot be read: {error.strerror}") from None
    try:
        with closing(connect(file, read_only=True)) as db:
            current, newest = db.pragma("user_version"), newest_table_version()
    except apsw.Error as error:
        raise DataDirectoryError(f"{file} cannot be used: {error}") from None
    if current > newest:
        raise NewerRegistry(f"{data} was written by a newer Entrepot; use the `entrepot` of that version")
    if current < newest:
        raise OlderRegistry(f"{data} is of an older Entrepot; start `entrepot serve` once to bring it up to date")


def has_had_account(layout: Layout) -> bool:
    """Returns whether the registry ever had an account. Works on a full disk. Leaves no connection open, so it may be
    called before a fork. Raises StorageFull, StorageFailed."""
    try:
        with as_storage_errors():
            return _read_has_had_account(layout)
    except apsw.Error as error:
        raise StorageFailed(f"cannot read {layout.metadata}: {error}") from error


def _read_has_had_account(layout: Layout) -> bool:
    try:
        db = connect(layout.metadata, read_only=True)
    except apsw.FullError:
        with closing(ImmutableDatabase(layout)) as immutable:
            return bool(immutable.db.execute(SELECT_HAS_HAD_ACCOUNT).get)
    with closing(db):
        return bool(db.execute(SELECT_HAS_HAD_ACCOUNT).get)
