"""The data version of a database: a value that changes with every commit of any process. It is read from the index of
SQLite's write-ahead log, which is in shared memory."""

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

COUNT_WORDS = "SELECT count(*) FROM word"
INSERT_WORD = "INSERT INTO word VALUES ('more')"


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


def test_reads_and_rollbacks_do_not_change_the_version(
    version: DataVersion, reading: apsw.Connection, writing: apsw.Connection
) -> None:
    """The data version is not changed by a read, by a transaction that is rolled back, or by a transaction that is
    still open."""
    version_before = version()
    assert reading.execute(COUNT_WORDS).get == 0
    assert version() == version_before
    writing.execute("BEGIN IMMEDIATE")
    writing.execute(INSERT_WORD)
    assert version() == version_before
    writing.execute("ROLLBACK")
    assert version() == version_before


def test_a_commit_changes_the_version_before_it_returns(
    version: DataVersion, reading: apsw.Connection, writing: apsw.Connection
) -> None:
    """When a commit returns, the data version is new, and readers see the committed rows."""
    earlier_versions = {version()}
    for number in range(1, 50):
        writing.execute(INSERT_WORD)
        header_version = version()
        assert header_version not in earlier_versions
        earlier_versions.add(header_version)
        assert reading.execute(COUNT_WORDS).get == number


@pytest.mark.parametrize(
    "mode", [apsw.SQLITE_CHECKPOINT_PASSIVE, apsw.SQLITE_CHECKPOINT_RESTART, apsw.SQLITE_CHECKPOINT_TRUNCATE]
)
def test_a_commit_after_a_checkpoint_changes_the_version(
    version: DataVersion, writing: apsw.Connection, mode: int
) -> None:
    """A commit changes the data version also after a checkpoint, when the log starts again from its beginning and may
    have the same length as before."""
    earlier_versions = {version()}
    for _ in range(20):
        writing.execute(INSERT_WORD)
        assert version() not in earlier_versions
        earlier_versions.add(version())
        writing.wal_checkpoint(mode=mode)
        earlier_versions.add(version())


