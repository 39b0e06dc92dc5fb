"""Tests that interrupt the repair of a damaged store and the garbage collection after it, by SIGKILL before a durable
step or by a power cut after one. The next run completes the repair and the collection."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest

from storage.composition import open_registry, prepare_data_dir
from storage.content import Manifest, digest_of
from storage.data_dir.system import System
from storage.names import RepositoryName, Tag
from tests.fakes.registry_content import BY, push_blob, push_image, read_blob
from tests.fakes.second_connection import second_connection
from tests.system.crash.crash_runs import assert_consistent, check_killed_runs, check_power_cuts
from tests.system.crash.durable_steps import BOOT
from tests.system.crash.killed_repair import repair_and_collect

APP, OTHER = RepositoryName("team/app"), RepositoryName("team/other")
REPAIR_STEPS = 7
"""The repair of `make_damaged_store` has more durable steps than this, and a power cut can leave more different disks
than this. With fewer, the tests would prove too little."""


async def make_damaged_store(data: Path) -> tuple[Manifest, Manifest]:
    """Makes a store with garbage and several kinds of damage. Returns an image that is complete after the repair, and
    an image whose layer is missing."""
    prepare_data_dir(data)
    async with open_registry(data, boot=BOOT) as registry:
        complete_image = await push_image(registry, APP, "whole", "whole")
        incomplete_image = await push_image(registry, APP, "broken", "broken")
        deleted = await push_image(registry, OTHER, "gone", "gone")
        await registry.delete_manifest(OTHER, deleted.digest, by=BY)
        await push_blob(registry, OTHER, b"a leaked link")
        writer = await registry.start_upload(APP)
        await writer.write(b"abandoned")
        await writer.aclose()
    stray = digest_of(b"stray")
    path = data / "blobs" / stray.algorithm / stray.encoded[:2] / stray.encoded
    path.write_bytes(b"stray")
    os.utime(path, (1, 1))
    layer = incomplete_image.layers[0].digest
    (data / "blobs" / layer.algorithm / layer.encoded[:2] / layer.encoded).unlink()
    db = second_connection(data / "entrepot.db")
    with db:
        db.execute("DELETE FROM collect_queue WHERE digest = ?", (digest_of(b"a leaked link"),))
        db.execute("DELETE FROM manifest_blob WHERE digest = ?", (complete_image.layers[0].digest,))
        db.execute("INSERT INTO manifest_child VALUES (1, ?, 999)", (stray,))
        db.execute("INSERT INTO blob_link VALUES (1, 999, 0, 1)")
        db.execute("UPDATE repository SET manifests = 5")
        db.execute("UPDATE tag SET manifest = 999 WHERE name = 'whole'")
    db.close()
    return complete_image, incomplete_image


async def check_copy(data: Path, complete_image: Manifest, incomplete_image: Manifest, boot: str) -> None:
    """Checks that a second run completes the interrupted repair, and that no content in use is lost."""
    prepare_data_dir(data)
    # The clock is an hour ahead. Otherwise the repair would keep the leftover files of the killed process as new files.
    clock = lambda: time.time() + 3600  # noqa: E731
    assert all(finding.repair for finding in await repair_and_collect(data, System(), clock, boot))
    async with open_registry(data, grace=0, boot=boot, clock=clock) as registry:
        await assert_consistent(registry)
        # A power cut can leave the file of an upload with two names. The run above has deleted only one of the names.
        await registry.collector.collect()
        assert await registry.damage.damaged_count() == 1
        assert (await registry.get_manifest(APP, Tag("whole"))).body == complete_image.body
        assert (await registry.get_manifest(APP, Tag("broken"))).body == incomplete_image.body
        for blob in complete_image.blobs:
            assert len(await read_blob(registry, APP, blob.digest)) == blob.size
    stored = {path.name for path in (data / "blobs").rglob("*") if path.is_file()}
    assert stored == {blob.digest.encoded for blob in [*complete_image.blobs, *incomplete_image.blobs]} - {
        incomplete_image.layers[0].digest.encoded
    }
    assert not list((data / "trash").iterdir())
    assert not list((data / "uploads").iterdir())


@pytest.mark.slow
def test_next_repair_completes_a_killed_repair(memory_folder: Path) -> None:
    """A process is killed before each of the tried durable steps. After the second run there are no problems, no
    content in use is lost, and no garbage is left."""
    complete_image, incomplete_image = asyncio.run(make_damaged_store(memory_folder / "start"))

    async def check(data: Path, _: int) -> None:
        await check_copy(data, complete_image, incomplete_image, BOOT)

    assert check_killed_runs("tests.system.crash.killed_repair", memory_folder, check=check) > REPAIR_STEPS


@pytest.mark.slow
async def test_next_repair_completes_a_repair_after_a_power_cut(memory_folder: Path) -> None:
    """After a power cut as well, the second run leaves no problems and no garbage, and no content in use is lost. Of
    all disks that a power cut after any durable step could leave, the test checks every third one."""
    complete_image, incomplete_image = await make_damaged_store(memory_folder / "start")

    async def check(data: Path, _: int) -> None:
        await check_copy(data, complete_image, incomplete_image, "second run")

    assert await check_power_cuts(memory_folder / "start", repair_and_collect, check, every=3) > REPAIR_STEPS
