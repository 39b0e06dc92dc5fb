"""Lookups in one turn of the event loop share a read transaction."""

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

COUNT = "SELECT count(*) FROM word"
INSERT = "INSERT INTO word VALUES ('more')"


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


async def test_look_ups_of_a_turn_share_a_transaction(reading: SharedReadTransaction, version: DataVersion) -> None:
    """The transaction ends with the turn, even if the next turn has a lookup as well."""
    first = reading.connection_at(version())
    assert first.execute(COUNT).get == 0
    assert first.in_transaction
    assert reading.connection_at(version()) is first
    await asyncio.sleep(0)
    assert not first.in_transaction
    assert reading.connection_at(version()).in_transaction
    await asyncio.sleep(0)
    assert not first.in_transaction


async def test_a_commit_is_seen_in_the_same_turn(
    reading: SharedReadTransaction, version: DataVersion, writing: apsw.Connection
) -> None:
    """A lookup sees every commit before it, also one in the same turn."""
    for number in range(20):
        for _ in range(2):
            assert reading.connection_at(version()).execute(COUNT).get == number
        writing.execute(INSERT)
        assert reading.connection_at(version()).execute(COUNT).get == number + 1
        if number % 3 == 0:
            await asyncio.sleep(0)


async def test_a_commit_of_another_process_is_seen_in_the_same_turn(
    reading: SharedReadTransaction, version: DataVersion, file: Path
) -> None:
    assert reading.connection_at(version()).execute(COUNT).get == 0
    script = f"import apsw, sys; apsw.Connection(sys.argv[1]).execute({INSERT!r})"
    subprocess.run([sys.executable, "-c", script, file], check=True, timeout=30)  # noqa: ASYNC221  in the same turn
    assert reading.connection_at(version()).execute(COUNT).get == 1


async def test_the_log_can_begin_anew_after_the_turn(
    reading: SharedReadTransaction, version: DataVersion, writing: apsw.Connection
) -> None:
    """The read transaction keeps the log from starting again only until the end of the turn."""
    writing.set_busy_timeout(0)
    writing.execute(INSERT)
    reading.connection_at(version()).execute(COUNT).get  # noqa: B018  reads
    with pytest.raises(apsw.BusyError):
        writing.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_RESTART)
    await asyncio.sleep(0)
    writing.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_RESTART)


async def test_after_an_error_it_goes_on(
    reading: SharedReadTransaction, version: DataVersion, writing: apsw.Connection
) -> None:
    """After an error in a statement, lookups work in the same turn and in later ones."""
    for _ in range(2):
        with pytest.raises(apsw.SQLError):
            reading.connection_at(version()).execute("SELECT nothing")
        assert reading.connection_at(version()).execute(COUNT).get == 0
        await asyncio.sleep(0)
    writing.execute(INSERT)
    assert reading.connection_at(version()).execute(COUNT).get == 1


async def test_closed_in_a_turn(reading: SharedReadTransaction, version: DataVersion, writing: apsw.Connection) -> None:
    """If the connection is closed in the middle of a turn, the read transaction ends, and no error follows at the end
    of the turn."""
    complaints: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    writing.execute(INSERT)
    reading.connection_at(version()).execute(COUNT).get  # noqa: B018  reads
    reading.close()
    writing.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_RESTART)
    await asyncio.sleep(0.01)
    assert complaints == []
