"""A check of a store that other processes change at the same time reports no false problems."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from storage.composition import open_registry, prepare_data_dir
from storage.content import digest_of
from storage.errors import BlobUnknown, ManifestBlobUnknown, ManifestUnknown, NameUnknown
from storage.names import RepositoryName, Tag
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.checker import CheckOptions, Finding
from tests.fakes.registry_content import BY, image_of, index_of, push_blob, push_image, read_blob

NAMES = [RepositoryName(f"team/{number}") for number in range(3)]
CHECKS = 4
LAYER = b"a layer"


async def work(registry: StoredRegistry, seed: int) -> None:
    """Pushes, mounts and deletes images with a few shared layers, as clients do, until it is cancelled."""
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
    """Collects garbage again and again."""
    while True:
        await registry.collector.collect(all_shards=True)
        await asyncio.sleep(0)


def age_files(data: Path) -> None:
    """Makes all blob files old, so that a file without a row would be a stray."""
    for path in (data / "blobs").rglob("*"):
        with suppress(FileNotFoundError):
            if path.is_file():
                os.utime(path, (1, 1))


@pytest.mark.slow
async def test_a_busy_store_is_sound(tmp_path: Path) -> None:
    """While clients push, mount and delete, and the garbage collector has no grace period, checks find nothing, and a
    repair does no damage."""
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


class Interruption:
    """Wraps a part of the registry, and changes the registry at one call of one of its methods. `change` runs before
    the call or, with `after`, after it. `is_due` returns for the arguments of a call whether this is the call."""

    def __init__(
        self,
        part: Any,
        method: str,
        change: Callable[[], Awaitable[None]],
        *,
        after: bool = False,
        is_due: Callable[..., bool] = lambda *arguments: True,
    ) -> None:
        self._part = part
        self._method = method
        self._change = change
        self._after = after
        self._is_due = is_due
        self.has_happened = False

    def __getattr__(self, name: str) -> Any:
        return self._call if name == self._method else getattr(self._part, name)

    async def _call(self, *arguments: Any, **more: Any) -> Any:
        is_now = not self.has_happened and self._is_due(*arguments)
        self.has_happened = self.has_happened or is_now
        if is_now and not self._after:
            await self._change()
        result = await getattr(self._part, self._method)(*arguments, **more)
        if is_now and self._after:
            await self._change()
        return result


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[StoredRegistry]:
    prepare_data_dir(tmp_path)
    async with open_registry(tmp_path, grace=0) as opened:
        await push_blob(opened, NAMES[0], LAYER)
        age_files(tmp_path)
        yield opened


async def check_during(store: StoredRegistry, **parts: Interruption) -> list[Finding]:
    """Checks the store with these parts of the checker replaced."""
    found: list[Finding] = []

    async def on_finding(finding: Finding) -> None:
        found.append(finding)

    async def on_progress(done: int, total: int, message: str) -> None:
        pass

    checker = replace(store.checker, **parts)  # type: ignore[arg-type]
    await checker.check(CheckOptions(hash_bytes=True, repair=True), on_finding, on_progress)
    assert all(part.has_happened for part in parts.values())
    return found


async def collect_blob(store: StoredRegistry) -> None:
    assert (await store.collector.collect()).blobs == 1


@pytest.mark.parametrize("method", ["stored_sizes", "check"])
async def test_a_blob_that_is_collected_after_its_row_was_read_is_not_missing(
    store: StoredRegistry, method: str
) -> None:
    """The check looks again, and finds that the blob's row is gone as well."""
    blobs = Interruption(store.blobs, method, lambda: collect_blob(store))
    assert await check_during(store, blobs=blobs) == []


async def test_a_blob_that_is_collected_after_its_file_was_listed_is_no_stray(store: StoredRegistry) -> None:
    """The check looks again, and finds that the blob's file is gone as well."""
    [shard] = [number for number in range(store.blobs.shard_count) if await store.blobs.list_shard(number)]
    blobs = Interruption(
        store.blobs, "list_shard", lambda: collect_blob(store), after=True, is_due=lambda number: number == shard
    )
    assert await check_during(store, blobs=blobs) == []


async def test_a_stray_that_becomes_a_blob_before_the_second_look_stays(store: StoredRegistry, tmp_path: Path) -> None:
    """A check with `--repair` does not delete the file if it has become a blob meanwhile."""
    stray = digest_of(b"stray")
    path = tmp_path / "blobs" / stray.algorithm / stray.encoded[:2] / stray.encoded
    path.write_bytes(b"stray")
    os.utime(path, (1, 1))

    async def push_stray() -> None:
        await push_blob(store, NAMES[0], b"stray")

    metadata = Interruption(
        store.metadata, "known_blobs", push_stray, after=True, is_due=lambda digests: stray in digests
    )
    assert await check_during(store, metadata=metadata) == []
    assert await read_blob(store, NAMES[0], stray) == b"stray"
