"""Watches the disk while a registry is open: restores the reserve, and logs when the disk becomes full or has space."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Final

from storage.data_dir.disk import Disk
from storage.errors import RegistryError

CHECK_SECONDS: Final = 1.0
"""Seconds between two checks. One takes microseconds."""
log = logging.getLogger("storage")


class DiskSpaceMonitor:
    """For one process and its event loop. Logs each change of state, and the state at the start if it is bad."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._logged: str | None = None

    async def run(self) -> None:
        """Checks until it is cancelled."""
        while True:
            await self.check()
            await asyncio.sleep(CHECK_SECONDS)

    async def check(self) -> None:
        """Restores the reserve, and logs a change of state."""
        reserve, root = self._disk.reserve, self._disk.layout.root
        if not reserve.is_whole:
            with suppress(RegistryError):
                await self._disk.run(reserve.restore)
        problem = reserve.storage_problem()
        if problem == self._logged:
            return
        self._logged = problem
        if problem is None:
            log.warning("there is room in %s again: everything works as before", root)
        else:
            log.warning("%s (data directory %s)", problem, root)
