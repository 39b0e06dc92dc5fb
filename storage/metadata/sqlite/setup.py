"""What is done with the metadata database before anything is opened in it: create, migrate, check its version."""

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
from storage.metadata.sqlite.access.account_table import READ_CLOSED
from storage.metadata.sqlite.database import connect, create, is_full, migrate, migrations
from storage.metadata.sqlite.immutable_database import NO_ROOM, ImmutableDatabase


def prepare_database(layout: Layout, system: System, free_space: Callable[[], None]) -> None:
    """Makes the database, or migrates it to this version; the caller holds the writers' lock. On a full disk it calls
    `free_space`, and then uses the reserve. Raises DataDirectoryError; StorageFull if there is no space even so."""
    try:
        _create_or_migrate(layout, system, free_space)
    except apsw.FullError:
        raise StorageFull(NO_ROOM) from None
    except apsw.Error as error:
        raise DataDirectoryError(f"{layout.metadata} cannot be used: {error}") from None


def check_readable(layout: Layout) -> None:
    """Raises DataDirectoryError unless the database is of this version and can be read without any free space. The
    caller must not hold the writers' lock: the check shares it."""
    if not _is_readable(layout):
        raise DataDirectoryError(
            f"the disk is full, and there is no room to open {layout.metadata}; free some space there"
        )


def _create_or_migrate(layout: Layout, system: System, free_space: Callable[[], None]) -> None:
    try:
        db = create(layout.metadata)
    except apsw.FullError:
        free_space()
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


def _is_readable(layout: Layout) -> bool:
    """Returns whether the database is of this version and can be read without any free space."""
    try:
        with closing(ImmutableDatabase(layout)) as immutable:
            return bool(immutable.db.pragma("user_version") == migrations()[-1][0])
    except (OSError, StorageFull, apsw.Error):
        return False


def check_database_version(layout: Layout, data: Path) -> None:
    """Changes nothing: a server of an older version may be running. `data`: as messages name the directory. Raises
    DataDirectoryError: there is no registry yet, one of another version, or a database that cannot be read."""
    file = layout.metadata
    if not file.is_file():
        raise DataDirectoryError(f"{data} holds no registry yet; `entrepot serve --data {data}` makes one there")
    try:
        with closing(connect(file, read_only=True)) as db:
            have, newest = db.pragma("user_version"), migrations()[-1][0]
    except apsw.Error as error:
        raise DataDirectoryError(f"{file} cannot be used: {error}") from None
    if have > newest:
        raise DataDirectoryError(f"{data} was written by a newer Entrepot; use the `entrepot` of that version")
    if have < newest:
        raise DataDirectoryError(f"{data} is of an older Entrepot; start `entrepot serve` once to bring it up to date")


def read_had_account(layout: Layout) -> bool:
    """Returns whether the database ever had an account (`Accounts.has_had_account`). Leaves nothing open, so it may be
    called before a fork. Raises StorageFailed."""
    try:
        db = connect(layout.metadata, read_only=True)
    except apsw.FullError:
        with closing(ImmutableDatabase(layout)) as immutable:
            return bool(immutable.db.execute(READ_CLOSED).get)
    try:
        return bool(db.execute(READ_CLOSED).get)
    except apsw.Error as error:
        raise StorageFailed(f"cannot read {layout.metadata}: {error}") from error
    finally:
        db.close()
