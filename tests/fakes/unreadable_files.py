"""Simulates files whose inodes the disk cannot read (`UnreadableFiles`)."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


class UnreadableFiles:
    """The system calls that look up a file by its path fail for the paths in `paths`, with the error that ext4 and XFS
    return for a damaged inode. Directories still list the names of these files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths: set[Path] = set()
        for name in ("stat", "open", "rename", "unlink", "listdir"):
            monkeypatch.setattr(os, name, self._failing(getattr(os, name)))
        self._scandir = os.scandir
        monkeypatch.setattr(os, "scandir", lambda path=".": _Entries(self._scandir(path), self))

    def check(self, path: Any) -> None:
        """Raises OSError if `path` is one of `paths`."""
        if isinstance(path, (str, os.PathLike)) and Path(path) in self.paths:
            raise OSError(errno.EUCLEAN, os.strerror(errno.EUCLEAN), os.fspath(path))

    def _failing(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def check_and_call(path: Any = ".", *args: Any, **options: Any) -> Any:
            self.check(path)
            return call(path, *args, **options)

        return check_and_call


class _Entries:
    """The entries of a directory, as `os.scandir` returns them."""

    def __init__(self, entries: Any, unreadable: UnreadableFiles) -> None:
        self._entries = entries
        self._unreadable = unreadable

    def __iter__(self) -> Iterator[_Entry]:
        return (_Entry(entry, self._unreadable) for entry in self._entries)

    def __enter__(self) -> _Entries:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._entries.close()


class _Entry:
    """An entry of a directory, whose method `stat` fails if the inode is damaged."""

    def __init__(self, entry: os.DirEntry[str], unreadable: UnreadableFiles) -> None:
        self._entry = entry
        self._unreadable = unreadable

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        self._unreadable.check(self._entry.path)
        return self._entry.stat(follow_symlinks=follow_symlinks)

    def __fspath__(self) -> str:
        return self._entry.path

    def __getattr__(self, name: str) -> Any:
        return getattr(self._entry, name)
