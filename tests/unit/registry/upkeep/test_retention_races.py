"""Retention (rules that delete old tags and manifests) and garbage collection run while clients of two processes push,
move, delete and pull images. No image that has a tag becomes incomplete."""

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

PUSHES_PER_CLIENT = 12
CLIENT_COUNT = 6
TAGS = [Tag(name) for name in ("a", "b", "c", "v1")]
RULE = RetentionRule(repositories=["**"], keep_last=1, keep_tags=["v*"], delete_untagged_after=0.0)


class Client:
    """A client that pushes images with two platforms. The images share some content with those of other clients. If
    content was collected before a manifest referred to it, the client pushes the content again."""

    def __init__(self, store: StoredRegistry, number: int, clock: Clock) -> None:
        self._store = store
        self._number = number
        self._clock = clock
        self._random = random.Random(number)
        self.pushed = 0

    async def run(self) -> None:
        for number in range(PUSHES_PER_CLIENT):
            tag = self._random.choice(TAGS)
            while not await self._push(number, tag):
                pass
            with suppress(ManifestUnknown):
                manifest = await self._store.resolve_manifest(APP, self._random.choice(TAGS))
                await pull(self._store, APP, manifest.digest, self._clock)
                if self._random.random() < 0.2:
                    await self._store.delete_tag(APP, self._random.choice(TAGS), by=BY)

    async def _push(self, number: int, tag: Tag) -> bool:
        try:
            shared_image = await push_image(self._store, APP, f"shared {number % 3}")
            platform_image = await push_image(self._store, APP, f"{self._number} {number}")
            index = index_of([shared_image.descriptor, platform_image.descriptor])
            await self._store.put_manifest(APP, index, [tag], by=BY)
        except (ManifestBlobUnknown, BlobUnknown):
            return False
        self.pushed += 1
        return True


async def run_retention(store: StoredRegistry, clock: Clock) -> int:
    """Runs the retention job once, and then garbage collection. Returns the number of manifests that retention has
    deleted."""
    judge = RetentionJudge([RULE], NamingRules(), store.metadata, store.retention)
    work = RetentionWork(judge, store.retention, clock)
    result: dict[str, int] = await run_in_command(store.jobs, store.leases, KIND, {}, work, actor="test")
    await store.collector.collect()
    return result["manifests_deleted"]


async def check_complete(store: StoredRegistry, repo: RepositoryName, reference: Reference) -> None:
    """Checks that a manifest, all its blobs, and all manifests that it lists exist."""
    manifest = await store.get_manifest(repo, reference)
    for blob in manifest.blobs:
        await store.resolve_blob(repo, blob.digest)
    for child in manifest.manifests:
        await check_complete(store, repo, child.digest)


@pytest.mark.slow
async def test_an_image_with_a_tag_is_complete(tmp_path: Path) -> None:
    """Every image with a tag is complete, although retention and garbage collection run during the pushes. The clock
    runs fast, so that all untagged content is old enough to be deleted."""
    clock = Clock()
    prepare_data_dir(tmp_path)
    async with (
        open_registry(tmp_path, grace=0, clock=clock) as first,
        open_registry(tmp_path, grace=0, clock=clock) as second,
    ):
        await push_image(first, APP, "first")  # makes the repository, so that the loop below can list its tags
        clients = [Client((first, second)[number % 2], number, clock) for number in range(CLIENT_COUNT)]
        pushing = asyncio.gather(*(client.run() for client in clients))
        deleted = 0
        while not pushing.done():
            clock.now += 4000
            deleted += await run_retention(first, clock)
            for tag in await all_tags(second, APP):
                with suppress(ManifestUnknown):  # the tag was deleted, or was moved and its old image deleted
                    await second.get_manifest(APP, Tag(tag))
        await pushing
        assert sum(client.pushed for client in clients) == CLIENT_COUNT * PUSHES_PER_CLIENT
        for tag in await all_tags(second, APP):
            await check_complete(second, APP, Tag(tag))
        clock.now += 4000
        deleted += await run_retention(second, clock)
        for tag in await all_tags(first, APP):
            await check_complete(first, APP, Tag(tag))
        assert deleted > 20
        assert len(await all_tags(first, APP)) <= 2