def test_a_commit_of_another_process_changes_the_version(
    version: DataVersion, reading: apsw.Connection, file: Path
) -> None:
    """When another process reports that it has committed, the data version has changed already."""
    script = (
        "import sys; from pathlib import Path; from storage.metadata.sqlite.database import connect\n"
        "db = connect(Path(sys.argv[1]))\n"
        f"for line in sys.stdin: db.execute({INSERT_WORD!r}); print(flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin
        assert other.stdout
        for number in range(1, 20):
            version_before = version()
            other.stdin.write("\n")
            other.stdin.flush()
            other.stdout.readline()
            assert version() != version_before
            assert reading.execute(COUNT_WORDS).get == number
        other.stdin.close()


def test_a_killed_writer_does_not_change_the_version(
    version: DataVersion, file: Path, writing: apsw.Connection
) -> None:
    """If a process is killed before it commits, the data version does not change. The next commit of another process
    changes it."""
    script = (
        "import os, signal, sys; from pathlib import Path; from storage.metadata.sqlite.database import connect\n"
        "db = connect(Path(sys.argv[1])); db.execute('BEGIN IMMEDIATE')\n"
        f"db.execute({INSERT_WORD!r}); os.kill(os.getpid(), signal.SIGKILL)"
    )
    version_before = version()
    assert subprocess.run([sys.executable, "-c", script, str(file)]).returncode == -signal.SIGKILL
    assert version() == version_before
    writing.execute(INSERT_WORD)
    assert version() != version_before


def test_a_half_written_header_changes_the_version(version: DataVersion, reading: apsw.Connection, file: Path) -> None:
    """The index of the log begins with two copies of a header. If a writer dies between the writes of the two copies,
    only one copy has the commit. Readers may see the commit from then on, so the data version must change."""
    version_before = version()
    with open(f"{file}-shm", "r+b") as shared:
        # The descriptor is duplicated, because closing the file would drop this process's locks on it.
        descriptor = os.dup(shared.fileno())
    try:
        assert os.pread(descriptor, 4, 8) == os.pread(descriptor, 4, 48 + 8)
        os.pwrite(descriptor, b"\xff\xff\xff\x7f", 48 + 8)  # the count of commits in the second copy
        assert version() != version_before
    finally:
        os.close(descriptor)


def test_the_version_is_readable_while_other_connections_are_closed(
    version: DataVersion, reading: apsw.Connection, file: Path
) -> None:
    """The data version can be read while other connections of the process are opened and closed, because the shared
    memory exists until the last connection is closed."""
    earlier_versions = {version()}
    for number in range(1, 20):
        other = connect(file)
        other.execute(INSERT_WORD)
        other.close()
        assert version() not in earlier_versions
        earlier_versions.add(version())
        assert reading.execute(COUNT_WORDS).get == number


@pytest.mark.slow
def test_the_version_is_readable_with_a_long_log(
    version: DataVersion, reading: apsw.Connection, writing: apsw.Connection
) -> None:
    """The index of a long log needs more shared memory. The header stays at the same address, so the data version can
    still be read."""
    writing.pragma("synchronous", "OFF")
    earlier_versions = {version()}
    for number in range(1, 7):
        writing.execute("INSERT INTO word VALUES (zeroblob(8000000))")
        assert version() not in earlier_versions
        earlier_versions.add(version())
        assert reading.execute(COUNT_WORDS).get == number
    assert log_size(writing) > 40_000_000


def log_size(db: apsw.Connection) -> int:
    """Returns the size of the log in bytes."""
    return Path(db.filename_wal).stat().st_size


def test_after_close_every_version_differs(reading: apsw.Connection) -> None:
    """After `close`, each call returns a new value, so that the database always counts as changed."""
    version = DataVersion(reading)
    version.close()
    assert version() != version()


def test_a_database_without_a_write_ahead_log_is_refused(tmp_path: Path) -> None:
    """`DataVersion` refuses a database without a write-ahead log when it is created, not when the version is read."""
    db = apsw.Connection(str(tmp_path / "plain.db"))
    db.execute("CREATE TABLE word (text TEXT)")
    with pytest.raises(apsw.CantOpenError, match="write-ahead log"):
        DataVersion(db)
    db.close()


def test_exactly_one_commit_between_two_versions(version: DataVersion, writing: apsw.Connection) -> None:
    """One data version is read inside a transaction, and another one later. The two versions tell whether there was
    exactly one commit between them, also if the log starts again from its beginning."""
    for checkpoint in (None, apsw.SQLITE_CHECKPOINT_RESTART, apsw.SQLITE_CHECKPOINT_TRUNCATE):
        if checkpoint is not None:
            writing.wal_checkpoint(mode=checkpoint)  # the next transaction starts the log again from its beginning
        writing.execute("BEGIN IMMEDIATE")
        version_before = version()
        writing.execute(INSERT_WORD)
        assert not is_exactly_one_commit_later(version_before, version())
        writing.execute("COMMIT")
        version_after = version()
        assert is_exactly_one_commit_later(version_before, version_after)
        writing.execute(INSERT_WORD)
        assert not is_exactly_one_commit_later(version_before, version())
        assert is_exactly_one_commit_later(version_after, version())


def test_versions_after_close_never_count_as_one_commit(version: DataVersion, writing: apsw.Connection) -> None:
    """If one of the two versions was read after `close`, the function does not report exactly one commit."""
    version_before = version()
    version.close()
    writing.execute(INSERT_WORD)
    assert not is_exactly_one_commit_later(version_before, version())
    assert not is_exactly_one_commit_later(version(), version())
    assert not is_exactly_one_commit_later(None, version_before)


@pytest.fixture
def moved_header_address(version: DataVersion) -> Callable[[apsw.Connection], int]:
    """Returns a function that finds the address of a header which does not have the known layout, because 8 more bytes
    are in front of it."""
    header_version = version()
    assert isinstance(header_version, bytes)
    memory = ctypes.create_string_buffer(bytes(8) + header_version)
    find_address: Callable[[apsw.Connection], int] = lambda _: ctypes.addressof(memory)  # noqa: E731
    find_address.__dict__["memory"] = memory  # keeps the memory alive
    return find_address


@pytest.mark.parametrize("changed_byte", [0, 12, 14, 16, 44])
def test_a_header_with_an_unknown_layout_is_refused(
    version: DataVersion, reading: apsw.Connection, changed_byte: int
) -> None:
    """If both copies of the header have an unknown format, page size or checksum, `DataVersion` raises an error when it
    is created."""
    header_version = version()
    assert isinstance(header_version, bytes)
    header = bytearray(header_version)
    for copy in (0, 48):
        header[copy + changed_byte] ^= 0xFF
    memory = ctypes.create_string_buffer(bytes(header))
    with pytest.raises(UnknownLayout):
        DataVersion(reading, lambda _: ctypes.addressof(memory))


def test_pragma_is_used_if_the_layout_is_unknown(
    moved_header_address: Callable[[apsw.Connection], int],
    reading: apsw.Connection,
    writing: apsw.Connection,
    file: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """If the layout of the header is unknown, the version is read with `PRAGMA data_version`. Each commit changes it,
    and reads do not. The versions of two threads are never equal."""
    version = open_data_version(reading, lambda: connect(file, read_only=True), moved_header_address)
    assert isinstance(version, PragmaDataVersion)
    assert "unknown layout" in caplog.text
    for number in range(1, 10):
        version_before = version()
        assert version() == version_before
        writing.execute(INSERT_WORD)
        assert version() != version_before
        assert not is_exactly_one_commit_later(version_before, version())
        assert reading.execute(COUNT_WORDS).get == number
    versions_in_thread: list[object] = []
    thread = threading.Thread(target=lambda: versions_in_thread.append(version()))
    thread.start()
    thread.join()
    assert versions_in_thread != [version()]
    version.close()
    assert version() != version()
