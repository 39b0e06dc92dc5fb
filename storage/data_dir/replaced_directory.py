"""`OpenedDirectory`: notices that another data directory is at the path of the one that a process has opened, for
example because an operator has restored a backup beside a running server.

The process then has the old database open, but finds the blobs by their paths, and these are the blobs of the other
directory. Garbage collection by the old database would delete blobs that the new one needs.
"""

from __future__ import annotations

import os

from storage.data_dir.layout import Layout


class OpenedDirectory:
    """The data directory of `layout`, as it was when this object was made."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._database = self._read_identity()

    def problem(self) -> str | None:
        """Returns what is wrong if another data directory, or none, is at the path now; None if nothing is. Blocks."""
        if self._database is None or self._database == self._read_identity():
            return None
        return f"{self._layout.root} was moved away or replaced while this process used it; restart the server"

    def _read_identity(self) -> tuple[int, int] | None:
        """Returns the device and the inode of the database file; None if there is none."""
        try:
            status = os.stat(self._layout.metadata)
        except FileNotFoundError:
            return None
        return status.st_dev, status.st_ino
