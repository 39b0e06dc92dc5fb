"""Writes, deletions and lists of a mirror. Writes are refused, deletions remove the cached copy, and lists come from
the upstream or from the cache."""

from __future__ import annotations

import pytest

from registry.request import RequestContext, enter_request
from storage.content import digest_of
from storage.errors import BlobUnknown, Denied, ManifestUnknown, NameUnknown, UpstreamUnavailable
from storage.interface import Registry
from storage.names import RepositoryName, Tag, UploadID
from storage.patterns import ALL_NAMES
from storage.tag_history import Availability
from tests.fakes.registry_content import BY, image_of, push_image, read_blob
from tests.unit.registry.mirror.conftest import MIRRORED_REPO, UPSTREAM_REPO, MirrorSite, MirrorWorker

TAG = Tag("1")


async def test_writes_are_denied(site: MirrorSite, worker: MirrorWorker) -> None:
    """Pushes to a mirrored repository are denied. The error says why, and what the client can do instead."""
    image = site.upstream.add_image(UPSTREAM_REPO, b"layer")
    upload = UploadID.random()
    for write in (
        worker.mirror.start_upload(MIRRORED_REPO),
        worker.mirror.resume_upload(MIRRORED_REPO, upload),
        worker.mirror.upload_offset(MIRRORED_REPO, upload),
        worker.mirror.mount_blob(MIRRORED_REPO, digest_of(b"layer"), ALL_NAMES, BY),
        worker.mirror.put_manifest(MIRRORED_REPO, image, [TAG], by=BY),
    ):
        with pytest.raises(Denied, match=r"library/app is mirrored from docker\.io; push under another name"):
            await write


async def test_a_blob_in_use_can_be_deleted_from_the_cache(site: MirrorSite, worker: MirrorWorker) -> None:
    """A mirrored blob can be deleted although cached manifests refer to it. When the next client requests the blob, it
    is fetched again."""
    site.upstream.add_image(UPSTREAM_REPO, b"layer")
    await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
    assert await read_blob(worker.mirror, MIRRORED_REPO, digest_of(b"layer")) == b"layer"
    await worker.mirror.delete_blob(MIRRORED_REPO, digest_of(b"layer"), by=BY)
    with pytest.raises(BlobUnknown):
        await worker.store.resolve_blob(MIRRORED_REPO, digest_of(b"layer"))
    assert await read_blob(worker.mirror, MIRRORED_REPO, digest_of(b"layer")) == b"layer"


async def test_a_delete_removes_the_cached_copy(site: MirrorSite, worker: MirrorWorker) -> None:
    """A DELETE of a mirrored tag, manifest or blob deletes the cached copy. The next client gets the content that the
    upstream has at that time."""
    old = site.upstream.add_image(UPSTREAM_REPO, b"old")
    await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
    assert await read_blob(worker.mirror, MIRRORED_REPO, digest_of(b"old")) == b"old"
    new = site.upstream.add_image(UPSTREAM_REPO, b"new")
    await worker.mirror.delete_tag(MIRRORED_REPO, TAG, by=BY)
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, TAG)).digest == new.digest
    await worker.mirror.delete_manifest(MIRRORED_REPO, new.digest, by=BY)
    history = (await worker.store.tag_history.changes(MIRRORED_REPO, TAG, None, 10)).items
    assert {change.availability for change in history if change.digest == new.digest} == {Availability.GONE}
    await worker.mirror.delete_blob(MIRRORED_REPO, digest_of(b"old"), by=BY)
    with pytest.raises(ManifestUnknown):
        await worker.store.get_manifest(MIRRORED_REPO, new.digest)
    with pytest.raises(BlobUnknown):
        await worker.store.resolve_blob(MIRRORED_REPO, digest_of(b"old"))
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, TAG)).digest == new.digest
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, old.digest)).digest == old.digest
    assert await read_blob(worker.mirror, MIRRORED_REPO, digest_of(b"old")) == b"old"


async def test_a_delete_clears_a_cached_not_found(site: MirrorSite, worker: MirrorWorker) -> None:
    """The mirror caches for a while that the upstream does not have a tag. A DELETE of this tag clears this record."""
    with pytest.raises(ManifestUnknown):
        await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
    site.upstream.add_image(UPSTREAM_REPO, b"layer")
    with pytest.raises((ManifestUnknown, NameUnknown)):
        await worker.mirror.delete_tag(MIRRORED_REPO, TAG, by=BY)
    await worker.mirror.get_manifest(MIRRORED_REPO, TAG)


