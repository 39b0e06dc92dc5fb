"""Kills processes before the durable steps (changes of the disk) of an eviction, which removes cached images of a
mirror: `python -m tests.system.crash.killed_eviction FOLDER` (see `crash_runs`)."""

from __future__ import annotations

import sys
from collections.abc import Set
from pathlib import Path

from storage.composition import open_registry
from storage.data_dir.system import System
from storage.names import Digest
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.evictor import Budget, CacheLimits, Evictor
from tests.system.crash.crash_runs import die_before_each_step
from tests.system.crash.durable_steps import BOOT

NOW = 2_000_000_000.0
"""The time at which the eviction runs, in seconds since 1970."""
NO_BYTES = Budget("cache hub", ("hub",), 0)
"""A budget of 0 bytes, so that every cached image of the upstream `hub` is evicted."""


def evictor_of(store: StoredRegistry, now: float) -> Evictor:
    async def list_downloads() -> Set[Digest]:
        return await store.partials.list_downloads()

    return Evictor(
        store.cached_images,
        store.usage,
        store.collector,
        store.leases,
        CacheLimits(("hub",), (NO_BYTES,)),
        list_downloads=list_downloads,
        free_bytes=store.free_bytes,
        clock=lambda: now,
    )


async def evict_all(data: Path, system: System | None = None, now: float = NOW, boot: str = BOOT) -> None:
    """Evicts all mirrored images."""
    async with open_registry(data, system=system, boot=boot, clock=lambda: now) as store:
        await evictor_of(store, now).evict_to(NO_BYTES)


if __name__ == "__main__":
    die_before_each_step(Path(sys.argv[1]), evict_all)
