"""A consistency check of a store reports no false problems while other processes change the store."""

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
from storage.upkeep.checker import CheckOptions, ConfirmedProblem
from tests.fakes.registry_content import BY, image_of, index_of, push_blob, push_image, read_blob

NAMES = [RepositoryName(f"team/{number}") for number in range(3)]
CHECK_COUNT = 4
LAYER = b"a layer"


async def change_store(registry: StoredRegistry, seed: int) -> None:
    """Pushes, mounts and deletes images with a few shared layers, as clients do, until the task is cancelled."""
    rng = random.Random(seed)
    while True:
        name, other = rng.choice(NAMES), rng.choice(NAMES)
        with suppress(BlobUnknown, ManifestUnknown, ManifestBlobUnknown, NameUnknown):
            layer = await push_blob(registry, name, bytes([rng.randrange(6)]) * 100)
            image = image_of(layer, [layer])
            await registry.put_manifest(name, image, [Tag("image")], by=BY)
            await registry.mount_blob(other, layer.digest, name, by=BY)
            await registry.put_manifest(name, index_of([layer]), [Tag("index")], by=BY)
            if rng.random() < 0.5:
                await registry.delete_manifest(name, image.digest, by=BY)
                await registry.delete_manifest(name, index_of([layer]).digest, by=BY)


async def collect_repeatedly(registry: StoredRegistry) -> None:
    """Collects garbage without a pause, until the task is cancelled."""
    while True:
        await registry.collector.collect(all_shards=True)
        await asyncio.sleep(0)


def age_files(data: Path) -> None:
    """Makes all blob files old. An old file without a row in the database counts as a stray."""
    for path in (data / "blobs").rglob("*"):
        with suppress(FileNotFoundError):
            if path.is_file():
                os.utime(path, (1, 1))


@pytest.mark.slow
async def test_checks_of_a_busy_store_find_no_problem(tmp_path: Path) -> None:
    """Clients push, mount and delete content, and garbage collection runs without a grace period. Checks during this
    time find no problem, and repairs do no damage."""
    prepare_data_dir(tmp_path)
    findings: list[ConfirmedProblem] = []

    async def on_problem(finding: ConfirmedProblem) -> None:
        findings.append(finding)

    async def on_progress(done: int, total: int, message: str) -> None:
        if done % 50 == 0:
            age_files(tmp_path)

    async with open_registry(tmp_path, grace=0) as checked, open_registry(tmp_path, grace=0) as busy:
        await push_image(busy, NAMES[0], "stays", "stays")
        tasks = [asyncio.create_task(change_store(busy, seed)) for seed in range(3)]
        tasks.append(asyncio.create_task(collect_repeatedly(busy)))
        for number in range(CHECK_COUNT):
            options = CheckOptions(repair=number % 2 == 1, hash_bytes=number > 1)
            await checked.checker.check(options, on_problem, on_progress)
        assert [task for task in tasks if task.done()] == []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await checked.checker.check(CheckOptions(hash_bytes=True), on_problem, on_progress)
    assert findings == []


class Interruption:
    """Wraps a part of the registry, and calls `change`, which changes the registry. `change` is called once, just
    before the first matching call of the method `method` or, with `after`, just after this call. `is_due` gets the
    arguments of a call, and returns whether the call matches."""

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


async def check_during(store: StoredRegistry, **parts: Interruption) -> list[ConfirmedProblem]:
    """Checks and repairs the store with a checker in which each of `parts` replaces the field of the same name. Returns
    the findings."""
    findings: list[ConfirmedProblem] = []

    async def on_problem(finding: ConfirmedProblem) -> None:
        findings.append(finding)

    async def on_progress(done: int, total: int, message: str) -> None:
        pass

    checker = replace(store.checker, **parts)  # type: ignore[arg-type]
    await checker.check(CheckOptions(hash_bytes=True, repair=True), on_problem, on_progress)
    assert all(part.has_happened for part in parts.values())
    return findings


async def collect_blob(store: StoredRegistry) -> None:
    assert (await store.collector.collect()).blobs == 1


@pytest.mark.parametrize("method", ["stored_sizes", "check"])
async def test_a_blob_that_is_collected_during_the_check_is_not_missing(store: StoredRegistry, method: str) -> None:
    """Garbage collection deletes a blob after the check has read the blob's row in the database. The check then does
    not find the blob's bytes. It reads the row again, sees that the row was deleted too, and reports no problem."""
    blobs = Interruption(store.blobs, method, lambda: collect_blob(store))
    assert await check_during(store, blobs=blobs) == []


async def test_a_file_that_is_collected_during_the_check_is_no_stray(store: StoredRegistry) -> None:
    """Garbage collection deletes a blob after the check has listed the blob's file. The check then finds no row for the
    file. It looks for the file again, sees that the file was deleted too, and reports no problem."""
    [shard] = [number for number in range(store.blobs.shard_count) if await store.blobs.list_shard(number)]
    blobs = Interruption(
        store.blobs, "list_shard", lambda: collect_blob(store), after=True, is_due=lambda number: number == shard
    )
    assert await check_during(store, blobs=blobs) == []


async def test_a_stray_that_becomes_a_blob_during_the_check_stays(store: StoredRegistry, tmp_path: Path) -> None:
    """A file without a row (a stray) becomes a blob while a repair runs, because a client pushes the blob. The repair
    does not delete the file."""
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
