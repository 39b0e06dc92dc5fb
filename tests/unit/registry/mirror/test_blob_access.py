"""Which blobs can be read through a repository of a mirror: only blobs that the upstream has in this repository, or
that a manifest of this repository names."""

from __future__ import annotations

import asyncio
import threading

import pytest

from registry.mirror.upstream_client import UnconfirmedBlobUnknown
from storage.errors import BlobUnknown, ManifestUnknown, RegistryError, UpstreamUnavailable
from storage.names import Reference, RepositoryName, Tag
from tests.fakes.mirror_source import missing_digest
from tests.fakes.registry_content import descriptor_of, image_of, push_blob, read_blob
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
    assert_each_byte_sent_once,
    begin_pull,
    read_to_end,
    source_of_another_worker,
    wait_until_stored,
)

pytestmark = pytest.mark.slow


async def test_unknown_blobs(site: MirrorSite, worker: MirrorWorker) -> None:
    """A blob that the upstream does not have is unknown. This answer is cached for a short time, in which no worker
    requests the blob from the upstream."""
    async with site.worker() as other:
        for _ in range(2):
            for mirror in (worker.mirror, other.mirror):
                with pytest.raises(BlobUnknown):
                    await mirror.open_blob(MIRRORED_REPO, missing_digest())
                with pytest.raises(BlobUnknown):
                    await mirror.resolve_blob(MIRRORED_REPO, missing_digest())
        assert site.upstream.calls == {"head blob": 1}
        site.clock.now += 61
        with pytest.raises(BlobUnknown):
            await worker.mirror.open_blob(MIRRORED_REPO, missing_digest())
        assert site.upstream.calls == {"head blob": 2}


async def test_a_manifest_names_a_blob_that_the_upstream_does_not_have(site: MirrorSite, worker: MirrorWorker) -> None:
    """If a manifest names a blob that the upstream does not have, the client gets "blob unknown" before any header is
    sent."""
    await begin_pull(site, worker)
    del site.upstream.blobs[UPSTREAM_REPO, DIGEST]
    for _ in range(2):
        with pytest.raises(BlobUnknown):
            await worker.mirror.open_blob(MIRRORED_REPO, DIGEST)
    assert site.upstream.calls["get blob"] == 1


async def test_an_unknown_manifest_does_not_make_a_blob_unknown(site: MirrorSite, worker: MirrorWorker) -> None:
    """The mirror records that a manifest is unknown. This record never makes a blob unknown, even if the requested tag
    looks like the key of a blob's record."""
    await begin_pull(site, worker)
    names = [Tag(f"{prefix}{DIGEST.algorithm}{dot}{DIGEST.encoded}") for prefix in ("_blob.", "blob.") for dot in ".-_"]
    references: list[Reference] = [DIGEST, *names]
    for reference in references:
        with pytest.raises(ManifestUnknown):
            await worker.mirror.get_manifest(MIRRORED_REPO, reference)
    assert await read_blob(worker.mirror, MIRRORED_REPO, DIGEST) == BIG


async def test_a_mirrored_repository_does_not_serve_blobs_of_hosted_repositories(
    site: MirrorSite, worker: MirrorWorker
) -> None:
    """A blob of a hosted repository or of another upstream cannot be read through a mirrored repository, even if a
    manifest in the mirrored repository names the blob's digest. If the upstream has the same blob, its bytes are
    fetched from the upstream."""
    await push_blob(worker.store, RepositoryName("team/secret"), BIG)
    await push_blob(worker.store, RepositoryName("docker.io.example/secret"), BIG)
    with pytest.raises(BlobUnknown):
        await worker.mirror.open_blob(MIRRORED_REPO, DIGEST)
    await begin_pull(site, worker)
    del site.upstream.blobs[UPSTREAM_REPO, DIGEST]
    site.clock.now += 61
    with pytest.raises(BlobUnknown):
        await worker.mirror.open_blob(MIRRORED_REPO, DIGEST)
    site.clock.now += 61
    site.upstream.add_blob(UPSTREAM_REPO, BIG)
    assert await read_blob(worker.mirror, MIRRORED_REPO, DIGEST) == BIG
    assert_each_byte_sent_once(site, DIGEST, len(BIG))
    await wait_until_stored(worker, DIGEST, MIRRORED_REPO)


