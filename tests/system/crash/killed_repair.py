"""Kills processes before the durable steps (changes of the disk) of the repair of a damaged store, and of the garbage
collection after the repair: `python -m tests.system.crash.killed_repair FOLDER` (see `crash_runs`)."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from storage.composition import open_registry
from storage.data_dir.system import System
from storage.upkeep.checker import CheckOptions, ConfirmedProblem
from tests.system.crash.crash_runs import die_before_each_step, find_problems
from tests.system.crash.durable_steps import BOOT


async def repair_and_collect(
    data: Path, system: System, clock: Callable[[], float] = time.time, boot: str = BOOT
) -> list[ConfirmedProblem]:
    """Repairs the store and collects its garbage. Returns the problems that the check found."""
    async with open_registry(data, grace=0, expire=0, system=system, boot=boot, clock=clock) as registry:
        found = await find_problems(registry, CheckOptions(repair=True))
        await registry.collector.collect(all_shards=True)
    return found


if __name__ == "__main__":
    die_before_each_step(Path(sys.argv[1]), repair_and_collect)
