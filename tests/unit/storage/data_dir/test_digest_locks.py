"""The locks for the digests of blobs, when the disk was full while the data directory was created."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from contextlib import closing
from pathlib import Path

import pytest

from storage.content import digest_of
from storage.data_dir.digest_locks import FileDigestLocks
from storage.data_dir.disk import Disk
from storage.data_dir.layout import Layout
from storage.data_dir.reserve import Reserve
from storage.data_dir.system import System
from tests.fakes.open_files import open_files_below

DIGEST = digest_of(b"content")


class FullSystem(System):
    """A system whose disk is full: the event loop's thread cannot create a file. Other threads can, because they take
    the space from the disk reserve. Their call waits until `may_open` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.is_opening = threading.Event()
        self.may_open = threading.Event()

    def open(self, path: Path, flags: int, mode: int = 0o640) -> int:
        if threading.current_thread() is threading.main_thread():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.is_opening.set()
        assert self.may_open.wait(60)
        return super().open(path, flags, mode)


async def test_a_cancelled_wait_for_a_missing_lock_file_leaves_no_file_open(tmp_path: Path) -> None:
    """If a task is cancelled while a thread creates the missing lock file, the file is closed. The next task gets the
    lock."""
    system = FullSystem()
    layout = Layout(tmp_path)
    layout.digest_lock(DIGEST).parent.mkdir(parents=True)
    disk = Disk(layout, system, Reserve(tmp_path / "reserve", System()))
    with closing(disk):
        locks = FileDigestLocks(disk)
        waiting = asyncio.create_task(locks.hold(DIGEST).__aenter__())
        assert await asyncio.to_thread(system.is_opening.wait, 60)
        waiting.cancel()
        system.may_open.set()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert open_files_below(tmp_path) == []
        async with locks.hold(DIGEST):
            assert open_files_below(tmp_path) == [str(layout.digest_lock(DIGEST))]
