"""Kills processes before the durable steps (changes of the disk) of retention, the job that deletes old tags by rules:
`python -m tests.system.crash.killed_retention FOLDER` (see `crash_runs`)."""

from __future__ import annotations

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
from tests.system.crash.crash_runs import die_before_each_step

WEB = RepositoryName("team/web")
RULES = [RetentionRule(repositories=["team/**"], keep_last=2, keep_tags=["v*"], delete_untagged_after=0.0)]


async def fill(store: StoredRegistry, clock: Clock) -> None:
    """Pushes indexes with two images each, and a signature for each index. All indexes of a repository share one image.
    One index has no tag."""
    for repo in (APP, WEB):
        shared = await push_image(store, repo, "shared")
        for number, tag in enumerate(("v1", "a", "b", "c", "d", "")):
            clock.now += 60
            platform_image = await push_image(store, repo, f"{repo} {number}")
            index = index_of([shared.descriptor, platform_image.descriptor])
            await store.put_manifest(repo, index, [Tag(tag)] if tag else [], by=BY)
            await push_image(store, repo, f"signature {number}", subject=index.digest)


async def run_retention(store: StoredRegistry, clock: Clock) -> None:
    """Runs the retention job to its end."""
    judge = RetentionJudge(RULES, NamingRules(), store.metadata, store.retention)
    work = RetentionWork(judge, store.retention, clock)
    await run_in_command(store.jobs, store.leases, KIND, {}, work, actor="test")


async def make_store(data: Path) -> None:
    """Makes the data directory on which retention runs."""
    clock = Clock()
    prepare_data_dir(data)
    async with open_registry(data, clock=clock) as store:
        await fill(store, clock)


async def run(data: Path, system: System) -> None:
    """Opens the store a few days later, and runs the retention job."""
    clock = Clock(START + 1_000_000)
    async with open_registry(data, system=system, clock=clock) as store:
        await run_retention(store, clock)


if __name__ == "__main__":
    die_before_each_step(Path(sys.argv[1]), run)