async def test_repositories_of_one_upstream_share_stored_blobs(site: MirrorSite, worker: MirrorWorker) -> None:
    """A stored blob is served without another fetch from a second repository of the same upstream, if a manifest in
    this repository names the blob. It is not served from a repository in which the upstream does not have the blob."""
    await begin_pull(site, worker)
    assert await read_blob(worker.mirror, MIRRORED_REPO, DIGEST) == BIG
    await wait_until_stored(worker, DIGEST, MIRRORED_REPO)
    with pytest.raises(BlobUnknown):
        await worker.mirror.open_blob(RepositoryName("docker.io/library/third"), DIGEST)
    site.upstream.add_image("library/other", BIG)
    await worker.mirror.get_manifest(OTHER, Tag("1"))
    assert await read_blob(worker.mirror, OTHER, DIGEST) == BIG
    assert_each_byte_sent_once(site, DIGEST, len(BIG))


@pytest.mark.parametrize("private", [False, True])
async def test_stored_blobs_are_shared_on_a_full_disk(site: MirrorSite, private: bool) -> None:
    """A stored blob is served from a second repository that has access to it, even if the disk is too full to record
    the link from this repository to the blob."""
    site.configure(require_grant=private)
    site.upstream.add_image(UPSTREAM_REPO, BIG)
    site.upstream.add_image("library/other", BIG)
    async with site.worker() as worker:
        for repo in (MIRRORED_REPO, OTHER):
            await worker.mirror.get_manifest(repo, Tag("1"))
        assert await read_blob(worker.mirror, MIRRORED_REPO, DIGEST) == BIG
        site.disk.full = True
        assert await read_blob(worker.mirror, OTHER, DIGEST) == BIG
        site.disk.full = False
    assert_each_byte_sent_once(site, DIGEST, len(BIG))


async def test_a_private_upstream_is_asked_for_each_repository(site: MirrorSite) -> None:
    """With `require_grant`, a repository gets a stored blob or joins the fill of another repository only after the
    upstream has confirmed that this repository has the blob. The upstream is asked once for each repository, over all
    readers and workers. A fill is the download of a blob from an upstream into the cache."""
    site.configure(require_grant=True)
    site.upstream.add_image(UPSTREAM_REPO, BIG)
    site.upstream.add_image("library/other", BIG)
    third = RepositoryName("docker.io/library/third")
    site.upstream.add_manifest(
        "library/third", image_of(site.upstream.add_blob("library/third", b"{}"), [descriptor_of(BIG)]), "1"
    )
    gate = site.upstream.faults.gates[MIB] = threading.Event()
    async with site.worker() as worker_1, site.worker(source_of_another_worker(site)) as worker_2:
        for repo in (MIRRORED_REPO, OTHER, third):
            await worker_1.mirror.get_manifest(repo, Tag("1"))
        first = await worker_1.mirror.open_blob(MIRRORED_REPO, DIGEST)
        for worker in (worker_1, worker_2):
            with pytest.raises(BlobUnknown):
                await worker.mirror.open_blob(third, DIGEST)
            with pytest.raises(BlobUnknown):
                await worker.mirror.resolve_blob(third, DIGEST)
        reading = [
            asyncio.create_task(read_blob(worker_1.mirror, repo, DIGEST))
            for repo in (MIRRORED_REPO, OTHER, OTHER, MIRRORED_REPO)
        ]
        await wait_until(lambda: site.upstream.calls["head blob"] == 3)
        gate.set()
        assert await asyncio.gather(read_to_end(first), *reading) == [BIG] * 5
        site.upstream.faults.down = UpstreamUnavailable()
        for worker in (worker_1, worker_2):
            for repo in (MIRRORED_REPO, OTHER):
                assert await read_blob(worker.mirror, repo, DIGEST) == BIG
        assert site.upstream.calls["head blob"] == 3
    assert_each_byte_sent_once(site, DIGEST, len(BIG))


