"""Evictions that are killed: `python -m tests.system.upkeep.killed_eviction FOLDER`.

For n = 1, 2, … a fresh process opens a copy of the data directory FOLDER/start, FOLDER/n, evicts all mirrored images,
and kills itself with SIGKILL before its nth durable step. One line a process says its number and its exit code; the
last one came through.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Set
from pathlib import Path

from storage.composition import open_registry
from storage.data_dir.system import System
from storage.names import Digest
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.evictor import Budget, CacheLimits, Evictor
from tests.system.crash.killed_at_step import BOOT, KillingSystem

EVERYTHING = Budget("cache hub", ("hub",), 0)


def evictor_of(store: StoredRegistry, now: float) -> Evictor:
    async def list_downloads() -> Set[Digest]:
        return await store.partials.downloading()

    return Evictor(
        store.cached_images,
        store.usage,
        store.collector,
        store.leases,
        CacheLimits(("hub",), (EVERYTHING,)),
        list_downloads=list_downloads,
        free_bytes=store.free_bytes,
        clock=lambda: now,
    )


async def evict_all(data: Path, now: float, system: System | None = None) -> None:
    async with open_registry(data, system=system, boot=BOOT, clock=lambda: now) as store:
        await evictor_of(store, now).evict_to(EVERYTHING)


def main(folder: Path, now: float) -> None:
    number, code = 0, -1
    while code != 0:
        number += 1
        data = folder / str(number)
        shutil.copytree(folder / "start", data)
        pid = os.fork()
        if pid == 0:
            asyncio.run(evict_all(data, now, KillingSystem(number, after=False)))
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(number, code, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
