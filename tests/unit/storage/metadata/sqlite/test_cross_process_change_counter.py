"""The data version of a database: a value that changes with every commit of any process."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import apsw
import pytest

from storage.metadata.sqlite.cross_process_change_counter import (
    DataVersion,
    PragmaDataVersion,
    UnknownLayout,
    is_exactly_one_commit_later,
    open_data_version,
)
from storage.metadata.sqlite.database import connect

COUNT = "SELECT count(*) FROM word"
INSERT = "INSERT INTO word VALUES ('more')"


@pytest.fixture
def reading(file: Path) -> Iterator[apsw.Connection]:
    db = connect(file, read_only=True)
    yield db
    db.close()


@pytest.fixture
def version(reading: apsw.Connection) -> Iterator[DataVersion]:
    version = DataVersion(reading)
    yield version
    version.close()


def test_reading_changes_nothing(version: DataVersion, reading: apsw.Connection, writing: apsw.Connection) -> None:
    """A read, a transaction that is rolled back, and one that is still open do not change the data version."""
    before = version()
    assert reading.execute(COUNT).get == 0
    assert version() == before
    writing.execute("BEGIN IMMEDIATE")
    writing.execute(INSERT)
    assert version() == before
    writing.execute("ROLLBACK")
    assert version() == before


def test_a_commit_changes_it_before_it_returns(
    version: DataVersion, reading: apsw.Connection, writing: apsw.Connection
) -> None:
    """Each commit gives a new data version, and readers with this version see the commit."""
    seen = {version()}
    for number in range(1, 50):
        writing.execute(INSERT)
        mark = version()
        assert mark not in seen
        seen.add(mark)
        assert reading.execute(COUNT).get == number


@pytest.mark.parametrize(
    "mode", [apsw.SQLITE_CHECKPOINT_PASSIVE, apsw.SQLITE_CHECKPOINT_RESTART, apsw.SQLITE_CHECKPOINT_TRUNCATE]
)
def test_a_commit_changes_it_after_a_checkpoint(version: DataVersion, writing: apsw.Connection, mode: int) -> None:
    """A commit changes the data version also if the log starts again, so that it is as long as before."""
    seen = {version()}
    for _ in range(20):
        writing.execute(INSERT)
        assert version() not in seen
        seen.add(version())
        writing.wal_checkpoint(mode=mode)
        seen.add(version())


def test_a_commit_of_another_process_changes_it(version: DataVersion, reading: apsw.Connection, file: Path) -> None:
    """The data version has changed by the time at which the other process says that it has committed."""
    script = (
        "import sys; from pathlib import Path; from storage.metadata.sqlite.database import connect\n"
        "db = connect(Path(sys.argv[1]))\n"
        f"for line in sys.stdin: db.execute({INSERT!r}); print(flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin
        assert other.stdout
        for number in range(1, 20):
            before = version()
            other.stdin.write("\n")
            other.stdin.flush()
            other.stdout.readline()
            assert version() != before
            assert reading.execute(COUNT).get == number
        other.stdin.close()


def test_a_writer_that_was_killed_is_no_trouble(version: DataVersion, file: Path, writing: apsw.Connection) -> None:
    """A killed process that has not committed leaves the data version as it was. The next commit of another process
    changes it."""
    script = (
        "import os, signal, sys; from pathlib import Path; from storage.metadata.sqlite.database import connect\n"
        "db = connect(Path(sys.argv[1])); db.execute('BEGIN IMMEDIATE')\n"
        f"db.execute({INSERT!r}); os.kill(os.getpid(), signal.SIGKILL)"
    )
    before = version()
    assert subprocess.run([sys.executable, "-c", script, str(file)]).returncode == -signal.SIGKILL
    assert version() == before
    writing.execute(INSERT)
    assert version() != before


def test_a_commit_that_was_cut_in_its_middle_shows(version: DataVersion, reading: apsw.Connection, file: Path) -> None:
    """If a writer dies between the two copies of the header, only the second copy has the commit. SQLite's readers see
    the commit from then on, so the data version has to change."""
    before = version()
    with open(f"{file}-shm", "r+b") as shared:
        # Where the second copy counts the commits. Closing the file would drop this process's locks on it.
        descriptor = os.dup(shared.fileno())
    try:
        assert os.pread(descriptor, 4, 8) == os.pread(descriptor, 4, 48 + 8)
        os.pwrite(descriptor, b"\xff\xff\xff\x7f", 48 + 8)
        assert version() != before
    finally:
        os.close(descriptor)


def test_it_stays_while_other_connections_come_and_go(
    version: DataVersion, reading: apsw.Connection, file: Path
) -> None:
    """The data version stays readable while other connections of the process are opened and closed, because their
    shared memory exists until the last one is closed."""
    seen = {version()}
    for number in range(1, 20):
        other = connect(file)
        other.execute(INSERT)
        other.close()
        assert version() not in seen
        seen.add(version())
        assert reading.execute(COUNT).get == number


def test_a_long_log_changes_nothing_about_it(
    version: DataVersion, reading: apsw.Connection, writing: apsw.Connection
) -> None:
    """With a long log, the index of the log needs more shared memory. The header stays in its place."""
    writing.pragma("synchronous", "OFF")
    seen = {version()}
    for number in range(1, 7):
        writing.execute("INSERT INTO word VALUES (zeroblob(8000000))")
        assert version() not in seen
        seen.add(version())
        assert reading.execute(COUNT).get == number
    assert file_size(writing) > 40_000_000


def file_size(db: apsw.Connection) -> int:
    """Returns the size of the log in bytes."""
    return Path(db.filename_wal).stat().st_size


def test_once_closed_nothing_is_the_same(reading: apsw.Connection) -> None:
    """After the connection was closed, each call returns another value, so that everything counts as changed."""
    version = DataVersion(reading)
    version.close()
    assert version() != version()


def test_a_database_without_a_log_has_none(tmp_path: Path) -> None:
    """A database without a write-ahead log is refused at the start, and not when the version is read."""
    db = apsw.Connection(str(tmp_path / "plain.db"))
    db.execute("CREATE TABLE word (text TEXT)")
    with pytest.raises(apsw.CantOpenError, match="write-ahead log"):
        DataVersion(db)
    db.close()


def test_one_commit_is_told_from_none_and_from_several(version: DataVersion, writing: apsw.Connection) -> None:
    """Two data versions, the first read inside the transaction, tell whether exactly one commit lies between them,
    whatever happens to the log."""
    for checkpoint in (None, apsw.SQLITE_CHECKPOINT_RESTART, apsw.SQLITE_CHECKPOINT_TRUNCATE):
        if checkpoint is not None:
            writing.wal_checkpoint(mode=checkpoint)  # the next transaction begins the log anew
        writing.execute("BEGIN IMMEDIATE")
        before = version()
        writing.execute(INSERT)
        assert not is_exactly_one_commit_later(before, version())
        writing.execute("COMMIT")
        after = version()
        assert is_exactly_one_commit_later(before, after)
        writing.execute(INSERT)
        assert not is_exactly_one_commit_later(before, version())
        assert is_exactly_one_commit_later(after, version())


def test_nothing_follows_a_mark_that_is_none(version: DataVersion, writing: apsw.Connection) -> None:
    """If one of the versions was read after the close, the result is that it is not exactly one commit."""
    before = version()
    version.close()
    writing.execute(INSERT)
    assert not is_exactly_one_commit_later(before, version())
    assert not is_exactly_one_commit_later(version(), version())
    assert not is_exactly_one_commit_later(None, before)


@pytest.fixture
def moved(version: DataVersion) -> Callable[[apsw.Connection], int]:
    """Returns where the header would be in a SQLite that puts other data before it."""
    mark = version()
    assert isinstance(mark, bytes)
    memory = ctypes.create_string_buffer(bytes(8) + mark)
    found: Callable[[apsw.Connection], int] = lambda _: ctypes.addressof(memory)  # noqa: E731
    found.__dict__["memory"] = memory
    return found


@pytest.mark.parametrize("place", [0, 12, 14, 16, 44])
def test_a_header_of_another_layout_is_not_read(version: DataVersion, reading: apsw.Connection, place: int) -> None:
    """A header with another format, page size or checksum, in both copies, is refused by the check at the start."""
    mark = version()
    assert isinstance(mark, bytes)
    header = bytearray(mark)
    for copy in (0, 48):
        header[copy + place] ^= 0xFF
    memory = ctypes.create_string_buffer(bytes(header))
    with pytest.raises(UnknownLayout):
        DataVersion(reading, lambda _: ctypes.addressof(memory))


def test_without_a_known_layout_sqlite_is_asked(
    moved: Callable[[apsw.Connection], int],
    reading: apsw.Connection,
    writing: apsw.Connection,
    file: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """If the layout is unknown, SQLite is asked: each commit changes the version, and reading does not. The versions of
    two threads are never equal."""
    version = open_data_version(reading, lambda: connect(file, read_only=True), moved)
    assert isinstance(version, PragmaDataVersion)
    assert "unknown layout" in caplog.text
    for number in range(1, 10):
        before = version()
        assert version() == before
        writing.execute(INSERT)
        assert version() != before
        assert not is_exactly_one_commit_later(before, version())
        assert reading.execute(COUNT).get == number
    elsewhere: list[object] = []
    thread = threading.Thread(target=lambda: elsewhere.append(version()))
    thread.start()
    thread.join()
    assert elsewhere != [version()]
    version.close()
    assert version() != version()
