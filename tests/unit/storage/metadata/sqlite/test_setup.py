"""Checks of the metadata database before a server uses it."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.data_dir.layout import Layout
from storage.errors import StorageFailed
from storage.metadata.sqlite.setup import has_had_account


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    """If the file is not a SQLite database, `has_had_account` raises StorageFailed with the reason."""
    layout = Layout(tmp_path)
    layout.metadata.write_bytes(b"this is not a database" * 500)
    with pytest.raises(StorageFailed, match=r"cannot read .*entrepot\.db: file is not a database"):
        has_had_account(layout)


def test_a_missing_database(tmp_path: Path) -> None:
    """If the database file does not exist, `has_had_account` raises StorageFailed with the reason."""
    with pytest.raises(StorageFailed, match=r"cannot read .*entrepot\.db: unable to open database file"):
        has_had_account(Layout(tmp_path))
