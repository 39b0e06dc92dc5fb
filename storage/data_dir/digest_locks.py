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
from storage.data_dir.locks import PollBackOff, try_lock_file
from storage.data_dir.system import DISK_FULL_ERRNOS
from storage.names import Digest

FIRST_PAUSE_SECONDS = 0.0005
LONGEST_PAUSE_SECONDS = 0.02
"""First and longest pause between two attempts to take a lock. A lock is held for a few disk operations, which take
milliseconds."""


class FileDigestLocks:
    """The digest locks of one process: implements `storage.leases.DigestLocks`. A hash of the digest chooses one of 256
    lock files, so two digests can have the same lock. The lock on the file excludes other processes. An asyncio lock
    for each file excludes the other tasks of this process."""

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
                # Polls, because tasks that wait in threads could use up the thread pool. Then the task that holds the
                # lock would get no thread for its disk operations.
                back_off = PollBackOff(FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS)
                while not try_lock_file(fd):
                    await back_off.pause()
                yield
            finally:
                os.close(fd)

    async def _open(self, lock_file: Path) -> int:
        """Opens the lock file and returns its descriptor. The file is missing only if the disk was full when the data
        directory was created. This call then creates the file. If the disk is still full, the call takes the space for
        the file from the disk reserve, a file that is shortened to free space. If the call is cancelled, the file is
        closed."""

        def open_or_create() -> int:
            return self._disk.system.open(lock_file, os.O_RDWR | os.O_CREAT)

        with as_storage_errors():
            try:
                return open_or_create()
            except OSError as error:
                if error.errno not in DISK_FULL_ERRNOS:
                    raise
        # `spend` frees a part of the reserve and calls `open_or_create`. After any OSError (`full_error`), it assumes
        # that the disk is still full, frees a larger part and calls `open_or_create` again.
        opening = self._disk.run(lambda: self._disk.reserve.spend(open_or_create, full_error=OSError))
        return await result_or_close(opening, os.close)
