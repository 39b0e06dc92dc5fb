"""Fixtures of the storage tests: a data directory, a registry over it, and a small SQLite database."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import apsw
import pytest

from storage.composition import open_registry, prepare_data_dir
from storage.metadata.sqlite.database import connect, create
from storage.store.stored_registry import StoredRegistry
from tests.fakes.partial_peer import BOOT


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A prepared data directory."""
    prepare_data_dir(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
async def registry(data: Path) -> AsyncIterator[StoredRegistry]:
    async with open_registry(data, boot=BOOT) as opened:
        yield opened


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Returns the path of a SQLite database with a write-ahead log and a table `word` with one column."""
    db = create(tmp_path / "some.db")
    db.execute("CREATE TABLE word (text TEXT)")
    db.close()
    return tmp_path / "some.db"


@pytest.fixture
def writing(file: Path) -> Iterator[apsw.Connection]:
    """A connection to the database `file` that may change it."""
    db = connect(file)
    yield db
    db.close()
