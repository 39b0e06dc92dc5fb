"""Notices that another data directory has taken the place of the opened one (`OpenedDirectory`), for example because an
operator has restored a backup beside a running server.

The process then still uses the old database, which it has open, but the paths of blobs lead to the other directory.
Garbage collection by the old database would delete blobs that the new one needs. A push would be recorded only in the
old database, which nobody opens again. So each change checks first that the directory is still the opened one. This
check is one `stat` of the database file, which takes two microseconds. SQLite's own check (SQLITE_READONLY_DBMOVED)
does not work with a write-ahead log.
"""

from __future__ import annotations

import os

from storage.data_dir.blocking_calls import as_storage_errors
from storage.data_dir.layout import Layout
from storage.errors import DataDirectoryReplaced


class OpenedDirectory:
    """The data directory of `layout`, as it was when this object was made. Make the object before the database is
    opened, so that a replacement between these two moments is noticed, too."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._database_path = str(layout.metadata)
        self._database = self._read_identity()

    def check(self) -> None:
        """Raises DataDirectoryReplaced if `problem` returns a text, StorageFailed if the directory cannot be read.
        Blocks."""
        with as_storage_errors():
            if self.problem() is not None:
                raise DataDirectoryReplaced

    def problem(self) -> str | None:
        """Returns what is wrong if another data directory, or none, is at the path now. Returns None if the directory
        is still the opened one, or if it had no database when this object was made. Blocks. Raises OSError."""
        database = self._read_identity()
        if self._database in (None, database):
            return None
        is_restoring = self._layout.restore_marker.exists()
        if database is None and self._layout.uploads.exists() and not is_restoring:  # only the database is gone
            return (
                f"{self._database_path} was deleted or moved away while this process used it; do not stop the server: "
                f"first put the file back, or copy it and its -wal from /proc/{os.getpid()}/fd"
            )
        return f"{self._layout.root} was moved away or replaced while this process used it; restart the server"

    def _read_identity(self) -> tuple[int, int] | None:
        """Returns the device and the inode of the database file; None if there is none."""
        try:
            status = os.stat(self._database_path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return status.st_dev, status.st_ino
