"""A push to a hosted name whose manifest refers to a blob that the mirror is downloading."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from registry.mirror.entitlement import BlobEntitlement
from registry.naming import NamingRules
from registry.request import UNRESTRICTED, RequestContext, enter_request
from registry.router import Router
from storage.content import Manifest
from storage.names import Digest, RepositoryName, Tag
from tests.fakes.registry_content import BY, read_blob
from tests.unit.registry.conftest import wait_until
from tests.unit.registry.mirror.conftest import (
    BIG,
    DIGEST,
    MIB,
    MIRRORED_REPO,
    OTHER,
    UPSTREAM_REPO,
    MirrorSite,
    MirrorWorker,
    source_of_another_worker,
)

pytestmark = pytest.mark.slow

HOSTED = RepositoryName("app")
TAG = Tag("1")


async def push_during_pull(worker: MirrorWorker, image: Manifest, monkeypatch: pytest.MonkeyPatch) -> asyncio.Task[Any]:
    """Starts a push of `image` to `HOSTED` while its layer `BIG` is being downloaded. Returns when the push waits for
    the rest of the layer. From then on, a fill adds `BIG` to the repository that the push copies from only after the
    push has caused this itself, or has ended, or waits for the start of a fill."""
    enter_request(RequestContext(UNRESTRICTED))
    router = Router(
        worker.store,
        {"docker.io": worker.mirror},
        worker.store.is_known_repository,
        NamingRules(["docker.io"], default="docker.io"),
    )
    pushing = asyncio.create_task(router.put_manifest(HOSTED, image, [TAG], by=BY))
    is_added = asyncio.Event()
    pushing.add_done_callback(lambda _: is_added.set())
    mount = BlobEntitlement.mount

    def may_wait_for_response() -> bool:
        return any(
            MIRRORED_REPO in fill.repositories and not fill.has_response_or_ended
            for fill in worker.mirror.running_fills
        )

    async def mount_late(
        self: BlobEntitlement, repo: RepositoryName, digest: Digest, size: int
    ) -> RepositoryName | None:
        is_delayed = (repo, digest) == (MIRRORED_REPO, DIGEST)
        if is_delayed and asyncio.current_task() is not pushing:
            await wait_until(lambda: is_added.is_set() or may_wait_for_response())
        stored_in = await mount(self, repo, digest, size)
        if is_delayed and stored_in is not None:
            is_added.set()
        return stored_in

    monkeypatch.setattr(BlobEntitlement, "mount", mount_late)
    # When the response has started, the push no longer waits for it, but for its bytes.
    await wait_until(
        lambda: any(
            MIRRORED_REPO in fill.repositories and fill.has_response_or_ended for fill in worker.mirror.running_fills
        )
    )
    return pushing


@pytest.mark.parametrize("other_pulls_here", [True, False])
async def test_push_of_a_blob_that_is_pulled_from_another_repository(
    site: MirrorSite, worker: MirrorWorker, monkeypatch: pytest.MonkeyPatch, other_pulls_here: bool
) -> None:
    """The first push to a name refers to a layer that this or another worker is downloading for another repository.
    The push succeeds as soon as the layer is stored, even if it is not in the repository of the same name yet."""
    image = site.upstream.add_image(UPSTREAM_REPO, BIG)
    site.upstream.add_image("library/other", BIG)
    gate = site.upstream.faults.gates[5 * MIB] = threading.Event()
    async with site.worker(source_of_another_worker(site)) as another:
        puller = worker if other_pulls_here else another
        for repo in (MIRRORED_REPO, OTHER):
            await worker.mirror.get_manifest(repo, TAG)
        pulling = asyncio.create_task(read_blob(puller.mirror, OTHER, DIGEST))
        await wait_until(lambda: puller.mirror.running_fills)
        pushing = await push_during_pull(worker, image, monkeypatch)
        gate.set()
        async with asyncio.timeout(60):
            assert (await pushing).digest == image.digest
        assert await pulling == BIG
    assert await read_blob(worker.store, HOSTED, DIGEST) == BIG
