"""Locks for the digests of blobs, across all processes of a data directory (`FileDigestLocks`). A process holds the
lock of a blob's digest while it stores or deletes the blob's file."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from storage.data_dir.blocking_calls import as_storage_errors, result_or_close
from storage.data_dir.disk import Disk
from storage.data_dir.locks import PollBackOff, try_flock
from storage.data_dir.system import DISK_FULL_ERRNOS
from storage.names import Digest

FIRST_PAUSE_SECONDS = 0.0005
"""First pause between two attempts to take a lock. Usually, a lock is held only for milliseconds."""
LONGEST_PAUSE_SECONDS = 0.02
"""Longest pause between two attempts to take a lock."""


class FileDigestLocks:
    """The digest locks of one process: implements `storage.leases.DigestLocks`. A hash of the digest chooses one of 256
    lock files, so two digests can have the same lock. A lock on the file excludes other processes. An asyncio lock for
    each file excludes the other tasks of this process."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._task_locks: dict[str, asyncio.Lock] = {}
        """The asyncio locks, by name of the lock file."""

    @asynccontextmanager
    async def hold(self, digest: Digest) -> AsyncIterator[None]:
        """Waits for the lock of `digest` and holds it inside the `async with` block. If the wait is cancelled, holds
        nothing. Raises StorageFull, StorageFailed."""
        lock_file = self._disk.layout.digest_lock(digest)
        async with self._task_locks.setdefault(lock_file.name, asyncio.Lock()):
            fd = await self._open(lock_file)
            try:
                # Polls, because waiting in threads could use up the thread pool. The holder of the lock needs a thread
                # for its disk operations.
                back_off = PollBackOff(FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS)
                while not try_flock(fd):
                    await back_off.pause()
                yield
            finally:
                os.close(fd)

    async def _open(self, lock_file: Path) -> int:
        """Opens the lock file, and creates it if it is missing. Returns its descriptor. On a full disk, takes the space
        for a new file from the disk reserve, a file that is shortened to free space. If the call is cancelled, closes
        the lock file. Raises StorageFull, StorageFailed."""

        def open_or_create() -> int:
            return self._disk.system.open(lock_file, os.O_RDWR | os.O_CREAT)

        with as_storage_errors():
            try:
                return open_or_create()
            except OSError as error:
                if error.errno not in DISK_FULL_ERRNOS:
                    raise
        # `spend` frees a part of the reserve and calls `open_or_create`. With `full_error=OSError`, any OSError of this
        # call counts as a full disk: `spend` then frees more of the reserve and calls `open_or_create` again.
        opening = self._disk.run(lambda: self._disk.reserve.spend(open_or_create, full_error=OSError))
        return await result_or_close(opening, os.close)
