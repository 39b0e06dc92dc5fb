"""Runs of retention that are killed at a durable step: `python -m tests.system.crash.killed_retention FOLDER`.

For n = 1, 2, … a fresh process runs the job on a copy of the same data directory, FOLDER/n, and kills itself with
SIGKILL before its nth durable step. One JSON line a process says how it ended; the last line is of the process that
came through.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
from pathlib import Path

from registry.config import RetentionRule
from registry.naming import NamingRules
from registry.upkeep.retention.judgement import RetentionJudge
from registry.upkeep.retention.retention_work import KIND, RetentionWork
from storage.composition import open_registry, prepare_data_dir
from storage.data_dir.system import System
from storage.names import RepositoryName, Tag
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.job_runner import run_in_command
from tests.fakes.registry_content import BY, index_of, push_image
from tests.fakes.upkeep_store import APP, START, Clock
from tests.system.crash.killed_at_step import KillingSystem

WEB = RepositoryName("team/web")
RULES = [RetentionRule(repositories=["team/**"], keep_last=2, keep_tags=["v*"], delete_untagged_after=0.0)]


async def fill(store: StoredRegistry, clock: Clock) -> None:
    """Pushes images of several platforms with signatures, some of them with blobs in common, and one without a tag."""
    for repo in (APP, WEB):
        shared = await push_image(store, repo, "shared")
        for number, tag in enumerate(("v1", "a", "b", "c", "d", "")):
            clock.now += 60
            own = await push_image(store, repo, f"{repo} {number}")
            index = index_of([shared.descriptor, own.descriptor])
            await store.put_manifest(repo, index, [Tag(tag)] if tag else [], by=BY)
            await push_image(store, repo, f"signature {number}", subject=index.digest)


async def run_retention(store: StoredRegistry, clock: Clock) -> None:
    """Runs the job to its end."""
    judge = RetentionJudge(RULES, NamingRules(), store.metadata, store.retention)
    work = RetentionWork(judge, store.retention, clock)
    await run_in_command(store.jobs, store.leases, KIND, {}, work, actor="test")


async def _prepare(data: Path) -> None:
    clock = Clock()
    prepare_data_dir(data)
    async with open_registry(data, clock=clock) as store:
        await fill(store, clock)


async def _run(data: Path, system: System) -> None:
    clock = Clock(START + 1_000_000)
    async with open_registry(data, system=system, clock=clock) as store:
        await run_retention(store, clock)


def main(folder: Path) -> None:
    asyncio.run(_prepare(folder / "base"))
    for number in range(1, 1000):
        data = folder / str(number)
        shutil.copytree(folder / "base", data)
        child = os.fork()
        if child == 0:
            try:
                asyncio.run(_run(data, KillingSystem(number, after=False)))
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
