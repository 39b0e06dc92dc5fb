"""The registry's store is opened without blocking the event loop."""

from __future__ import annotations

import asyncio
from pathlib import Path

import apsw
import pytest

from storage.composition import layout_of, open_registry, prepare_data_dir
from tests.fakes.open_files import open_files_below
from tests.fakes.second_connection import second_connection


def lock_database(data: Path) -> apsw.Connection:
    """Locks the database exclusively, as another program may do. The lock ends when the returned connection is
    closed."""
    db = second_connection(layout_of(data).metadata)
    db.pragma("locking_mode", "exclusive")
    db.execute("BEGIN EXCLUSIVE; COMMIT")
    return db


async def test_opening_waits_for_a_locked_database(tmp_path: Path) -> None:
    """While another program has locked the database, opening the store waits. The event loop keeps running meanwhile:
    this test runs on the same loop, and closes the connection that holds the lock."""
    prepare_data_dir(tmp_path)
    locking_connection = lock_database(tmp_path)
    context = open_registry(tmp_path)
    opening = asyncio.create_task(context.__aenter__())
    await asyncio.sleep(0.05)
    assert not opening.done()
    locking_connection.close()
    registry = await opening
    assert (await registry.repositories(None, 1)).items == []
    await context.__aexit__(None, None, None)


async def test_a_cancelled_open_leaves_no_file_open(tmp_path: Path) -> None:
    """If the task that opens the store is cancelled while SQLite waits for a lock, the task ends when the lock is
    released. No file stays open."""
    prepare_data_dir(tmp_path)
    open_files_before = open_files_below(tmp_path)
    locking_connection = lock_database(tmp_path)
    opening = asyncio.create_task(open_registry(tmp_path).__aenter__())
    await asyncio.sleep(0.05)
    opening.cancel()
    await asyncio.sleep(0)
    assert not opening.done()
    locking_connection.close()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert open_files_below(tmp_path) == open_files_before
