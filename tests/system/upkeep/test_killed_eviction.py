"""SIGKILL before every durable step of an eviction: the counts stay exact, and the next eviction goes on."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from storage.composition import open_registry, prepare_data_dir
from storage.data_dir.layout import Layout
from storage.names import Digest, RepositoryName, Tag
from storage.upkeep.usage_counting import count_scopes
from storage.usage import ScopeDefinition
from tests.fakes.registry_content import BY, CONFIG_TYPE, descriptor_of, image_of, index_of, push_blob, read_blob
from tests.fakes.server_process import ROOT
from tests.system.crash.killed_at_step import BOOT
from tests.system.crash.workload import sweep
from tests.system.upkeep.killed_eviction import evict_all

HUB, OTHER, HOSTED = RepositoryName("hub/app"), RepositoryName("hub/web"), RepositoryName("team/app")
SCOPES = [ScopeDefinition("cache hub", ("hub/",), upstream="hub")]
NOW = 2_000_000_000.0


async def fill(data: Path) -> Digest:
    """Stores three mirrored images and an index, which share a layer, and mounts one of their layers in a hosted
    repository. Returns the digest of that layer."""
    prepare_data_dir(data)
    async with open_registry(data, boot=BOOT, clock=lambda: NOW - 100) as store:
        await count_scopes(store.usage, store.leases, SCOPES)
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


async def check(data: Path, mounted: Digest) -> None:
    """What is left is whole. After one more eviction and a collection, only the hosted blob is left."""
    prepare_data_dir(data)
    async with open_registry(data, boot=BOOT, clock=lambda: NOW) as store:
        assert await store.usage.scope("cache hub") == await store.usage.recount("cache hub")
        for repo in (HUB, OTHER):
            for tag in (await store.tags(repo, None, 10)).items:
                manifest = await store.get_manifest(repo, tag)
                for blob in manifest.blobs:
                    assert len(await read_blob(store, repo, blob.digest)) == blob.size
        assert await read_blob(store, HOSTED, mounted) == b"three"
    await evict_all(data, NOW + 1)
    async with open_registry(data, boot=BOOT, clock=lambda: NOW + 1) as store:
        use = await store.usage.scope("cache hub")
        assert use == await store.usage.recount("cache hub")
        assert use is not None
        assert (use.blobs, use.bytes, use.tags) == (0, 0, 0)
        for repo in (HUB, OTHER):
            assert list((await store.tags(repo, None, 10)).items) == []
        assert await read_blob(store, HOSTED, mounted) == b"three"
    async with open_registry(data, grace=0, boot=BOOT, clock=lambda: time.time() + 3600) as store:
        await sweep(store)  # a file whose row is gone already is garbage for the collector
    files = [path for path in (data / "blobs").rglob("*") if path.is_file()]
    assert files == [data / Layout.blob_place(mounted)]
    assert list((data / "trash").iterdir()) == []


@pytest.mark.slow
def test_an_eviction_that_is_killed_goes_on(tmp_path: Path) -> None:
    mounted = asyncio.run(fill(tmp_path / "start"))
    command = [sys.executable, "-m", "tests.system.upkeep.killed_eviction", str(tmp_path), str(NOW)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    codes = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert codes == [-signal.SIGKILL] * (len(codes) - 1) + [0]
    assert len(codes) > 8
    for number in range(1, len(codes) + 1):
        asyncio.run(check(tmp_path / str(number), mounted))
