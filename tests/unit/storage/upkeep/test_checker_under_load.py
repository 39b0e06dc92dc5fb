"""A check of a store that other processes change at the same time gives no false alarm."""

from __future__ import annotations

import asyncio
import os
import random
from contextlib import suppress
from pathlib import Path

from storage.composition import open_registry, prepare_data_dir
from storage.errors import BlobUnknown, ManifestBlobUnknown, ManifestUnknown, NameUnknown
from storage.names import RepositoryName, Tag
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.checker import CheckOptions, Finding
from tests.fakes.registry_content import BY, image_of, index_of, push_blob, push_image

NAMES = [RepositoryName(f"team/{number}") for number in range(3)]
CHECKS = 4


async def work(registry: StoredRegistry, seed: int) -> None:
    """Pushes, mounts and deletes images of a few shared layers until it is cancelled, as clients do."""
    choose = random.Random(seed)
    while True:
        name, other = choose.choice(NAMES), choose.choice(NAMES)
        with suppress(BlobUnknown, ManifestUnknown, ManifestBlobUnknown, NameUnknown):
            layer = await push_blob(registry, name, bytes([choose.randrange(6)]) * 100)
            image = image_of(layer, [layer])
            await registry.put_manifest(name, image, [Tag("image")], by=BY)
            await registry.mount_blob(other, layer.digest, name, by=BY)
            await registry.put_manifest(name, index_of([layer]), [Tag("index")], by=BY)
            if choose.random() < 0.5:
                await registry.delete_manifest(name, image.digest, by=BY)
                await registry.delete_manifest(name, index_of([layer]).digest, by=BY)


async def collect(registry: StoredRegistry) -> None:
    """Collects garbage over and over."""
    while True:
        await registry.collector.collect(all_shards=True)
        await asyncio.sleep(0)


def age_files(data: Path) -> None:
    """Makes all blob files old, so that one without a row would be a stray."""
    for path in (data / "blobs").rglob("*"):
        with suppress(FileNotFoundError):
            if path.is_file():
                os.utime(path, (1, 1))


async def test_a_busy_store_is_sound(tmp_path: Path) -> None:
    """While clients push, mount and delete, and the collector has no grace, checks find nothing; and a repair at the
    same time breaks nothing."""
    prepare_data_dir(tmp_path)
    found: list[Finding] = []

    async def on_finding(finding: Finding) -> None:
        found.append(finding)

    async def on_progress(done: int, total: int, message: str) -> None:
        if done % 50 == 0:
            age_files(tmp_path)

    async with open_registry(tmp_path, grace=0) as checked, open_registry(tmp_path, grace=0) as busy:
        await push_image(busy, NAMES[0], "stays", "stays")
        tasks = [asyncio.create_task(work(busy, seed)) for seed in range(3)]
        tasks.append(asyncio.create_task(collect(busy)))
        for number in range(CHECKS):
            options = CheckOptions(repair=number % 2 == 1, hash_bytes=number > 1)
            await checked.checker.check(options, on_finding, on_progress)
        assert [task for task in tasks if task.done()] == []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await checked.checker.check(CheckOptions(hash_bytes=True), on_finding, on_progress)
    assert found == []
