"""Brings the database to this version's tables: numbered SQL files, one transaction each."""

from __future__ import annotations

import re
from importlib import resources

import apsw

from storage.data_directory import DataDirectoryError


def steps() -> list[tuple[int, str]]:
    """The migrations, by number: (number, SQL)."""
    found = []
    for file in resources.files("storage.metadata.migrations").iterdir():
        if match := re.fullmatch(r"(\d{4})_\w+\.sql", file.name):
            found.append((int(match[1]), file.read_text()))
    return sorted(found)


def migrate(db: apsw.Connection) -> None:
    """Applies what is missing. The caller holds the writers' lock. Raises DataDirectoryError when the database was
    written by a newer version."""
    have = db.pragma("user_version")
    known = steps()
    newest = known[-1][0]
    if have > newest:
        raise DataDirectoryError(
            f"{db.filename} was written by a newer Entrepot (its tables have version {have}, this one knows {newest}); "
            "start that version, or use another --data directory"
        )
    for number, sql in known:
        if number > have:
            db.execute(f"BEGIN IMMEDIATE; {sql}; PRAGMA user_version = {number}; COMMIT")
