"""The epoch of rights: a number in the database that grows with each change of rights. Each process caches it. After a
commit of its own that does not change rights, a process does not read the epoch again."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import apsw
import pytest

from storage.access import AccountKind, AccountName
from storage.data_dir.layout import Layout
from storage.data_dir.reserve import Reserve
from storage.data_dir.system import System
from storage.errors import StorageFailed
from storage.metadata.sqlite.database import connect
from storage.metadata.sqlite.sqlite_database import SqliteDatabase
from storage.names import RepositoryName, UploadID
from tests.unit.storage.metadata.account_views import BY_ROOT

REPO = RepositoryName("team/app")
INCREASE_EPOCH = "UPDATE access SET epoch = epoch + 1"
ADD_REPOSITORY = "INSERT INTO repository (name, created) VALUES (?, 0)"


@contextmanager
def opened(data: Path, system: System | None = None) -> Iterator[SqliteDatabase]:
    database = SqliteDatabase(Layout(data), system or System(), lambda: 0.0, Reserve(Layout(data).reserve, System()))
    yield database
    database.close()


@pytest.fixture
def outside_connection(data: Path) -> Iterator[apsw.Connection]:
    """A connection of another program, such as the `sqlite3` shell, which does not take the writers' lock."""
    db = connect(Layout(data).metadata)
    yield db
    db.close()


class HookedSystem(System):
    """A system that calls `after_commit` directly after each commit."""

    def __init__(self) -> None:
        super().__init__()
        self.after_commit: Callable[[], object] | None = None

    def commit(self, commit: Callable[[], None], *, durable: bool) -> None:
        super().commit(commit, durable=durable)
        if self.after_commit:
            self.after_commit()


async def start_upload(database: SqliteDatabase, number: int) -> None:
    """Makes a change that does not change rights."""
    await database.metadata.start_upload(UploadID(str(UUID(int=number))), REPO, "sha256", "boot", "")


async def test_epoch_is_not_read_again_after_own_changes(data: Path) -> None:
    """After a commit or a failed change of its own, a process does not read the epoch again. After a change of rights,
    it reads the epoch once."""
    with opened(data) as database:
        first = database.accounts.epoch()
        statements: list[str] = []

        def record_statement(_cursor: object, statement: str, _values: object) -> bool:
            statements.append(statement)
            return True

        database._db.set_exec_trace(record_statement)
        for number in range(5):
            await start_upload(database, number)
            assert database.accounts.epoch() == first
        with pytest.raises(StorageFailed):
            await start_upload(database, 0)
        assert database.accounts.epoch() == first
        assert statements == []
        await database.accounts.add_account(AccountName("bob"), AccountKind.USER, password_hash=None, by=BY_ROOT)
        assert database.accounts.epoch() > first
        assert database.accounts.has_had_account()
        assert len(statements) == 1


async def test_outside_change_right_after_a_commit_is_seen(data: Path, outside_connection: apsw.Connection) -> None:
    """Another program may change rights after a commit of a process and before the process records its commit. The
    process sees this change."""
    system = HookedSystem()
    with opened(data, system) as database:
        for number in range(3):
            epoch_before = database.accounts.epoch()
            system.after_commit = lambda: outside_connection.execute(INCREASE_EPOCH)
            await start_upload(database, number)
            system.after_commit = None
            assert database.accounts.epoch() == epoch_before + 1


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.slow
async def test_cached_epoch_equals_the_epoch_in_the_database(
    data: Path, outside_connection: apsw.Connection, seed: int
) -> None:
    """Two processes and another program change rights and other rows in a random order. The cached epoch of both
    processes always equals the epoch in the database."""
    rng = random.Random(seed)
    with opened(data) as first, opened(data) as second:
        for number in range(150):
            writer = rng.choice((first, second, outside_connection))
            changes_rights = rng.random() < 0.3
            if isinstance(writer, apsw.Connection):
                if changes_rights:
                    writer.execute(INCREASE_EPOCH)
                else:
                    writer.execute(ADD_REPOSITORY, (f"repository-{number}",))
            elif changes_rights:
                await writer.accounts.add_account(
                    AccountName(f"user-{number}"), AccountKind.USER, password_hash=None, by=BY_ROOT
                )
            else:
                await start_upload(writer, number)
            for reader in rng.sample((first, second), rng.randint(0, 2)):
                assert reader.accounts.epoch() == outside_connection.execute("SELECT epoch FROM access").get
