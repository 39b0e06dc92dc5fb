"""Watches the free space of the disk while a registry is open (`DiskSpaceMonitor`).

The *reserve* is a file that only occupies space. On a full disk, the store shrinks it to make room for changes that
must not fail, such as deletions.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Final

from storage.data_dir.disk import Disk
from storage.errors import RegistryError

CHECK_SECONDS: Final = 1.0
"""Seconds between two checks. Frequent checks are cheap, because one takes microseconds."""
log = logging.getLogger("storage")


class DiskSpaceMonitor:
    """Restores the reserve as soon as there is space, and logs when the disk becomes full and when it has space again.
    Logs also if the disk is full at the start. Each process has its own monitor."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._logged_problem: str | None = None

    async def run(self) -> None:
        """Checks once per second until the task is cancelled."""
        while True:
            await self.check()
            await asyncio.sleep(CHECK_SECONDS)

    async def check(self) -> None:
        """Restores the reserve if it is not complete, and logs the problem of the disk if it has changed."""
        reserve, root = self._disk.reserve, self._disk.layout.root
        if not reserve.is_whole:
            with suppress(RegistryError):
                await self._disk.run(reserve.restore)
        problem = reserve.disk_full_reason()
        if problem == self._logged_problem:
            return
        self._logged_problem = problem
        if problem is None:
            log.warning("the disk of the data directory %s has space again: pushes work again", root)
        else:
            log.warning("%s (data directory %s)", problem, root)
