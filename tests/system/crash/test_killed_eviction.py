"""Tests that interrupt an eviction of cached images, by SIGKILL before a durable step or by a power cut after one. The
counted use of the cache stays exact, and the next eviction completes the work."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from storage.composition import open_registry, prepare_data_dir
from storage.consistency import ProblemCode
from storage.data_dir.layout import Layout
from storage.names import Digest, RepositoryName, Tag
from storage.upkeep.checker import CheckOptions
from storage.upkeep.usage_counting import configure_and_count
from storage.usage import ScopeDefinition
from tests.fakes.registry_content import BY, CONFIG_TYPE, descriptor_of, image_of, index_of, push_blob, read_blob
from tests.system.crash.crash_runs import assert_consistent, check_killed_runs, check_power_cuts
from tests.system.crash.durable_steps import BOOT
from tests.system.crash.killed_eviction import NOW, evict_all

# Two mirrored repositories, and one that is not mirrored.
HUB, OTHER, HOSTED = RepositoryName("hub/app"), RepositoryName("hub/web"), RepositoryName("team/app")
SCOPES = [ScopeDefinition("cache hub", ("hub/",), upstream="hub")]
CHECKS = CheckOptions(hash_bytes=True, is_mirrored=lambda name: name.startswith("hub/"))


async def fill(data: Path) -> Digest:
    """Stores three mirrored images, which share a layer, and an index of two of them. Mounts a layer of the third image
    in a hosted repository. Returns the digest of the mounted layer."""
    prepare_data_dir(data)
    async with open_registry(data, boot=BOOT, clock=lambda: NOW - 100) as store:
        await configure_and_count(store.usage, store.leases, SCOPES)
        children = []
        for repo, name in ((HUB, "one"), (HUB, "two"), (OTHER, "three")):
            config = await push_blob(store, repo, b"{}")
            layers = [await push_blob(store, repo, text.encode()) for text in ("shared", name)]
            image = image_of(descriptor_of(b"{}", CONFIG_TYPE), layers)
            assert image.blobs[0].digest == config.digest
            await store.put_manifest(repo, image, [Tag(name)], by=BY, sparse=True)
            children.append(image)
        index = index_of([child.descriptor for child in children[:2]])
        await store.put_manifest(HUB, index, [Tag("all")], by=BY, sparse=True)
        await store.mount_blob(HOSTED, layers[1].digest, OTHER, BY)
        return layers[1].digest


async def check(data: Path, mounted: Digest, boot: str) -> None:
    """Checks that the remaining content is complete. Then evicts again and collects garbage, and checks that only the
    mounted blob is left."""
    prepare_data_dir(data)
    async with open_registry(data, boot=boot, clock=lambda: NOW) as store:
        # The clock is ahead of the times of the files. So files that the next collection removes count as stray
        # already.
        await assert_consistent(store, {ProblemCode.STRAY}, CHECKS)
        assert await store.usage.scope("cache hub") == await store.usage.recount("cache hub")
        for repo in (HUB, OTHER):
            for tag in (await store.tags(repo, None, 10)).items:
                manifest = await store.get_manifest(repo, tag)
                for blob in manifest.blobs:
                    assert len(await read_blob(store, repo, blob.digest)) == blob.size
        assert await read_blob(store, HOSTED, mounted) == b"three"
    await evict_all(data, now=NOW + 1, boot=boot)
    async with open_registry(data, boot=boot, clock=lambda: NOW + 1) as store:
        use = await store.usage.scope("cache hub")
        assert use == await store.usage.recount("cache hub")
        assert use is not None
        assert (use.blobs, use.bytes, use.tags) == (0, 0, 0)
        for repo in (HUB, OTHER):
            assert list((await store.tags(repo, None, 10)).items) == []
        assert await read_blob(store, HOSTED, mounted) == b"three"
    async with open_registry(data, grace=0, boot=boot, clock=lambda: time.time() + 3600) as store:
        # If the database row of a file was removed before the kill, the collector removes the file.
        await store.collector.collect(all_shards=True)
    files = [path for path in (data / "blobs").rglob("*") if path.is_file()]
    assert files == [data / Layout.blob_place(mounted)]
    assert list((data / "trash").iterdir()) == []


@pytest.mark.slow
def test_next_eviction_completes_a_killed_eviction(memory_folder: Path) -> None:
    """After a SIGKILL before any of the tried durable steps, the next eviction completes the work."""
    mounted = asyncio.run(fill(memory_folder / "start"))

    async def check_run(data: Path, _: int) -> None:
        await check(data, mounted, BOOT)

    assert check_killed_runs("tests.system.crash.killed_eviction", memory_folder, check=check_run) > 8


@pytest.mark.slow
async def test_next_eviction_completes_an_eviction_after_a_power_cut(memory_folder: Path) -> None:
    """After a power cut, the next eviction completes the work. Of all disks that a power cut after any durable step
    could leave, the test checks every fourth one."""
    mounted = await fill(memory_folder / "start")

    async def check_cut(data: Path, _: int) -> None:
        await check(data, mounted, "second run")

    assert await check_power_cuts(memory_folder / "start", evict_all, check_cut, every=4) > 8
