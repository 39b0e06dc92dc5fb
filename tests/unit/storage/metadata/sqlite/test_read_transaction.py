"""All lookups in one iteration of the event loop share a read transaction. Tests start a new iteration with
`asyncio.sleep(0)`."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from storage.metadata.sqlite.cross_process_change_counter import DataVersion
from storage.metadata.sqlite.read_transaction import SharedReadTransaction

COUNT_WORDS = "SELECT count(*) FROM word"
INSERT_WORD = "INSERT INTO word VALUES ('more')"


@pytest.fixture
def version(writing: apsw.Connection) -> Iterator[DataVersion]:
    version = DataVersion(writing)
    yield version
    version.close()


@pytest.fixture
def reading(file: Path) -> Iterator[SharedReadTransaction]:
    reading = SharedReadTransaction(file)
    yield reading
    reading.close()


async def test_lookups_of_an_iteration_share_a_transaction(
    reading: SharedReadTransaction, version: DataVersion
) -> None:
    """The read transaction ends with the iteration of the event loop, even if there is a lookup in the next iteration
    as well."""
    connection = reading.connection_at(version())
    assert connection.execute(COUNT_WORDS).get == 0
    assert connection.in_transaction
    assert reading.connection_at(version()) is connection
    await asyncio.sleep(0)
    assert not connection.in_transaction
    assert reading.connection_at(version()).in_transaction
    await asyncio.sleep(0)
    assert not connection.in_transaction


async def test_a_commit_is_seen_in_the_same_iteration(
    reading: SharedReadTransaction, version: DataVersion, writing: apsw.Connection
) -> None:
    """A lookup sees every earlier commit, also a commit in the same iteration of the event loop."""
    for number in range(20):
        for _ in range(2):
            assert reading.connection_at(version()).execute(COUNT_WORDS).get == number
        writing.execute(INSERT_WORD)
        assert reading.connection_at(version()).execute(COUNT_WORDS).get == number + 1
        if number % 3 == 0:
            await asyncio.sleep(0)


async def test_a_commit_of_another_process_is_seen_in_the_same_iteration(
    reading: SharedReadTransaction, version: DataVersion, file: Path
) -> None:
    """A lookup sees an earlier commit of another process in the same iteration of the event loop."""
    assert reading.connection_at(version()).execute(COUNT_WORDS).get == 0
    script = f"import apsw, sys; apsw.Connection(sys.argv[1]).execute({INSERT_WORD!r})"
    # This blocks the event loop, so both lookups are in the same iteration.
    subprocess.run([sys.executable, "-c", script, file], check=True, timeout=30)  # noqa: ASYNC221
    assert reading.connection_at(version()).execute(COUNT_WORDS).get == 1


async def test_the_log_can_start_again_after_the_iteration(
    reading: SharedReadTransaction, version: DataVersion, writing: apsw.Connection
) -> None:
    """During the read transaction, the write-ahead log cannot start again from its beginning. It can do so again at the
    end of the event loop's iteration."""
    writing.set_busy_timeout(0)
    writing.execute(INSERT_WORD)
    reading.connection_at(version()).execute(COUNT_WORDS).get  # noqa: B018  reads
    with pytest.raises(apsw.BusyError):
        writing.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_RESTART)
    await asyncio.sleep(0)
    writing.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_RESTART)


async def test_lookups_work_after_an_error(
    reading: SharedReadTransaction, version: DataVersion, writing: apsw.Connection
) -> None:
    """After an error in a statement, lookups work in the same iteration of the event loop and in later ones."""
    for _ in range(2):
        with pytest.raises(apsw.SQLError):
            reading.connection_at(version()).execute("SELECT nothing")
        assert reading.connection_at(version()).execute(COUNT_WORDS).get == 0
        await asyncio.sleep(0)
    writing.execute(INSERT_WORD)
    assert reading.connection_at(version()).execute(COUNT_WORDS).get == 1


async def test_close_in_the_middle_of_an_iteration(
    reading: SharedReadTransaction, version: DataVersion, writing: apsw.Connection
) -> None:
    """If the connection is closed in the middle of an iteration of the event loop, the read transaction ends. At the
    end of the iteration, no error occurs."""
    loop_errors: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: loop_errors.append(context))
    writing.execute(INSERT_WORD)
    reading.connection_at(version()).execute(COUNT_WORDS).get  # noqa: B018  reads
    reading.close()
    writing.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_RESTART)
    await asyncio.sleep(0.01)
    assert loop_errors == []
