"""Which blobs a repository of a mirror has: only those that its upstream confirms or that its manifests name."""

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
    MirrorStore,
    MirrorWorker,
    begin_pull,
    read,
    sent_once,
    source_of_another_worker,
    stored,
)

pytestmark = pytest.mark.slow


async def test_unknown_blobs(site: MirrorStore, worker: MirrorWorker) -> None:
    """A blob that the upstream does not have is unknown. No worker asks for it again for a short time."""
    async with site.worker() as other:
        for _ in range(2):
            for mirror in (worker.mirror, other.mirror):
                with pytest.raises(BlobUnknown):
                    await mirror.open_blob(MIRRORED_REPO, missing_digest())
                with pytest.raises(BlobUnknown):
                    await mirror.resolve_blob(MIRRORED_REPO, missing_digest())
        assert site.far.calls == {"head blob": 1}
        site.clock.now += 61
        with pytest.raises(BlobUnknown):
            await worker.mirror.open_blob(MIRRORED_REPO, missing_digest())
        assert site.far.calls == {"head blob": 2}


async def test_a_manifest_names_what_is_not_there(site: MirrorStore, worker: MirrorWorker) -> None:
    """A blob that a manifest names and the upstream does not have is reported as unknown before any header is sent."""
    await begin_pull(site, worker)
    del site.far.blobs[UPSTREAM_REPO, DIGEST]
    for _ in range(2):
        with pytest.raises(BlobUnknown):
            await worker.mirror.open_blob(MIRRORED_REPO, DIGEST)
    assert site.far.calls["get blob"] == 1


async def test_no_manifest_hides_a_blob(site: MirrorStore, worker: MirrorWorker) -> None:
    """Unknown manifests, by tag or digest, never make a blob of the repository unknown."""
    await begin_pull(site, worker)
    names = [Tag(f"{before}{DIGEST.algorithm}{dot}{DIGEST.encoded}") for before in ("_blob.", "blob.") for dot in ".-_"]
    references: list[Reference] = [DIGEST, *names]
    for reference in references:
        with pytest.raises(ManifestUnknown):
            await worker.mirror.get_manifest(MIRRORED_REPO, reference)
    assert await read_blob(worker.mirror, MIRRORED_REPO, DIGEST) == BIG


async def test_what_is_hosted_here_is_not_given_out(site: MirrorStore, worker: MirrorWorker) -> None:
    """A blob of a hosted repository or of another upstream cannot be read through a mirrored repository, even if a
    manifest there names its digest. If the upstream has the blob, it sends it itself."""
    await push_blob(worker.store, RepositoryName("team/secret"), BIG)
    await push_blob(worker.store, RepositoryName("docker.io.example/secret"), BIG)
    with pytest.raises(BlobUnknown):
        await worker.mirror.open_blob(MIRRORED_REPO, DIGEST)
    await begin_pull(site, worker)
    del site.far.blobs[UPSTREAM_REPO, DIGEST]
    site.clock.now += 61
    with pytest.raises(BlobUnknown):
        await worker.mirror.open_blob(MIRRORED_REPO, DIGEST)
    site.clock.now += 61
    site.far.add_blob(UPSTREAM_REPO, BIG)
    assert await read_blob(worker.mirror, MIRRORED_REPO, DIGEST) == BIG
    sent_once(site, DIGEST, len(BIG))
    await stored(worker, DIGEST, MIRRORED_REPO)


async def test_repositories_of_one_upstream_share_what_is_stored(site: MirrorStore, worker: MirrorWorker) -> None:
    """A stored blob is served from another repository of the same upstream if a manifest there names it, without
    another fetch. It is not served from a repository that does not have it, as the upstream says."""
    await begin_pull(site, worker)
    assert await read_blob(worker.mirror, MIRRORED_REPO, DIGEST) == BIG
    await stored(worker, DIGEST, MIRRORED_REPO)
    with pytest.raises(BlobUnknown):
        await worker.mirror.open_blob(RepositoryName("docker.io/library/third"), DIGEST)
    site.far.add_image("library/other", BIG)
    await worker.mirror.get_manifest(OTHER, Tag("1"))
    assert await read_blob(worker.mirror, OTHER, DIGEST) == BIG
    sent_once(site, DIGEST, len(BIG))


@pytest.mark.parametrize("private", [False, True])
async def test_what_is_stored_is_shared_on_a_full_disk(site: MirrorStore, private: bool) -> None:
    """A stored blob is served from a repository that may have it, even if the disk is too full to record the link."""
    site.configure(require_grant=private)
    site.far.add_image(UPSTREAM_REPO, BIG)
    site.far.add_image("library/other", BIG)
    async with site.worker() as worker:
        for repo in (MIRRORED_REPO, OTHER):
            await worker.mirror.get_manifest(repo, Tag("1"))
        assert await read_blob(worker.mirror, MIRRORED_REPO, DIGEST) == BIG
        site.disk.full = True
        assert await read_blob(worker.mirror, OTHER, DIGEST) == BIG
        site.disk.full = False
    sent_once(site, DIGEST, len(BIG))


