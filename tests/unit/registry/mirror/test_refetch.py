"""The fetching of damaged mirrored blobs again, while a scrub is running."""

from __future__ import annotations

import pytest

from registry.naming import NamingRules
from registry.router import Router
from registry.upkeep import refetch
from registry.upkeep.refetch import MAX_REPOSITORIES, Refetcher
from storage.content import digest_of
from storage.names import RepositoryName, Tag
from storage.upkeep.job_runner import JobContext
from tests.fakes.registry_content import push_blob, read_blob
from tests.unit.registry.mirror.conftest import MIRRORED_REPO, UPSTREAM_REPO, MirrorSite, MirrorWorker

LAYER = b"a common layer"


@pytest.mark.parametrize("is_mirrored", [True, False])
async def test_a_blob_that_many_hosted_repositories_have(
    site: MirrorSite, worker: MirrorWorker, monkeypatch: pytest.MonkeyPatch, is_mirrored: bool
) -> None:
    """A damaged blob is fetched through a mirrored repository, however many hosted repositories have it as well. If
    only hosted repositories have it, it is counted neither as fetched nor as failed."""
    monkeypatch.setattr(refetch, "WAIT_SECONDS", 0.01)
    store, digest = worker.store, digest_of(LAYER)
    for number in range(MAX_REPOSITORIES + 1):
        await push_blob(store, RepositoryName(f"docker.io-{number}/app"), LAYER)
    if is_mirrored:
        site.upstream.add_image(UPSTREAM_REPO, LAYER)
        await worker.mirror.get_manifest(MIRRORED_REPO, Tag("1"))
        assert await read_blob(worker.mirror, MIRRORED_REPO, digest) == LAYER
    place = await store.damage.place_of(digest)
    assert place is not None
    assert await store.damage.mark_blob_damaged(digest, place, "its bytes have another digest", "")

    async def is_used(_: RepositoryName) -> bool:
        return True

    router = Router(store, {"docker.io": worker.mirror}, is_used, NamingRules(["docker.io"]))
    job = await store.jobs.add("scrub", {}, actor="test", is_resumable=True)
    async with Refetcher(store.damage, router, JobContext(job, store.jobs)) as refetcher:
        refetcher.add(digest)
        await refetcher.finish()
    assert (refetcher.fetched, refetcher.failed) == (int(is_mirrored), 0)
    assert bool(await store.damage.place_of(digest)) == is_mirrored
