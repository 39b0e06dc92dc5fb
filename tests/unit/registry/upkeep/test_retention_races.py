"""Retention and garbage collection in one process, while the clients of another process push, move, delete and pull."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from pathlib import Path

import pytest

from registry.config import RetentionRule
from registry.naming import NamingRules
from registry.upkeep.retention.judgement import RetentionJudge
from registry.upkeep.retention.retention_work import KIND, RetentionWork
from storage.composition import open_registry, prepare_data_dir
from storage.errors import BlobUnknown, ManifestBlobUnknown, ManifestUnknown
from storage.names import Reference, RepositoryName, Tag
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.job_runner import run_in_command
from tests.fakes.registry_content import BY, all_tags, index_of, push_image
from tests.fakes.upkeep_store import APP, Clock, pull

PUSHES = 12
"""Of each client."""
CLIENTS = 6
TAGS = [Tag(name) for name in ("a", "b", "c", "v1")]
RULE = RetentionRule(repositories=["**"], keep_last=1, keep_tags=["v*"], delete_untagged_after=0.0)


class Client:
    """Pushes images of two platforms that share some content with those of other clients. If content was collected
    before a manifest referred to it, pushes it again, as real clients do after the error."""

    def __init__(self, store: StoredRegistry, number: int, clock: Clock) -> None:
        self._store = store
        self._number = number
        self._clock = clock
        self._random = random.Random(number)
        self.pushed = 0

    async def run(self) -> None:
        for number in range(PUSHES):
            tag = self._random.choice(TAGS)
            while not await self._push(number, tag):
                pass
            with suppress(ManifestUnknown):
                found = await self._store.resolve_manifest(APP, self._random.choice(TAGS))
                await pull(self._store, APP, found.digest, self._clock)
                if self._random.random() < 0.2:
                    await self._store.delete_tag(APP, self._random.choice(TAGS), by=BY)

    async def _push(self, number: int, tag: Tag) -> bool:
        try:
            shared = await push_image(self._store, APP, f"shared {number % 3}")
            own = await push_image(self._store, APP, f"{self._number} {number}")
            index = index_of([shared.descriptor, own.descriptor])
            await self._store.put_manifest(APP, index, [tag], by=BY)
        except (ManifestBlobUnknown, BlobUnknown):
            return False
        self.pushed += 1
        return True


async def retain(store: StoredRegistry, clock: Clock) -> int:
    """Runs the job once, then garbage collection. Returns the number of deleted manifests."""
    judge = RetentionJudge([RULE], NamingRules(), store.metadata, store.retention)
    work = RetentionWork(judge, store.retention, clock)
    result: dict[str, int] = await run_in_command(store.jobs, store.leases, KIND, {}, work, actor="test")
    await store.collector.collect()
    return result["manifests_deleted"]


async def check_whole(store: StoredRegistry, repo: RepositoryName, reference: Reference) -> None:
    manifest = await store.get_manifest(repo, reference)
    for blob in manifest.blobs:
        await store.resolve_blob(repo, blob.digest)
    for child in manifest.manifests:
        await check_whole(store, repo, child.digest)


@pytest.mark.slow
async def test_what_has_a_tag_is_whole(tmp_path: Path) -> None:
    """An image with a tag is complete, whatever runs at the same time. The clock runs fast, so that everything without
    a tag is old."""
    clock = Clock()
    prepare_data_dir(tmp_path)
    async with (
        open_registry(tmp_path, grace=0, clock=clock) as first,
        open_registry(tmp_path, grace=0, clock=clock) as second,
    ):
        clients = [Client((first, second)[number % 2], number, clock) for number in range(CLIENTS)]
        pushing = asyncio.gather(*(client.run() for client in clients))
        deleted = 0
        while not pushing.done():
            clock.now += 4000
            deleted += await retain(first, clock)
            for tag in await all_tags(second, APP):
                with suppress(ManifestUnknown):  # the tag was deleted, or moved and its image deleted
                    await second.get_manifest(APP, Tag(tag))
        await pushing
        assert sum(client.pushed for client in clients) == CLIENTS * PUSHES
        for tag in await all_tags(second, APP):
            await check_whole(second, APP, Tag(tag))
        clock.now += 4000
        deleted += await retain(second, clock)
        for tag in await all_tags(first, APP):
            await check_whole(first, APP, Tag(tag))
        assert deleted > 20
        assert len(await all_tags(first, APP)) <= 2