async def test_a_private_upstream_is_asked_for_each_repository(site: MirrorStore) -> None:
    """The upstream is asked once for each repository, over all readers and workers, before a reader joins a fill of
    another repository."""
    site.configure(require_grant=True)
    site.far.add_image(UPSTREAM_REPO, BIG)
    site.far.add_image("library/other", BIG)
    third = RepositoryName("docker.io/library/third")
    site.far.add_manifest(
        "library/third", image_of(site.far.add_blob("library/third", b"{}"), [descriptor_of(BIG)]), "1"
    )
    gate = site.far.faults.gates[MIB] = threading.Event()
    async with site.worker() as one, site.worker(source_of_another_worker(site)) as two:
        for repo in (MIRRORED_REPO, OTHER, third):
            await one.mirror.get_manifest(repo, Tag("1"))
        first = await one.mirror.open_blob(MIRRORED_REPO, DIGEST)
        for worker in (one, two):
            with pytest.raises(BlobUnknown):
                await worker.mirror.open_blob(third, DIGEST)
            with pytest.raises(BlobUnknown):
                await worker.mirror.resolve_blob(third, DIGEST)
        reading = [
            asyncio.create_task(read_blob(one.mirror, repo, DIGEST))
            for repo in (MIRRORED_REPO, OTHER, OTHER, MIRRORED_REPO)
        ]
        await wait_until(lambda: site.far.calls["head blob"] == 3)
        gate.set()
        assert await asyncio.gather(read(first), *reading) == [BIG] * 5
        site.far.faults.down = UpstreamUnavailable()
        for worker in (one, two):
            for repo in (MIRRORED_REPO, OTHER):
                assert await read_blob(worker.mirror, repo, DIGEST) == BIG
        assert site.far.calls["head blob"] == 3
    sent_once(site, DIGEST, len(BIG))


@pytest.mark.parametrize("stored", [True, False])
async def test_a_size_that_is_not_the_blob_s_entitles_nobody(site: MirrorStore, stored: bool) -> None:
    """For a repository without the blob, the upstream redirects to a login page: status 200, with the length of this
    page. Such a response gives access neither to the stored blob nor to a running fill of another repository."""
    site.configure(require_grant=True)
    site.far.add_image(UPSTREAM_REPO, BIG)
    page = b"<html>log in</html>"
    site.far.add_manifest(
        "library/other", image_of(site.far.add_blob("library/other", b"{}"), [descriptor_of(BIG)]), "1"
    )
    site.far.blobs["library/other", DIGEST] = page
    gate = threading.Event()
    async with site.worker() as worker:
        for repo in (MIRRORED_REPO, OTHER):
            await worker.mirror.get_manifest(repo, Tag("1"))
        if stored:
            assert await read_blob(worker.mirror, MIRRORED_REPO, DIGEST) == BIG
        else:
            site.far.faults.gates[MIB] = gate
            first = await worker.mirror.open_blob(MIRRORED_REPO, DIGEST)
        assert not (await worker.mirror.resolve_blob(OTHER, DIGEST)).verified
        with pytest.raises(RegistryError):
            await read_blob(worker.mirror, OTHER, DIGEST)
        assert not await worker.store.records.is_confirmed(OTHER, DIGEST)
        if not stored:
            gate.set()
            assert await read(first) == BIG
            with pytest.raises(RegistryError):
                await read_blob(worker.mirror, OTHER, DIGEST)
        assert not await worker.store.records.is_confirmed(OTHER, DIGEST)
        assert await worker.store.records.is_confirmed(MIRRORED_REPO, DIGEST)


async def test_a_doubtful_no_is_not_remembered(site: MirrorStore, worker: MirrorWorker) -> None:
    """If a firewall answers in place of the upstream, the client gets BlobUnknown, but the next request asks the
    upstream again, for the size and for the blob."""
    site.far.faults.down = UnconfirmedBlobUnknown()
    loose = site.far.add_blob(UPSTREAM_REPO, b"named by no manifest here")
    with pytest.raises(UnconfirmedBlobUnknown):
        await worker.mirror.open_blob(MIRRORED_REPO, loose.digest)
    site.far.faults.down = None
    assert await read_blob(worker.mirror, MIRRORED_REPO, loose.digest) == b"named by no manifest here"
    await begin_pull(site, worker)
    site.far.faults.down = UnconfirmedBlobUnknown()
    with pytest.raises(UnconfirmedBlobUnknown):
        await worker.mirror.open_blob(MIRRORED_REPO, DIGEST)
    site.far.faults.down = None
    assert await read_blob(worker.mirror, MIRRORED_REPO, DIGEST) == BIG


async def test_two_repositories_share_a_fill(site: MirrorStore, worker: MirrorWorker) -> None:
    """A layer requested in two repositories at once is fetched once and stored for both."""
    await begin_pull(site, worker)
    site.far.add_image("library/other", BIG)
    await worker.mirror.get_manifest(OTHER, Tag("1"))
    got = await asyncio.gather(*(read_blob(worker.mirror, repo, DIGEST) for repo in (MIRRORED_REPO, OTHER)))
    assert got == [BIG, BIG]
    for repo in (MIRRORED_REPO, OTHER):
        await stored(worker, DIGEST, repo)
    sent_once(site, DIGEST, len(BIG))
