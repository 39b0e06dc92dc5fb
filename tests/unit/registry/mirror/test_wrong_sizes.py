"""A mirror serves the right bytes of a blob even if manifests state a wrong size of the blob."""

from __future__ import annotations

from dataclasses import replace

import pytest

from registry.mirror.blob_sizes import SIZE_REMEMBERED_SECONDS
from storage.content import Descriptor, Span, digest_of
from storage.errors import (
    BlobUnknown,
    Denied,
    RegistryError,
    TooManyRequests,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from storage.names import Digest, RepositoryName, Tag
from tests.fakes.registry_content import descriptor_of, image_of, read_blob
from tests.unit.registry.mirror.conftest import (
    BIG,
    DIGEST,
    MIB,
    MIRRORED_REPO,
    OTHER,
    UPSTREAM_REPO,
    MirrorSite,
    MirrorWorker,
    begin_pull,
    wait_until_stored,
)

pytestmark = pytest.mark.slow

SMALL = b"a small blob"


async def pull_wrong_manifest(site: MirrorSite, worker: MirrorWorker, layer: bytes, size: int, tag: str) -> None:
    """Pulls the manifest of an image that states `size` as the size of its layer."""
    config = site.upstream.add_blob(UPSTREAM_REPO, f'{{"author": "{tag}"}}'.encode())
    wrong_layer = replace(site.upstream.add_blob(UPSTREAM_REPO, layer), size=size)
    site.upstream.add_manifest(UPSTREAM_REPO, image_of(config, [wrong_layer]), tag)
    site.clock.now += 1
    await worker.mirror.get_manifest(MIRRORED_REPO, Tag(tag))


@pytest.mark.parametrize(
    ("layer", "size"), [(BIG, 100), (BIG, 9 * MIB), (BIG, len(BIG) + 1), (SMALL, 1), (SMALL, 9 * MIB)]
)
async def test_newer_manifest_with_a_wrong_size(
    site: MirrorSite, worker: MirrorWorker, layer: bytes, size: int
) -> None:
    """If the newest manifest that names a blob states another size than an older one, the upstream is asked for the
    size, once. HEAD and GET requests of clients then get the right size and the right bytes."""
    await begin_pull(site, worker, layer)
    await pull_wrong_manifest(site, worker, layer, size, "wrong")
    digest = digest_of(layer)
    assert (await worker.mirror.resolve_blob(MIRRORED_REPO, digest)).size == len(layer)
    assert await read_blob(worker.mirror, MIRRORED_REPO, digest) == layer
    assert site.upstream.calls["head blob"] == 1
    assert site.upstream.bytes_sent(digest) == len(layer)


@pytest.mark.parametrize("is_full", [False, True])
@pytest.mark.parametrize("layer", [BIG, SMALL])
async def test_all_manifests_state_a_wrong_size(
    site: MirrorSite, worker: MirrorWorker, layer: bytes, is_full: bool
) -> None:
    """If the upstream sends a blob of another size than all manifests state, it is asked for the size, and the client
    gets the right bytes. This holds also if the disk is too full to store the blob."""
    site.disk.refuses_blobs = is_full
    await pull_wrong_manifest(site, worker, layer, 9 * MIB, "wrong")
    digest = digest_of(layer)
    assert await read_blob(worker.mirror, MIRRORED_REPO, digest) == layer
    assert await read_blob(worker.mirror, MIRRORED_REPO, digest, Span(-4)) == layer[-4:]
    assert (await worker.mirror.resolve_blob(MIRRORED_REPO, digest)).size == len(layer)
    assert site.upstream.calls["head blob"] == 1


async def test_more_wrong_manifests_than_are_read(site: MirrorSite, worker: MirrorWorker) -> None:
    """A blob can be read even if so many newer manifests state a wrong size that the one with the right size is not
    read."""
    await begin_pull(site, worker, SMALL)
    for number in range(9):
        await pull_wrong_manifest(site, worker, SMALL, 100, f"wrong{number}")
    assert await read_blob(worker.mirror, MIRRORED_REPO, digest_of(SMALL)) == SMALL


async def test_manifests_that_agree_cost_no_request_for_the_size(site: MirrorSite, worker: MirrorWorker) -> None:
    """The upstream is not asked for the size of a blob if the manifests that name the blob state the same size."""
    await begin_pull(site, worker)
    site.upstream.add_image(UPSTREAM_REPO, BIG, SMALL, tags=("2",))
    await worker.mirror.get_manifest(MIRRORED_REPO, Tag("2"))
    assert await read_blob(worker.mirror, MIRRORED_REPO, DIGEST) == BIG
    assert site.upstream.calls["head blob"] == 0


async def test_wrong_answer_before_the_manifest_was_pulled(site: MirrorSite, worker: MirrorWorker) -> None:
    """If the upstream answers a HEAD request with a wrong size, for example that of an error page, and the manifest is
    pulled afterwards, the size in the manifest is used."""
    site.upstream.add_blob(UPSTREAM_REPO, SMALL)
    digest = digest_of(SMALL)
    resolve_blob = site.upstream.resolve_blob

    async def resolve_error_page(repo: RepositoryName, digest: Digest) -> Descriptor:
        return replace(await resolve_blob(repo, digest), size=6)

    site.upstream.resolve_blob = resolve_error_page  # type: ignore[method-assign]
    assert (await worker.mirror.resolve_blob(MIRRORED_REPO, digest)).size == 6
    await begin_pull(site, worker, SMALL)
    assert (await worker.mirror.resolve_blob(MIRRORED_REPO, digest)).size == len(SMALL)
    assert await read_blob(worker.mirror, MIRRORED_REPO, digest) == SMALL


async def test_response_with_another_size_than_the_blob(site: MirrorSite, worker: MirrorWorker) -> None:
    """If the upstream sends something else than the blob, such as an error page with status 200, and states the same
    size as the manifests when it is asked, the client gets an error that names both sizes."""
    await begin_pull(site, worker, SMALL)
    digest = digest_of(SMALL)
    site.upstream.on_fetch = lambda _: site.upstream.blobs.update({(UPSTREAM_REPO, digest): b"<html>"})
    resolve_blob = site.upstream.resolve_blob

    async def resolve_right_blob(repo: RepositoryName, digest: Digest) -> Descriptor:
        return replace(await resolve_blob(repo, digest), size=len(SMALL))

    site.upstream.resolve_blob = resolve_right_blob  # type: ignore[method-assign]
    with pytest.raises(UpstreamUnavailable, match=f"of 6 bytes; {len(SMALL)} bytes were expected"):
        await worker.mirror.open_blob(MIRRORED_REPO, digest)
    assert site.upstream.calls["head blob"] == 1


async def test_size_is_asked_for_the_repository_of_the_client(site: MirrorSite, worker: MirrorWorker) -> None:
    """If manifests of a repository disagree about the size of a blob that the upstream does not have there, the client
    learns no size, although another repository of the upstream has the blob."""
    await begin_pull(site, worker)
    assert await read_blob(worker.mirror, MIRRORED_REPO, DIGEST) == BIG
    await wait_until_stored(worker, DIGEST)
    for size in (1, 2):
        config = site.upstream.add_blob("library/other", b"{}")
        wrong_manifest = image_of(config, [replace(descriptor_of(BIG), size=size)])
        site.upstream.add_manifest("library/other", wrong_manifest, str(size))
        await worker.mirror.get_manifest(OTHER, Tag(str(size)))
    with pytest.raises(BlobUnknown):
        await worker.mirror.resolve_blob(OTHER, DIGEST)
    with pytest.raises(BlobUnknown):
        await worker.mirror.open_blob(OTHER, DIGEST)


@pytest.mark.parametrize("error", [Denied, TooManyRequests, UpstreamTimeout, UpstreamUnavailable])
async def test_stored_blob_is_served_while_the_upstream_is_down(
    site: MirrorSite, worker: MirrorWorker, error: type[RegistryError]
) -> None:
    """If manifests of a repository disagree about the size of a blob, and the upstream gives no answer, the blob is
    served if another repository of the upstream has it in the store."""
    await begin_pull(site, worker)
    assert await read_blob(worker.mirror, MIRRORED_REPO, DIGEST) == BIG
    await wait_until_stored(worker, DIGEST)
    for size in (len(BIG), 1):
        config = site.upstream.add_blob("library/other", b"{}")
        site.upstream.add_manifest(
            "library/other", image_of(config, [replace(descriptor_of(BIG), size=size)]), str(size)
        )
        await worker.mirror.get_manifest(OTHER, Tag(str(size)))

    async def fail(repo: RepositoryName, digest: Digest) -> Descriptor:
        raise error

    site.upstream.resolve_blob = fail  # type: ignore[method-assign]
    assert await read_blob(worker.mirror, OTHER, DIGEST) == BIG
    assert (await worker.mirror.resolve_blob(OTHER, DIGEST)).size == len(BIG)


async def test_upstream_is_asked_again_after_a_while(site: MirrorSite, worker: MirrorWorker) -> None:
    """The size that the upstream has stated is used for a limited time, because the response possibly was an error
    page."""
    await begin_pull(site, worker)
    await pull_wrong_manifest(site, worker, BIG, 100, "wrong")
    for heads, seconds in ((1, 0.0), (1, SIZE_REMEMBERED_SECONDS - 1), (2, 2.0), (2, 0.0)):
        site.monotonic.now += seconds
        assert (await worker.mirror.resolve_blob(MIRRORED_REPO, DIGEST)).size == len(BIG)
        assert site.upstream.calls["head blob"] == heads
