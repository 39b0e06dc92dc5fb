"""Tests that interrupt a garbage collection, by SIGKILL before a durable step or by a power cut after one. A *durable
step* is one change of the disk, such as a write, a rename or a commit of the database. After each interruption, images
that can be restored are complete, and the next collection leaves only needed content.
"""

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
from tests.system.crash.killed_collection import GRACE, RESTORABLE, WEB, make_store, run, tag_changes
from tests.system.crash.workload import files_below


async def check_store(data: Path, restorable: dict[str, Digest], untagged: Digest, boot: str) -> None:
    """Checks the store that an interrupted run has left. All tags can be pulled. Each tag in `restorable` points at its
    digest already, or can be restored to it. The next collection then leaves only the content of the tags and the
    manifest `untagged`.

    `boot`: the ID of the machine's boot, with which the check opens the store. It is the ID of the interrupted run if
    the process was killed, and another one after a power cut."""
    prepare_data_dir(data)
    clock = Clock(START + 2.6 * GRACE)  # just after the start of `run`: the deleted manifests can still be restored
    async with open_registry(data, grace=GRACE, boot=boot, clock=clock) as store:
        await assert_consistent(store)
        tags = {repo: await all_tags(store, repo) for repo in (APP, WEB)}
        assert "kept" in tags[APP]
        assert "same" in tags[WEB]
        for repo, names in tags.items():
            for name in names:
                await pulled_blobs(store, repo, Tag(name))
        for name, digest in restorable.items():
            if name not in tags[WEB] or (await store.get_manifest(WEB, Tag(name))).digest != digest:
                await tag_changes(store).restore(WEB, Tag(name), to=digest, by=BY)
        if "moved" in tags[WEB]:
            await store.delete_tag(WEB, Tag("moved"), by=BY)
    clock = Clock(time.time() + 1e6)
    async with open_registry(data, grace=0, expire=60, boot=boot, clock=clock) as store:
        for _ in range(2):
            await store.collector.collect(all_shards=True)
        assert await all_tags(store, APP) == ["kept"]
        assert await all_tags(store, WEB) == sorted([*RESTORABLE, "same"])
        needed = await pulled_blobs(store, APP, Tag("kept"))
        for name in (*RESTORABLE, "same"):
            needed |= await pulled_blobs(store, WEB, Tag(name))
        for name, digest in restorable.items():
            assert (await store.get_manifest(WEB, Tag(name))).digest == digest
        needed |= await pulled_blobs(store, WEB, untagged)  # only retention rules delete untagged manifests
    assert {file.name for file in files_below(data / "blobs")} == {digest.encoded for digest in needed}
    for folder in ("trash", "uploads", "partials"):
        assert not list((data / folder).iterdir())


@pytest.mark.slow
def test_a_collection_is_completed_after_a_kill(memory_folder: Path) -> None:
    """For each durable step that `durable_steps.choose_steps` chooses, one process is killed before this step. The
    chosen steps include every kind of step. After each kill, the next collection completes the work."""
    restorable, untagged = asyncio.run(make_store(memory_folder / "start"))

    async def check(data: Path, _: int) -> None:
        await check_store(data, restorable, untagged, BOOT)

    assert check_killed_runs("tests.system.crash.killed_collection", memory_folder, check=check) > 30


@pytest.mark.slow
async def test_a_collection_is_completed_after_a_power_cut(memory_folder: Path) -> None:
    """After a power cut, the next collection completes the work. The test computes the different disks that a power cut
    after each durable step could leave. It checks every ninth of them, and all those after the last step."""
    restorable, untagged = await make_store(memory_folder / "start")

    async def check(data: Path, _: int) -> None:
        await check_store(data, restorable, untagged, "second run")

    assert await check_power_cuts(memory_folder / "start", run, check, every=9) > 30
