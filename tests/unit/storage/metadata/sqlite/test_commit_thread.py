"""The thread that writes to the metadata database. It makes several changes in one transaction (a batch)."""

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


def _add_repository(name: str, error: Exception | None = None) -> Change:
    """Returns a change that adds a repository. If there is an `error`, the change then raises it."""

    def change(db: apsw.Connection) -> None:
        db.execute("INSERT INTO repository (name, created) VALUES (?, 0)", (name,))
        if error is not None:
            raise error

    return change


async def _names(writer: CommitThread) -> set[str]:
    def read(db: apsw.Connection) -> set[str]:
        return {name for (name,) in db.execute("SELECT name FROM repository")}

    return await writer.run(read)


async def test_a_failed_change_does_not_affect_its_batch(writer: CommitThread) -> None:
    """If some changes of a transaction raise errors, only these changes are undone. Each of their callers gets its own
    error."""
    changes = [
        _add_repository("one"),
        _add_repository("two", BlobUnknown()),
        _add_repository("three"),
        _add_repository("four", ValueError("a bug")),
        _add_repository("one"),
    ]
    results = await asyncio.gather(*map(writer.run, changes), return_exceptions=True)
    assert [type(result) for result in results] == [type(None), BlobUnknown, type(None), StorageFailed, StorageFailed]
    assert await _names(writer) == {"one", "three"}


async def test_a_change_that_does_not_fit_on_the_disk_does_not_affect_its_batch(writer: CommitThread) -> None:
    """If the disk becomes full during a transaction, SQLite undoes the whole transaction. The changes for which there
    is space are then made again, each once. The callers of the others get StorageFull."""
    await writer.run(lambda db: db.pragma("max_page_count", db.pragma("page_count") + 40))

    def add_large_name(db: apsw.Connection) -> None:
        db.execute("INSERT INTO repository (name, created) VALUES (?, 0)", ("x" * 1_000_000,))

    changes: list[Change] = [
        _add_repository("one"),
        add_large_name,
        _add_repository("two"),
        add_large_name,
        _add_repository("three"),
    ]
    results = await asyncio.gather(*map(writer.run, changes), return_exceptions=True)
    assert [type(result) for result in results] == [type(None), StorageFull, type(None), StorageFull, type(None)]
    assert await _names(writer) == {"one", "two", "three"}


async def test_changes_are_made_in_order_and_survive_their_callers(writer: CommitThread) -> None:
    """If the caller of a change is cancelled, the change is still made, before later changes. The cancellation takes
    effect after the change is made."""

    async def call() -> None:
        await writer.run(_add_repository("one"))

    first = asyncio.create_task(call())
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    assert first.cancelled()
    assert "one" in await _names(writer)


async def test_changes_fail_while_the_lock_cannot_be_taken(writer: CommitThread, tmp_path: Path) -> None:
    """While the thread cannot take the lock of the database's writers, changes fail with an error. When it can take the
    lock again, changes succeed."""
    path = tmp_path / "data/locks/metadata"
    (number,) = (fd for fd in map(int, os.listdir("/proc/self/fd")) if _is_descriptor_of(fd, path))
    original_lock, unlockable = os.dup(number), os.open(path, os.O_PATH)
    try:
        os.dup2(unlockable, number)  # a descriptor that cannot be locked
        results = await asyncio.gather(*(writer.run(_add_repository(name)) for name in "abc"), return_exceptions=True)
        assert [type(result) for result in results] == [StorageFailed] * 3
        os.dup2(original_lock, number)
    finally:
        os.close(original_lock)
        os.close(unlockable)
    await writer.run(_add_repository("one"))
    assert await _names(writer) == {"one"}


def _is_descriptor_of(fd: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.readlink(f"/proc/self/fd/{fd}") == str(path)
    return False


async def test_the_write_ahead_log_is_kept_short(writer: CommitThread, tmp_path: Path) -> None:
    """The write-ahead log is checkpointed while changes continue, so its size is limited."""

    def change(db: apsw.Connection) -> None:
        db.execute("INSERT OR REPLACE INTO repository (id, name, created) VALUES (1, ?, 0)", ("x" * 500_000,))

    for _ in range(60):
        await writer.run(change)
    assert (tmp_path / "data/entrepot.db-wal").stat().st_size < 20_000_000
