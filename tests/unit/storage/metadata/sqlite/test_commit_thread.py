"""The writer of the metadata: a thread that makes many changes in one transaction."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path

import apsw
import pytest

from storage.composition import prepare_data_dir
from storage.data_dir.layout import Layout
from storage.data_dir.reserve import Reserve
from storage.data_dir.system import System
from storage.errors import BlobUnknown, StorageFailed, StorageFull
from storage.metadata.sqlite.commit_thread import CommitThread
from storage.metadata.sqlite.cross_process_change_counter import DataVersion
from storage.metadata.sqlite.database import connect

Change = Callable[[apsw.Connection], None]


@pytest.fixture
async def writer(tmp_path: Path) -> AsyncIterator[CommitThread]:
    prepare_data_dir(tmp_path / "data")
    layout = Layout(tmp_path / "data")
    db = connect(layout.metadata, read_only=True)
    version = DataVersion(db)
    opened = CommitThread(layout, System(), version, Reserve(layout.reserve, System()))
    yield opened
    opened.close()
    version.close()
    db.close()


def _repository(name: str, then: Exception | None = None) -> Change:
    def change(db: apsw.Connection) -> None:
        db.execute("INSERT INTO repository (name, created) VALUES (?, 0)", (name,))
        if then is not None:
            raise then

    return change


async def _names(writer: CommitThread) -> set[str]:
    def read(db: apsw.Connection) -> set[str]:
        return {name for (name,) in db.execute("SELECT name FROM repository")}

    return await writer.run(read)


async def test_a_change_that_fails_takes_nothing_of_its_batch_along(writer: CommitThread) -> None:
    """If changes in one transaction raise errors, only these changes are undone, and each gets its own error."""
    changes = [
        _repository("one"),
        _repository("two", BlobUnknown()),
        _repository("three"),
        _repository("four", ValueError("a bug")),
        _repository("one"),
    ]
    results = await asyncio.gather(*map(writer.run, changes), return_exceptions=True)
    assert [type(result) for result in results] == [type(None), BlobUnknown, type(None), StorageFailed, StorageFailed]
    assert await _names(writer) == {"one", "three"}


async def test_a_change_for_which_there_is_no_room_takes_nothing_of_its_batch_along(writer: CommitThread) -> None:
    """If the disk becomes full during a transaction, SQLite undoes all of it. The changes for which there is room are
    then made once, and the other one gets StorageFull."""
    await writer.run(lambda db: db.pragma("max_page_count", db.pragma("page_count") + 40))

    def large(db: apsw.Connection) -> None:
        db.execute("INSERT INTO repository (name, created) VALUES (?, 0)", ("x" * 1_000_000,))

    changes: list[Change] = [_repository("one"), large, _repository("two"), large, _repository("three")]
    results = await asyncio.gather(*map(writer.run, changes), return_exceptions=True)
    assert [type(result) for result in results] == [type(None), StorageFull, type(None), StorageFull, type(None)]
    assert await _names(writer) == {"one", "two", "three"}


async def test_changes_are_made_in_order_and_survive_their_callers(writer: CommitThread) -> None:
    """A change whose caller is cancelled is made nevertheless, before later changes. The caller's cancellation takes
    effect once the change is made."""

    async def call() -> None:
        await writer.run(_repository("one"))

    first = asyncio.create_task(call())
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    assert first.cancelled()
    assert "one" in await _names(writer)


async def test_without_the_lock_nothing_is_changed_and_nobody_waits_for_ever(
    writer: CommitThread, tmp_path: Path
) -> None:
    """If the lock cannot be taken, the changes get an error. Once it can be taken again, changes succeed."""
    path = tmp_path / "data/locks/metadata"
    (number,) = (fd for fd in map(int, os.listdir("/proc/self/fd")) if _leads_to(fd, path))
    kept, useless = os.dup(number), os.open(path, os.O_PATH)
    try:
        os.dup2(useless, number)  # a descriptor that cannot be locked
        results = await asyncio.gather(*(writer.run(_repository(name)) for name in "abc"), return_exceptions=True)
        assert [type(result) for result in results] == [StorageFailed] * 3
        os.dup2(kept, number)
    finally:
        os.close(kept)
        os.close(useless)
    await writer.run(_repository("one"))
    assert await _names(writer) == {"one"}


def _leads_to(fd: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.readlink(f"/proc/self/fd/{fd}") == str(path)
    return False


async def test_the_log_of_changes_is_kept_short(writer: CommitThread, tmp_path: Path) -> None:
    """The write-ahead log is checkpointed while changes continue, so it does not grow with their number."""

    def change(db: apsw.Connection) -> None:
        db.execute("INSERT OR REPLACE INTO repository (id, name, created) VALUES (1, ?, 0)", ("x" * 500_000,))

    for _ in range(60):
        await writer.run(change)
    assert (tmp_path / "data/entrepot.db-wal").stat().st_size < 20_000_000
