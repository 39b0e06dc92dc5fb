"""Looks after the room on the disk while a registry is open: takes the reserve back, and says when the disk is full."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from pathlib import Path
from typing import Final

from storage.blobs.files.file_blob_store import FileBlobStore
from storage.blobs.files.partial_files import PartialPaths, expire_partial, partials_in
from storage.data_dir.durable_files import as_storage_errors
from storage.data_dir.layout import Layout
from storage.data_dir.reserve import Reserve
from storage.data_dir.system import System
from storage.errors import RegistryError

LOOK: Final = 1.0
"""Seconds between two looks at the disk. One takes microseconds."""
log = logging.getLogger("storage")


class DiskSpaceMonitor:
    """For one process and its event loop. It logs each change, and the state it begins with if that is bad."""

    def __init__(self, blobs: FileBlobStore, root: Path) -> None:
        self._blobs = blobs
        self._root = root
        self._told: str | None = None

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK)

    async def look(self) -> None:
        reserve = self._blobs.reserve
        if not reserve.is_whole:
            with suppress(RegistryError):
                await self._blobs.run(reserve.restore)
        trouble = reserve.storage_problem()
        if trouble == self._told:
            return
        self._told = trouble
        if trouble is None:
            log.warning("there is room in %s again: everything works as before", self._root)
        else:
            log.warning("%s (data directory %s)", trouble, self._root)


async def wait_until_due(every: float, urgent: float, reserve: Reserve) -> None:
    """Waits for `every` seconds; on a full disk no longer than `urgent`."""
    time = asyncio.get_running_loop().time
    since = time()
    while (left := since + every - time()) > 0:
        if time() - since >= urgent and reserve.storage_problem() is not None:
            return
        await asyncio.sleep(min(LOOK, left))


def free_disk_space(layout: Layout, system: System, boot: str) -> None:
    """Drops what nobody will miss: the trash, and blobs on their way in that nobody fetches just now. For a start that
    found no room. Raises nothing."""
    for drop in (_empty_trash, _drop_partials):
        with suppress(RegistryError), as_storage_errors():
            drop(layout, system, boot)


def _empty_trash(layout: Layout, system: System, _boot: str) -> None:
    for file in list(layout.trash.iterdir()):
        with suppress(FileNotFoundError):
            system.unlink(file)


def _drop_partials(layout: Layout, system: System, boot: str) -> None:
    for name, digest in partials_in(layout):
        expire_partial(system, PartialPaths.of(layout, name, digest), float("inf"), boot)