@pytest.mark.parametrize("stored", [True, False])
async def test_a_head_response_with_a_wrong_size_gives_no_access(site: MirrorSite, stored: bool) -> None:
    """An upstream may redirect the request for a blob to a login page if the repository does not have the blob. The
    response then has status 200 and the length of the page. It gives access neither to the stored blob nor to a fill
    that runs for another repository."""
    site.configure(require_grant=True)
    site.upstream.add_image(UPSTREAM_REPO, BIG)
    login_page = b"<html>log in</html>"
    site.upstream.add_manifest(
        "library/other", image_of(site.upstream.add_blob("library/other", b"{}"), [descriptor_of(BIG)]), "1"
    )
    site.upstream.blobs["library/other", DIGEST] = login_page
    gate = threading.Event()
    async with site.worker() as worker:
        for repo in (MIRRORED_REPO, OTHER):
            await worker.mirror.get_manifest(repo, Tag("1"))
        if stored:
            assert await read_blob(worker.mirror, MIRRORED_REPO, DIGEST) == BIG
        else:
            site.upstream.faults.gates[MIB] = gate
            first = await worker.mirror.open_blob(MIRRORED_REPO, DIGEST)
        assert not (await worker.mirror.resolve_blob(OTHER, DIGEST)).verified
        with pytest.raises(RegistryError):
            await read_blob(worker.mirror, OTHER, DIGEST)
        assert not await worker.store.records.is_confirmed(OTHER, DIGEST)
        if not stored:
            gate.set()
            assert await read_to_end(first) == BIG
            with pytest.raises(RegistryError):
                await read_blob(worker.mirror, OTHER, DIGEST)
        assert not await worker.store.records.is_confirmed(OTHER, DIGEST)
        assert await worker.store.records.is_confirmed(MIRRORED_REPO, DIGEST)


async def test_an_unconfirmed_blob_unknown_is_not_cached(site: MirrorSite, worker: MirrorWorker) -> None:
    """If a firewall answers in place of the upstream, the client gets `BlobUnknown`. This answer is not cached: the
    next request asks the upstream again. This holds for HEAD and for GET requests to the upstream."""
    site.upstream.faults.down = UnconfirmedBlobUnknown()
    unnamed_blob = site.upstream.add_blob(UPSTREAM_REPO, b"named by no manifest here")
    with pytest.raises(UnconfirmedBlobUnknown):
        await worker.mirror.open_blob(MIRRORED_REPO, unnamed_blob.digest)
    site.upstream.faults.down = None
    assert await read_blob(worker.mirror, MIRRORED_REPO, unnamed_blob.digest) == b"named by no manifest here"
    await begin_pull(site, worker)
    site.upstream.faults.down = UnconfirmedBlobUnknown()
    with pytest.raises(UnconfirmedBlobUnknown):
        await worker.mirror.open_blob(MIRRORED_REPO, DIGEST)
    site.upstream.faults.down = None
    assert await read_blob(worker.mirror, MIRRORED_REPO, DIGEST) == BIG


async def test_two_repositories_share_a_fill(site: MirrorSite, worker: MirrorWorker) -> None:
    """A layer requested in two repositories at once is fetched once and stored for both."""
    await begin_pull(site, worker)
    site.upstream.add_image("library/other", BIG)
    await worker.mirror.get_manifest(OTHER, Tag("1"))
    bodies = await asyncio.gather(*(read_blob(worker.mirror, repo, DIGEST) for repo in (MIRRORED_REPO, OTHER)))
    assert bodies == [BIG, BIG]
    for repo in (MIRRORED_REPO, OTHER):
        await wait_until_stored(worker, DIGEST, repo)
    assert_each_byte_sent_once(site, DIGEST, len(BIG))
