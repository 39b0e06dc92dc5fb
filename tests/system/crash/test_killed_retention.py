"""Tests that interrupt retention (the job that deletes old tags by rules), by SIGKILL or by a power cut at a durable
step. The remaining content is complete, and the next run completes the work."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from storage.composition import open_registry, prepare_data_dir
from storage.names import Digest, Tag
from tests.fakes.registry_content import all_tags
from tests.fakes.upkeep_store import APP, START, Clock
from tests.system.crash.crash_runs import assert_consistent, check_killed_runs, check_power_cuts, pulled_blobs
from tests.system.crash.killed_retention import WEB, make_store, run, run_retention
from tests.system.crash.workload import files_below

KEPT_TAGS = ["c", "d", "v1"]
"""The tags that the rules of `killed_retention` keep in each repository."""


async def check(data: Path, _: int) -> None:
    """Checks the store after the interruption, runs retention and garbage collection again, and checks that only the
    content of the kept tags is left."""
    clock = Clock(START + 2_000_000)
    prepare_data_dir(data)
    async with open_registry(data, grace=0, clock=clock) as store:
        await assert_consistent(store)
        for repo in (APP, WEB):
            tags = await all_tags(store, repo)
            assert set(tags) >= set(KEPT_TAGS)
            for tag in tags:
                await pulled_blobs(store, repo, Tag(tag))
        await run_retention(store, clock)
        clock.now += 1000
        for _ in range(2):
            await store.collector.collect()
        needed: set[Digest] = set()
        for repo in (APP, WEB):
            assert await all_tags(store, repo) == KEPT_TAGS
            for tag in KEPT_TAGS:
                needed |= await pulled_blobs(store, repo, Tag(tag))
    hashes = {digest.partition(":")[2] for digest in needed}
    assert {file.name for file in files_below(data / "blobs")} == hashes, "garbage is left"


@pytest.mark.slow
def test_retention_is_completed_after_a_kill(memory_folder: Path) -> None:
    """After a SIGKILL before any of the tried durable steps, every remaining tag can be pulled. The next run of
    retention deletes the other tags, and garbage collection then leaves only the blobs of the kept tags."""
    asyncio.run(make_store(memory_folder / "start"))
    assert check_killed_runs("tests.system.crash.killed_retention", memory_folder, check=check) > 10


@pytest.mark.slow
async def test_retention_is_completed_after_a_power_cut(memory_folder: Path) -> None:
    """After a power cut as well, every remaining tag can be pulled, and the next run completes the work. The test
    checks every third of the disks that a power cut after a durable step could leave."""
    await make_store(memory_folder / "start")
    assert await check_power_cuts(memory_folder / "start", run, check, every=3) > 10