async def test_tags_are_listed_by_the_upstream_or_from_the_cache(site: MirrorSite, worker: MirrorWorker) -> None:
    """The upstream's tags are listed. While the upstream is down, the cached tags are listed, with a notice."""
    enter_request(request := RequestContext())
    site.upstream.add_image(UPSTREAM_REPO, b"layer", tags=("1", "2", "3"))
    await worker.mirror.get_manifest(MIRRORED_REPO, Tag("2"))
    page = await worker.mirror.tags(MIRRORED_REPO, "1", 1)
    assert (list(page.items), page.more) == (["2"], True)
    assert request.notice is None
    site.upstream.faults.down = UpstreamUnavailable()
    assert list((await worker.mirror.tags(MIRRORED_REPO, None, 10)).items) == ["2"]
    assert request.notice is not None
    with pytest.raises(UpstreamUnavailable):
        await worker.mirror.tags(RepositoryName("docker.io/library/never"), None, 10)


async def test_referrers_are_listed_by_the_upstream_or_from_the_cache(site: MirrorSite, worker: MirrorWorker) -> None:
    """The upstream's referrers are listed, in pages, and filtered by artifact type. While the upstream is down, the
    cached referrers are listed, with a notice."""
    enter_request(request := RequestContext())
    image = site.upstream.add_image(UPSTREAM_REPO, b"layer")
    signatures = [
        site.upstream.add_manifest(
            UPSTREAM_REPO,
            image_of(site.upstream.add_blob(UPSTREAM_REPO, text), subject=image.digest, artifactType=artifact_type),
        )
        for text, artifact_type in ((b"a", "sig/x"), (b"b", "sig/y"))
    ]
    page = await worker.mirror.referrers(MIRRORED_REPO, image.digest, None, None, 10)
    digests = [referrer.digest for referrer in page.items]
    assert digests == sorted(signature.digest for signature in signatures)
    first = await worker.mirror.referrers(MIRRORED_REPO, image.digest, None, None, 1)
    assert ([referrer.digest for referrer in first.items], first.more) == (digests[:1], True)
    rest = await worker.mirror.referrers(MIRRORED_REPO, image.digest, None, digests[0], 10)
    assert ([referrer.digest for referrer in rest.items], rest.more) == (digests[1:], False)
    filtered = await worker.mirror.referrers(MIRRORED_REPO, image.digest, "sig/y", None, 10)
    assert [referrer.digest for referrer in filtered.items] == [signatures[1].digest]
    assert request.notice is None
    await worker.mirror.get_manifest(MIRRORED_REPO, signatures[0].digest)
    site.upstream.faults.down = UpstreamUnavailable()
    page = await worker.mirror.referrers(MIRRORED_REPO, image.digest, None, None, 10)
    assert [referrer.digest for referrer in page.items] == [signatures[0].digest]
    assert request.notice is not None


async def test_only_repositories_with_cached_content_are_listed(site: MirrorSite, worker: MirrorWorker) -> None:
    """The mirror lists the mirrored repositories that have cached content, and no hosted repositories."""
    for name in ("a/hosted", "docker.io", "docker.iox/y", "team/app"):
        await push_image(worker.store, RepositoryName(name), "seed", "1")
    for name in ("one", "two"):
        site.upstream.add_image(f"library/{name}", b"layer")
        await worker.mirror.get_manifest(RepositoryName(f"docker.io/library/{name}"), TAG)
    page = await worker.mirror.repositories(None, 10)
    assert (list(page.items), page.more) == (["docker.io/library/one", "docker.io/library/two"], False)
    page = await worker.mirror.repositories(None, 1)
    assert (list(page.items), page.more) == (["docker.io/library/one"], True)
    page = await worker.mirror.repositories("docker.io/library/one", 1)
    assert list(page.items) == ["docker.io/library/two"]


async def test_a_name_of_another_upstream_is_unknown(worker: MirrorWorker) -> None:
    """A repository name that does not belong to the mirror's upstream is unknown."""
    with pytest.raises(NameUnknown):
        await worker.mirror.get_manifest(RepositoryName("team/app"), TAG)


def test_a_mirror_implements_the_registry_interface(site: MirrorSite) -> None:
    """`Mirror` implements all methods of `Registry`."""
    from registry.mirror.mirror import Mirror

    assert issubclass(Mirror, Registry)
