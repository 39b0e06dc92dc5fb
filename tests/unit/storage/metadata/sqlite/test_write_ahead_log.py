"""The write-ahead log of the metadata database after a failed fsync. SQLite runs on real files here; only the fsync of
the log fails.

Linux reports a failed fsync once and then treats the bytes as written, although they are not on the disk. A later fsync
succeeds. So the tests check that the registry does not rely on the log after a failed fsync.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import apsw
import pytest

from storage.composition import prepare_data_dir
from storage.data_dir.layout import Layout
from storage.data_dir.reserve import Reserve, ReserveUse
from storage.data_dir.system import System
from storage.errors import StorageFailed, StorageFull
from storage.metadata.sqlite.commit_thread import Change, CommitThread
from storage.metadata.sqlite.cross_process_change_counter import DataVersion
from storage.metadata.sqlite.database import connect
from storage.metadata.sqlite.write_ahead_log import CHECKPOINT_LOG_PAGES, checkpoint_log_pages


class LogSyncs(apsw.VFS):
    """SQLite's view of the file system, in which the fsync of a log fails as often as `failures` says. The disk is full
    for as many writes to a database file as `full_writes` says."""

    def __init__(self) -> None:
        self.failures = self.full_writes = 0
        self.base = apsw.vfs_names()[0]
        super().__init__("failing-log-syncs", base=self.base, makedefault=True)

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> apsw.VFSFile:
        return _OpenFile(self, name, flags)


class _OpenFile(apsw.VFSFile):
    def __init__(self, syncs: LogSyncs, name: str | apsw.URIFilename | None, flags: list[int]) -> None:
        self._syncs = syncs
        self._is_log = bool(flags[0] & apsw.SQLITE_OPEN_WAL)
        super().__init__(syncs.base, name, flags)

    def xSync(self, flags: int) -> None:
        if self._is_log and self._syncs.failures:
            self._syncs.failures -= 1
            error: Any = apsw.IOError("the fsync of the log fails")
            error.result, error.extendedresult = apsw.SQLITE_IOERR, apsw.SQLITE_IOERR_FSYNC
            raise error
        super().xSync(flags)

    def xWrite(self, data: bytes, offset: int) -> None:
        if not self._is_log and self._syncs.full_writes:
            self._syncs.full_writes -= 1
            raise apsw.FullError("the disk is full")
        super().xWrite(data, offset)


@pytest.fixture
def log_syncs() -> Iterator[LogSyncs]:
    syncs = LogSyncs()
    yield syncs
    syncs.unregister()


@pytest.fixture
async def writer(tmp_path: Path, log_syncs: LogSyncs) -> AsyncIterator[CommitThread]:
    prepare_data_dir(tmp_path / "data")
    layout = Layout(tmp_path / "data")
    db = connect(layout.metadata, read_only=True)
    version = DataVersion(db)
    opened = CommitThread(layout, System(), version, Reserve(layout.reserve, System()))
    yield opened
    opened.close()
    version.close()
    db.close()


def add_repository(name: str) -> Change[None]:
    """Returns a change that adds a repository."""

    def change(db: apsw.Connection) -> None:
        db.execute("INSERT INTO repository (name, created) VALUES (?, 0)", (name,))

    return change


async def run_until_stored(writer: CommitThread, change: Change[None]) -> None:
    """Makes a change, and repeats it while the disk fails."""
    async with asyncio.timeout(60):
        while True:
            try:
                return await writer.run(change)
            except StorageFailed:
                await asyncio.sleep(0.05)


def names_without_log(data_dir: Path, copy: Path) -> set[str]:
    """Returns the repositories in the database file alone, as after a power cut that destroyed the log. `copy`: the
    path of a copy of the file, which this function makes."""
    shutil.copyfile(Layout(data_dir).metadata, copy)
    with closing(apsw.Connection(os.fspath(copy), flags=apsw.SQLITE_OPEN_READWRITE)) as db:
        return {name for (name,) in db.execute("SELECT name FROM repository")}


async def test_a_commit_after_a_failed_sync_does_not_need_the_old_log(
    writer: CommitThread, log_syncs: LogSyncs, tmp_path: Path
) -> None:
    """A commit without fsync succeeds, and the fsync of the next commit fails, so this commit is reported as failed.
    Before a third commit, the first change is copied into the database file, so that a gap in the log cannot hide the
    third commit."""
    await writer.run(add_repository("not-synced"), durable=False)
    log_syncs.failures = 1
    with pytest.raises(StorageFailed):
        await writer.run(add_repository("failed"))
    await writer.run(add_repository("later"))
    assert names_without_log(tmp_path / "data", tmp_path / "copy") == {"not-synced"}


async def test_the_log_is_empty_after_a_failed_sync(writer: CommitThread, log_syncs: LogSyncs, tmp_path: Path) -> None:
    """Before the next change, the log whose fsync failed is emptied, even if that change is rolled back. After a power
    cut, SQLite would otherwise copy the part before the gap over newer pages of the database file."""
    await writer.run(add_repository("one"))
    log_syncs.failures = 1
    with pytest.raises(StorageFailed):
        await writer.run(add_repository("failed"))
    with pytest.raises(StorageFailed):
        await writer.run(add_repository("one"))  # there is a repository with this name
    assert Path(f"{Layout(tmp_path / 'data').metadata}-wal").stat().st_size == 0  # noqa: ASYNC240


async def test_a_failed_sync_on_a_full_disk(writer: CommitThread, log_syncs: LogSyncs, tmp_path: Path) -> None:
    """If the disk is full when the earlier changes are copied into the database file, a change that may use the reserve
    copies them with space from the reserve."""
    await writer.run(add_repository("one"))
    log_syncs.failures = 1
    with pytest.raises(StorageFailed):
        await writer.run(add_repository("failed"))
    log_syncs.full_writes = 1
    with pytest.raises(StorageFull):
        await writer.run(add_repository("refused"))
    log_syncs.full_writes = 1
    async with asyncio.timeout(60):
        await writer.run(lambda db: db.execute("DELETE FROM repository").fetchall(), reserve_use=ReserveUse.ALL)
    assert names_without_log(tmp_path / "data", tmp_path / "copy") == set()


@pytest.mark.slow
async def test_a_failed_sync_of_a_checkpoint_is_noticed(
    writer: CommitThread, log_syncs: LogSyncs, tmp_path: Path
) -> None:
    """If the fsync of the log fails in a checkpoint, the next commit does not rely on that log either."""

    def add_large_repository(db: apsw.Connection) -> None:
        db.execute("INSERT INTO repository (name, created) VALUES (?, 0)", ("x" * CHECKPOINT_LOG_PAGES * 4096,))

    await writer.run(add_repository("first"))  # SQLite syncs the log at the first commit, whatever `durable` is
    log_syncs.failures = 1
    await writer.run(add_large_repository, durable=False)
    await writer.run(add_repository("later"))
    assert log_syncs.failures == 0
    assert "x" * CHECKPOINT_LOG_PAGES * 4096 in names_without_log(tmp_path / "data", tmp_path / "copy")


@pytest.mark.slow
async def test_no_commit_succeeds_while_the_old_log_is_needed(
    writer: CommitThread, log_syncs: LogSyncs, tmp_path: Path
) -> None:
    """While a reader needs the log whose fsync failed, changes fail. They succeed after the reader has ended."""
    await writer.run(add_repository("one"))
    with closing(connect(Layout(tmp_path / "data").metadata, read_only=True)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM repository").fetchall()
        await writer.run(add_repository("two"))
        log_syncs.failures = 1
        with pytest.raises(StorageFailed):
            await writer.run(add_repository("failed"))
        with pytest.raises(StorageFailed, match="accepts no change until"):
            await writer.run(add_repository("refused"))
        reader.execute("ROLLBACK")
    await run_until_stored(writer, add_repository("three"))
    assert names_without_log(tmp_path / "data", tmp_path / "copy") == {"one", "two"}


def test_checkpoints_without_a_reserve_run_as_often_as_with_a_large_one() -> None:
    """A file system that does not tell its size has an empty reserve. Then not every commit is followed by a
    checkpoint."""
    assert checkpoint_log_pages(0) == CHECKPOINT_LOG_PAGES
