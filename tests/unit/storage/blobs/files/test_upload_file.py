"""Tests of the file of an upload session."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from storage.blobs.files.upload_file import UploadFile
from storage.data_dir.system import System


class OneInode(System):
    """A disk with a single free inode: a directory can be made, and then no file."""

    def open(self, path: Path, flags: int, mode: int = 0o640) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return super().open(path, flags, mode)


@pytest.mark.parametrize("start", [UploadFile.create, UploadFile.take_over])
def test_a_refused_upload_leaves_no_directory(tmp_path: Path, start: Callable[[System, Path], UploadFile]) -> None:
    """If the disk has an inode for the directory of a session, but none for its file, the directory is removed."""
    with pytest.raises(OSError, match="No space left on device"):
        start(OneInode(), tmp_path / "upload")
    assert os.listdir(tmp_path) == []
