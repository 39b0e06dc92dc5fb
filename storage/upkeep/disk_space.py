"""Watches the free space of the disk while a registry is open (`DiskSpaceMonitor`).

The *reserve* is a file that keeps disk space free. On a full disk, the store shrinks this file to get space for changes
that must not fail, such as deletions.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Final

from storage.data_dir.disk import Disk
from storage.errors import RegistryError

CHECK_SECONDS: Final = 1.0
"""Seconds between two checks. A check takes only microseconds."""
log = logging.getLogger("storage")


class DiskSpaceMonitor:
    """Checks the disk once per second. Extends a shrunken reserve to its full size as soon as the disk has space. Logs
    a warning when the disk is found to be full, and when it has space again. Each process has its own monitor."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._logged_problem: str | None = None
        """Why the disk was full at the last check; None if the disk had space."""

    async def run(self) -> None:
        """Checks once per second until the task is cancelled."""
        while True:
            await self.check()
            await asyncio.sleep(CHECK_SECONDS)

    async def check(self) -> None:
        """Extends the reserve if it does not have its full size. Logs a warning if the state of the disk differs from
        the last check: why the disk is full, or that it has space again."""
        reserve = self._disk.reserve
        if not reserve.is_whole:
            with suppress(RegistryError):
                await self._disk.run(reserve.restore)
        problem = reserve.disk_full_reason()
        if problem == self._logged_problem:
            return
        self._logged_problem = problem
        root = self._disk.layout.root
        if problem is None:
            log.warning("the disk of the data directory %s has space again: pushes work again", root)
        else:
            log.warning("%s (data directory %s)", problem, root)
