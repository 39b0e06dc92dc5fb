"""Processes that repair a damaged store and collect its garbage, and are killed before a durable step:
`python -m tests.system.crash.killed_repair FOLDER`.

For n = 1, 2, … a fresh process works on a copy of FOLDER/made, FOLDER/n, and kills itself with SIGKILL before its nth
durable step. One JSON line a process says how it ended; the last line is of the process that came through.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from storage.composition import open_registry
from storage.data_dir.system import System
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.checker import CheckOptions, Finding
from tests.system.crash.killed_at_step import BOOT, KillingSystem


async def repair_and_collect(data: Path, system: System, clock: Callable[[], float] = time.time) -> list[Finding]:
    """Repairs the store and collects its garbage. Returns what the check found."""
    async with open_registry(data, grace=0, expire=0, system=system, boot=BOOT, clock=clock) as registry:
        found = await findings(registry, repair=True)
        await registry.collector.collect(all_shards=True)
    return found


async def findings(registry: StoredRegistry, *, repair: bool = False) -> list[Finding]:
    """Checks the store."""
    found: list[Finding] = []

    async def on_finding(finding: Finding) -> None:
        found.append(finding)

    async def on_progress(done: int, total: int, message: str) -> None:
        pass

    await registry.checker.check(CheckOptions(repair=repair), on_finding, on_progress)
    return found


def main(folder: Path) -> None:
    for number in range(1, 1000):
        data = folder / str(number)
        shutil.copytree(folder / "made", data)
        child = os.fork()
        if child == 0:
            try:
                asyncio.run(repair_and_collect(data, KillingSystem(number, after=False)))
                os._exit(0)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        print(json.dumps({"number": number, "code": code}), flush=True)
        if code != -signal.SIGKILL:
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]))
