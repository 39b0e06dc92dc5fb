"""Detects that an operator has replaced the data directory that this process opened (`OpenedDirectory`), for example by
restoring a backup beside a running server.

The process then still has the old database open, but finds the new directory's files at the paths of blobs. Garbage
collection could delete blobs that the new database needs, and a push would be lost with the old database. So each
change first checks the directory. This check takes two microseconds. SQLite's own check (SQLITE_READONLY_DBMOVED) does
not work with a write-ahead log.
"""

from __future__ import annotations

import os

from storage.data_dir.blocking_calls import as_storage_errors
from storage.data_dir.layout import Layout
from storage.errors import DataDirectoryReplaced


class OpenedDirectory:
    """Remembers which database was in the data directory of `layout` when this object was created. Create the object
    before you open the database; otherwise a replacement between the two steps stays undetected."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._database_path = str(layout.metadata)
        self._opened_identity = self._read_identity()

    def check(self) -> None:
        """Raises DataDirectoryReplaced if `problem` returns a text, and StorageFailed if the directory cannot be read.
        Blocks."""
        with as_storage_errors():
            if self.problem() is not None:
                raise DataDirectoryReplaced

    def problem(self) -> str | None:
        """Returns what is wrong and what to do, if the database at the path is missing or is not the one that was there
        when this object was created. Otherwise returns None. Also returns None if there was no database at that time.
        Blocks. Raises OSError."""
        identity = self._read_identity()
        if self._opened_identity in (None, identity):
            return None
        is_restoring = self._layout.restore_marker.exists()
        if identity is None and self._layout.uploads.exists() and not is_restoring:  # only the database is gone
            return (
                f"{self._database_path} was deleted or moved away while this process used it; do not stop the server: "
                f"first put the file back, or copy it and its -wal file from /proc/{os.getpid()}/fd"
            )
        return f"{self._layout.root} was moved away or replaced while this process used it; restart the server"

    def _read_identity(self) -> tuple[int, int] | None:
        """Returns the device and the inode of the database file; None if there is none."""
        try:
            status = os.stat(self._database_path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return status.st_dev, status.st_ino
