"""Tests that interrupt a scrub (the job that reads all blobs and moves damaged ones to the quarantine), by SIGKILL
before a durable step or by a power cut after such a step. A *durable step* is one change of the disk, such as a write,
a sync, a rename, or a commit of the database. Damaged bytes are never served, and no undamaged blob is lost."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from storage.composition import open_registry, prepare_data_dir
from storage.errors import BlobUnknown
from storage.names import Tag
from storage.store.stored_registry import StoredRegistry
from tests.fakes.registry_content import read_blob
from tests.fakes.scrub_runs import file_of, quarantined_file, scrub
from tests.system.crash.crash_runs import assert_consistent, check_killed_runs, check_power_cuts
from tests.system.crash.durable_steps import BOOT
from tests.system.crash.killed_scrub import (
    APP,
    BODIES,
    DAMAGE,
    QUARANTINE_BYTES,
    digest,
    make_damaged_store,
    push_all,
    run,
)
from tests.system.crash.workload import files_below, sweep


async def _is_served(registry: StoredRegistry, name: str) -> bool:
    try:
        return await read_blob(registry, APP, digest(name)) == BODIES[name]
    except BlobUnknown:
        return False


async def _check(data: Path, boot: str, *, quarantine_counts: tuple[int, ...] = (1,), thorough: bool) -> None:
    """Checks that each blob that is recorded as damaged has no place from which it could be served, that the next scrub
    completes the work, and that a new push of the image replaces the damaged blobs. With `thorough`, also checks that
    garbage collection deletes all files that are no longer needed. `quarantine_counts`: the possible numbers of blobs
    in the quarantine."""
    prepare_data_dir(data)
    async with open_registry(data, grace=0, boot=boot) as registry:
        for blob in (await registry.damage.damaged_blobs(None, 10)).items:
            assert await registry.damage.place_of(blob.digest) == ""  # the database names no place of the bytes
        await scrub(registry, quarantine_bytes=QUARANTINE_BYTES)
        await assert_consistent(registry)
        damaged = {blob.digest for blob in (await registry.damage.damaged_blobs(None, 10)).items}
        # `make_damaged_store` damages the blobs of `DAMAGE`. It damages the blob "last" too, and records this damage.
        assert damaged == {digest(name) for name in (*DAMAGE, "last")}
        assert [await _is_served(registry, name) for name in BODIES] == [name == "whole" for name in BODIES]
        assert not any(file_of(registry, each).exists() for each in damaged)
        assert sum(quarantined_file(registry, each).exists() for each in damaged) in quarantine_counts
        manifest = await push_all(registry)
        assert (await registry.get_manifest(APP, Tag("latest"))).body == manifest.body
        assert all([await _is_served(registry, name) for name in BODIES])
        assert (await scrub(registry))[0]["damaged"] == 0
        if thorough:
            await sweep(registry)
            assert set(files_below(data / "blobs")) == {file_of(registry, digest(name)) for name in BODIES}
            assert not list((data / "trash").iterdir())


@pytest.mark.slow
def test_scrub_killed_before_a_durable_step(memory_folder: Path) -> None:
    """After a scrub was killed before a durable step, the next scrub completes the work, and a new push replaces the
    damaged blobs."""
    asyncio.run(make_damaged_store(memory_folder / "start"))

    async def check(data: Path, _: int) -> None:
        await _check(data, BOOT, thorough=True)

    steps = check_killed_runs("tests.system.crash.killed_scrub", memory_folder, check=check)
    assert steps >= 10, "scrub has fewer durable steps than expected"


@pytest.mark.slow
async def test_a_power_cut_after_each_durable_step_of_scrub(memory_folder: Path) -> None:
    """After a power cut, the next scrub completes the work, and a new push replaces the damaged blobs. A power cut
    after a durable step can leave the disk in several states. To save time, the test checks only every third of these
    states, and all states after the last step."""
    await make_damaged_store(memory_folder / "start")

    async def check(data: Path, number: int) -> None:
        # The power cut may undo the move of the bytes into the quarantine, completely or in part.
        await _check(data, "second run", quarantine_counts=(0, 1), thorough=number % 6 == 0)

    assert await check_power_cuts(memory_folder / "start", run, check, every=3) > 10
