"""Retention while a client pushes an image again: the manifests that the repository has stay for an hour, so that the
client can push an index that lists them."""

from __future__ import annotations

from typing import Any

import pytest

from registry.config import RetentionRule
from registry.naming import NamingRules
from registry.upkeep.retention.judgement import RetentionJudge
from registry.upkeep.retention.retention_work import KIND, RetentionWork
from storage.content import Manifest
from storage.names import RepositoryName, Tag
from storage.retention import LostTags, UnusedSince
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.job_runner import run_in_command
from tests.fakes.registry_content import BY, index_of, push_image
from tests.fakes.upkeep_store import APP, Clock, pull

MIRRORED = RepositoryName("docker.io/library/app")
RULE = RetentionRule(repositories=["**"], keep_last=1, delete_untagged_after=0.0)


class UseDuringDeletion:
    """The retention of a store. A client uses `manifest` right after the first index was deleted, and before retention
    deletes what the index lists. The client pushes the manifest again, or pulls it (`use`)."""

    def __init__(self, store: StoredRegistry, clock: Clock, manifest: Manifest, use: str) -> None:
        self._store = store
        self._clock = clock
        self._manifest = manifest
        self._use = use

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store.retention, name)

    async def delete_unused_orphan(self, *arguments: Any) -> Any:
        dependents = await self._store.retention.delete_unused_orphan(*arguments)
        if self._use == "push":
            await self._store.put_manifest(APP, self._manifest, [], by=BY)
        elif self._use == "pull":
            await pull(self._store, APP, self._manifest.digest, self._clock)
        self._use = ""
        return dependents


@pytest.mark.parametrize("use", ["push", "pull"])
async def test_what_an_old_index_lists_can_be_used_by_a_new_one(store: StoredRegistry, clock: Clock, use: str) -> None:
    """While retention deletes an old index, a client uses an unchanged image that the index lists. The image stays, so
    that the client can push a new index that lists it. When the new index is deleted, the image is deleted too."""
    unchanged, changed = await push_image(store, APP, "unchanged"), await push_image(store, APP, "changed")
    await store.put_manifest(APP, index_of([unchanged.descriptor, changed.descriptor]), [], by=BY)
    clock.pass_days(2)
    retention: Any = UseDuringDeletion(store, clock, unchanged, use)
    judge = RetentionJudge([RULE], NamingRules(), store.metadata, retention)

    async def run() -> int:
        work = RetentionWork(judge, retention, clock)
        result: Any = await run_in_command(store.jobs, store.leases, KIND, {}, work, actor="test")
        return int(result["manifests_deleted"])

    assert await run() == 2
    clock.now += 3600 - 1
    assert await run() == 0
    await store.put_manifest(APP, index_of([unchanged.descriptor]), [Tag("new")], by=BY)
    await store.delete_tag(APP, Tag("new"), by=BY)
    clock.now += 3600 + 2
    assert await run() == 2


@pytest.mark.parametrize("repo", [APP, MIRRORED])
async def test_a_push_of_a_stored_manifest_is_its_last_push(
    store: StoredRegistry, clock: Clock, repo: RepositoryName
) -> None:
    """If a client pushes a manifest again, its push time becomes the time of this push, unless the old push time is
    less than a minute older. If a mirror stores a manifest again, the push time stays, because eviction goes by
    pulls."""
    image, is_mirrored = await push_image(store, repo, "image"), repo == MIRRORED
    start = clock()
    for seconds, pushed in ((59.0, start), (2.0, start + 61)):
        clock.now += seconds
        await store.put_manifest(repo, image, [Tag("tag")], by=BY, sparse=is_mirrored)
        await store.delete_tag(repo, Tag("tag"), by=BY)
        limits = UnusedSince(pushed=clock(), untagged=clock(), pulled=clock())
        [manifest] = (await store.retention.unused_orphans(repo, limits, None, LostTags())).items
        assert manifest.pushed == (start if is_mirrored else pushed)
