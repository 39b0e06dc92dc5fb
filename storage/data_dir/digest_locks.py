"""One lock for each digest, across all processes of a data directory: implements the Protocol `DigestLocks` with lock
files."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from storage.data_dir.blocking_calls import as_storage_errors
from storage.data_dir.disk import Disk
from storage.data_dir.locks import PollBackOff, try_flock
from storage.data_dir.system import DISK_FULL_ERRNOS
from storage.names import Digest

FIRST_PAUSE_SECONDS = 0.0005
LONGEST_PAUSE_SECONDS = 0.02
"""Pauses between two attempts to take a lock. A lock is held for a few disk operations, which take milliseconds."""


class FileDigestLocks:
    """Locks on 256 lock files. A hash of the digest chooses the file, so two digests may share a lock. An asyncio lock
    per file decides between the tasks of this process, the file's lock between processes."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._task_locks: dict[str, asyncio.Lock] = {}
        """By name of the lock file."""

    @asynccontextmanager
    async def hold(self, digest: Digest) -> AsyncIterator[None]:
        """Waits for the lock of `digest` and holds it inside the `async with` block. Raises StorageFull,
        StorageFailed."""
        lock_file = self._disk.layout.digest_lock(digest)
        async with self._task_locks.setdefault(lock_file.name, asyncio.Lock()):
            fd = await self._open(lock_file)
            try:
                # Polls, because a wait in a thread could use up the thread pool while the lock's holder needs a thread.
                back_off = PollBackOff(FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS)
                while not try_flock(fd):
                    await back_off.pause()
                yield
            finally:
                os.close(fd)

    async def _open(self, lock_file: Path) -> int:
        """Opens the lock file and returns its descriptor. Usually the file exists since the data directory was set up;
        it is missing only if the disk was full then. If the disk is full now, creating it uses the disk reserve."""

        def open_or_create() -> int:
            return self._disk.system.open(lock_file, os.O_RDWR | os.O_CREAT)

        with as_storage_errors():
            try:
                return open_or_create()
            except OSError as error:
                if error.errno not in DISK_FULL_ERRNOS:
                    raise
        return await self._disk.run(lambda: self._disk.reserve.spend(open_or_create, OSError))
