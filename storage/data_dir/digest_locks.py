"""Locks by digest across all processes of a data directory (`DigestLocks`)."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from storage.data_dir.blocking_calls import as_storage_errors
from storage.data_dir.disk import Disk
from storage.data_dir.locks import PollBackOff, try_flock
from storage.data_dir.system import FULL
from storage.names import Digest

FIRST_PAUSE = 0.0005
LONGEST_PAUSE = 0.02


class FileDigestLocks:
    """Locks on 256 files, by a hash of the digest: two digests may share a lock."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._held: dict[str, asyncio.Lock] = {}

    @asynccontextmanager
    async def hold(self, digest: Digest) -> AsyncIterator[None]:
        """Raises StorageFull, StorageFailed."""
        stripe = self._disk.layout.stripe(digest)
        async with self._held.setdefault(stripe.name, asyncio.Lock()):
            fd = await self._open(stripe)
            try:
                # Polled: a thread that waited for another process could take the place of one that process needs.
                back_off = PollBackOff(FIRST_PAUSE, LONGEST_PAUSE)
                while not try_flock(fd):
                    await back_off.pause()
                yield
            finally:
                os.close(fd)

    async def _open(self, stripe: Path) -> int:
        """Opens the lock file. It was made with the data directory, unless the disk was full then."""

        def opened() -> int:
            return self._disk.system.open(stripe, os.O_RDWR | os.O_CREAT)

        with as_storage_errors():
            try:
                return opened()
            except OSError as error:
                if error.errno not in FULL:
                    raise
        return await self._disk.run(lambda: self._disk.reserve.spend(opened, OSError))
