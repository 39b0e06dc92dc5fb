"""The trash directory: the files of deleted blobs wait there until they are unlinked (`Trash`).

Garbage collection deletes a blob's file in two steps. `Trash.add` moves the file to the trash, which takes the same
short time for files of any size. `Trash.empty` unlinks the files in the trash, which takes long for large files.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from storage.blobs.files.unreadable_files import has_unreadable_inode, skip_unreadable
from storage.data_dir.system import DISK_FULL_ERRNOS, System


class Trash:
    """The trash directory of a data directory. The methods block the thread that calls them. They skip a file
    with a damaged inode."""

    def __init__(self, directory: Path, system: System) -> None:
        self._directory: Final = directory
        self._system: Final = system

    def add(self, path: Path) -> None:
        """Moves the file at `path` to the trash. If the disk has no space for a new name in the trash, unlinks the file
        instead. Does nothing if there is no file at `path`. Raises OSError."""
        if has_unreadable_inode(path):
            return
        with suppress(FileNotFoundError):
            try:
                self._system.rename(path, self._directory / path.name)
            except OSError as error:
                if error.errno not in DISK_FULL_ERRNOS:
                    raise
                self._system.unlink(path)

    def empty(self) -> None:
        """Unlinks all files in the trash. Another process may empty the trash at the same time. Raises OSError."""
        for name in os.listdir(self._directory):
            path = self._directory / name
            with suppress(FileNotFoundError):
                if not has_unreadable_inode(path):
                    self._system.unlink(path)

    def size(self) -> int:
        """Returns the total size of the files in the trash, in bytes. Raises OSError."""
        size = 0
        for entry in os.scandir(self._directory):
            with suppress(FileNotFoundError), skip_unreadable(entry.path):  # not found: unlinked meanwhile
                size += entry.stat(follow_symlinks=False).st_size
        return size
