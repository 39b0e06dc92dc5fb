"""Tests that interrupt a garbage collection, by SIGKILL before a durable step or by a power cut after one. Images that
can be restored are complete, and the next collection leaves only needed content."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from storage.composition import open_registry, prepare_data_dir
from storage.names import Digest, Tag
from tests.fakes.registry_content import BY, all_tags
from tests.fakes.upkeep_store import APP, START, Clock
from tests.system.crash.crash_runs import assert_consistent, check_killed_runs, check_power_cuts, pulled_blobs
from tests.system.crash.durable_steps import BOOT
from tests.system.crash.killed_collection import GRACE, RESTORED, WEB, make_store, run, tag_changes
from tests.system.crash.workload import files_below


async def check_store(data: Path, restored: dict[str, Digest], untagged: Digest, boot: str) -> None:
    """Checks the store that an interrupted run has left. All tags can be pulled. The tags in `restored` can be restored
    to these digests, unless the run has restored them already. The next collection then leaves only the content of the
    tags and the manifest `untagged`."""
    prepare_data_dir(data)
    clock = Clock(START + 2.6 * GRACE)
    async with open_registry(data, grace=GRACE, boot=boot, clock=clock) as store:
        await assert_consistent(store)
        tags = {repo: await all_tags(store, repo) for repo in (APP, WEB)}
        assert "kept" in tags[APP]
        assert "same" in tags[WEB]
        for repo, names in tags.items():
            for name in names:
                await pulled_blobs(store, repo, Tag(name))
        for name, digest in restored.items():
            if name not in tags[WEB] or (await store.get_manifest(WEB, Tag(name))).digest != digest:
                await tag_changes(store).restore(WEB, Tag(name), to=digest, by=BY)
        if "moved" in tags[WEB]:
            await store.delete_tag(WEB, Tag("moved"), by=BY)
    clock = Clock(time.time() + 1e6)
    async with open_registry(data, grace=0, expire=60, boot=boot, clock=clock) as store:
        for _ in range(2):
            await store.collector.collect(all_shards=True)
        assert await all_tags(store, APP) == ["kept"]
        assert await all_tags(store, WEB) == sorted([*RESTORED, "same"])
        needed = await pulled_blobs(store, APP, Tag("kept"))
        for name in (*RESTORED, "same"):
            needed |= await pulled_blobs(store, WEB, Tag(name))
        for name, digest in restored.items():
            assert (await store.get_manifest(WEB, Tag(name))).digest == digest
        needed |= await pulled_blobs(store, WEB, untagged)  # only retention rules delete untagged manifests
    assert {file.name for file in files_below(data / "blobs")} == {digest.encoded for digest in needed}
    for folder in ("trash", "uploads", "partials"):
        assert not list((data / folder).iterdir())


@pytest.mark.slow
def test_a_collection_is_completed_after_a_kill(memory_folder: Path) -> None:
    """A process is killed before each of the tried durable steps, which include each kind of step. The next collection
    completes the work."""
    restored, untagged = asyncio.run(make_store(memory_folder / "start"))

    async def check(data: Path, _: int) -> None:
        await check_store(data, restored, untagged, BOOT)

    assert check_killed_runs("tests.system.crash.killed_collection", memory_folder, check=check) > 30


@pytest.mark.slow
async def test_a_collection_is_completed_after_a_power_cut(memory_folder: Path) -> None:
    """After a power cut, the next collection completes the work. Of all disks that a power cut after any durable step
    could leave, the test checks every ninth one."""
    restored, untagged = await make_store(memory_folder / "start")

    async def check(data: Path, _: int) -> None:
        await check_store(data, restored, untagged, "second run")

    assert await check_power_cuts(memory_folder / "start", run, check, every=9) > 30
