"""Simulates files and directories of another user, which this process may not read (`ForbiddenFiles`). The tests run as
root, whom no permission stops."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage.blobs.files.cached_reads import CachedOpener


class ForbiddenFiles:
    """The paths in `paths` cannot be opened or listed, as if they had the mode 0700 and belonged to another user. Files
    below a directory in `paths` can neither be looked up nor changed. A file itself can be looked up, and moved,
    because that needs only the permissions of its directory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int = errno.EACCES) -> None:
        """`number`: the errno of the failing calls."""
        self.paths: set[Path] = set()
        self._number = number
        for name in ("open", "listdir", "scandir"):
            monkeypatch.setattr(os, name, self._failing(getattr(os, name), is_reading=True))
        for name in ("stat", "rename", "unlink"):
            monkeypatch.setattr(os, name, self._failing(getattr(os, name), is_reading=False))
        monkeypatch.setattr(os, "access", self._access)
        monkeypatch.setattr(CachedOpener, "open", lambda _opener, _path: None)  # opens all files with `os.open`

    def _is_forbidden(self, path: Any, *, is_reading: bool) -> bool:
        if not isinstance(path, (str, os.PathLike)):
            return False
        return (is_reading and Path(path) in self.paths) or not self.paths.isdisjoint(Path(path).parents)

    def _failing(self, call: Callable[..., Any], *, is_reading: bool) -> Callable[..., Any]:
        def check_and_call(path: Any = ".", *args: Any, **options: Any) -> Any:
            if self._is_forbidden(path, is_reading=is_reading):
                raise OSError(self._number, os.strerror(self._number), os.fspath(path))
            return call(path, *args, **options)

        return check_and_call

    def _access(self, path: Any, _mode: int, **_options: Any) -> bool:
        return not self._is_forbidden(path, is_reading=True)
