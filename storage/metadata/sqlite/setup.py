"""Steps before the metadata database is used: create it, migrate it, and check its version.

"The writers' lock" is the lock file that every process locks exclusively while it writes to the database.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import apsw

from storage.data_dir.check import DataDirectoryError
from storage.data_dir.layout import Layout
from storage.data_dir.reserve import Reserve
from storage.data_dir.system import System
from storage.errors import StorageFailed, StorageFull
from storage.metadata.sqlite.access.account_table import SELECT_CLOSED
from storage.metadata.sqlite.database import connect, create, is_full, migrate, migrations
from storage.metadata.sqlite.immutable_database import NO_ROOM, ImmutableDatabase


def prepare_database(layout: Layout, system: System, free_space: Callable[[], None]) -> None:
    """Creates the database, or migrates it to this version. The caller holds the writers' lock.

    On a full disk it calls `free_space`, which deletes what can be spared, and then uses the reserve: disk space that
    was allocated in advance. Raises DataDirectoryError if the database cannot be used; StorageFull if the space does
    not suffice."""
    try:
        _create_or_migrate(layout, system, free_space)
    except apsw.FullError:
        raise StorageFull(NO_ROOM) from None
    except apsw.Error as error:
        raise DataDirectoryError(f"{layout.metadata} cannot be used: {error}") from None


def check_readable(layout: Layout) -> None:
    """Raises DataDirectoryError unless the database has this version and can be read while the disk has no free space.
    The caller must not hold the writers' lock, because the check takes it shared."""
    if not _is_readable_without_space(layout):
        raise DataDirectoryError(
            f"the disk is full, and there is no room to open {layout.metadata}; free some space there"
        )


def _create_or_migrate(layout: Layout, system: System, free_space: Callable[[], None]) -> None:
    try:
        db = create(layout.metadata)
    except apsw.FullError:
        free_space()
        db = create(layout.metadata)

    def migrate_or_roll_back() -> None:
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
        migrate_or_roll_back()
    except apsw.FullError:
        with closing(Reserve(layout.reserve, system)) as reserve:
            reserve.spend(migrate_or_roll_back, apsw.FullError)
    finally:
        db.close()


def _is_readable_without_space(layout: Layout) -> bool:
    try:
        with closing(ImmutableDatabase(layout)) as immutable:
            return bool(immutable.db.pragma("user_version") == migrations()[-1][0])
    except (OSError, StorageFull, apsw.Error):
        return False


def check_database_version(layout: Layout, data: Path) -> None:
    """Checks that the database exists and has this version. Does not migrate it, because a server of an older version
    may be running. `data`: the data directory, as error messages show it. Raises DataDirectoryError if there is no
    database, if it has another version, or if it cannot be read."""
    file = layout.metadata
    if not file.is_file():
        raise DataDirectoryError(f"{data} holds no registry yet; `entrepot serve --data {data}` makes one there")
    try:
        with closing(connect(file, read_only=True)) as db:
            current, newest = db.pragma("user_version"), migrations()[-1][0]
    except apsw.Error as error:
        raise DataDirectoryError(f"{file} cannot be used: {error}") from None
    if current > newest:
        raise DataDirectoryError(f"{data} was written by a newer Entrepot; use the `entrepot` of that version")
    if current < newest:
        raise DataDirectoryError(f"{data} is of an older Entrepot; start `entrepot serve` once to bring it up to date")


def read_had_account(layout: Layout) -> bool:
    """Returns whether the registry ever had an account. Closes its connection, so it may be called before a fork.
    Raises StorageFull, StorageFailed, and the errors of apsw if the database cannot be opened."""
    try:
        db = connect(layout.metadata, read_only=True)
    except apsw.FullError:
        with closing(ImmutableDatabase(layout)) as immutable:
            return bool(immutable.db.execute(SELECT_CLOSED).get)
    try:
        return bool(db.execute(SELECT_CLOSED).get)
    except apsw.Error as error:
        raise StorageFailed(f"cannot read {layout.metadata}: {error}") from error
    finally:
        db.close()
