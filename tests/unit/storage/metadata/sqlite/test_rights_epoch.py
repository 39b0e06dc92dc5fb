"""The epoch of rights, which each process caches. A process does not read it again after each commit of its own."""

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
RAISE = "UPDATE access SET epoch = epoch + 1"
OTHER = "INSERT INTO repository (name, created) VALUES (?, 0)"


@contextmanager
def opened(data: Path, system: System | None = None) -> Iterator[SqliteDatabase]:
    database = SqliteDatabase(Layout(data), system or System(), lambda: 0.0, Reserve(Layout(data).reserve, System()))
    yield database
    database.close()


@pytest.fixture
def outside(data: Path) -> Iterator[apsw.Connection]:
    """A connection of a person with a shell, who does not take the lock of the writers."""
    db = connect(Layout(data).metadata)
    yield db
    db.close()


class Interrupted(System):
    """A system that calls a function directly after each commit."""

    def __init__(self) -> None:
        super().__init__()
        self.then: Callable[[], object] | None = None

    def commit(self, commit: Callable[[], None], *, durable: bool) -> None:
        super().commit(commit, durable=durable)
        if self.then:
            self.then()


async def start_upload(database: SqliteDatabase, number: int) -> None:
    """Makes a change that does not change rights."""
    await database.metadata.start_upload(UploadID(str(UUID(int=number))), REPO, "sha256", "boot", "")


async def test_after_a_change_of_ones_own_nothing_is_looked_up(data: Path) -> None:
    """After a commit or a failed change of its own, a process does not read the epoch again. After a change of rights,
    it does."""
    with opened(data) as database:
        first = database.accounts.epoch()
        looked: list[str] = []

        def note(_cursor: object, statement: str, _values: object) -> bool:
            looked.append(statement)
            return True

        database._db.set_exec_trace(note)
        for number in range(5):
            await start_upload(database, number)
            assert database.accounts.epoch() == first
        with pytest.raises(StorageFailed):
            await start_upload(database, 0)
        assert database.accounts.epoch() == first
        assert looked == []
        await database.accounts.add_account(AccountName("bob"), AccountKind.USER, password_hash=None, by=BY_ROOT)
        assert database.accounts.epoch() > first
        assert database.accounts.has_had_account()
        assert len(looked) == 1


async def test_rights_that_somebody_changes_right_after_our_commit_are_seen(
    data: Path, outside: apsw.Connection
) -> None:
    """A change of rights from outside, between a commit and the moment at which the process records it, is seen."""
    system = Interrupted()
    with opened(data, system) as database:
        for number in range(3):
            before = database.accounts.epoch()
            system.then = lambda: outside.execute(RAISE)
            await start_upload(database, number)
            system.then = None
            assert database.accounts.epoch() == before + 1


@pytest.mark.parametrize("seed", range(6))
async def test_the_epoch_is_the_databases_whoever_committed_what(
    data: Path, outside: apsw.Connection, seed: int
) -> None:
    """The cached epoch is that of the database, in whatever order two processes and an outsider change rights and other
    rows, and however often the epoch is read."""
    chance = random.Random(seed)
    with opened(data) as one, opened(data) as two:
        for number in range(150):
            who = chance.choice((one, two, outside))
            rights = chance.random() < 0.3
            if isinstance(who, apsw.Connection):
                who.execute(RAISE) if rights else who.execute(OTHER, (f"repository-{number}",))
            elif rights:
                await who.accounts.add_account(
                    AccountName(f"user-{number}"), AccountKind.USER, password_hash=None, by=BY_ROOT
                )
            else:
                await start_upload(who, number)
            for asked in chance.sample((one, two), chance.randint(0, 2)):
                assert asked.accounts.epoch() == outside.execute("SELECT epoch FROM access").get
