"""What a mirror refuses, lists and drops."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from registry.notices import NOTICE
from storage.content import digest_of
from storage.errors import BlobUnknown, Denied, ManifestUnknown, NameUnknown, UpstreamUnavailable
from storage.interface import Registry
from storage.names import RepositoryName, Tag, UploadID
from storage.patterns import ALL_NAMES
from tests.contract.making import BY, image_of, push_image, read_blob
from tests.mirror.conftest import FAR, HERE, Site, Worker

TAG = Tag("1")


@pytest.fixture
async def worker(site: Site) -> AsyncIterator[Worker]:
    async with site.worker() as opened:
        yield opened


async def test_writes_are_denied(site: Site, worker: Worker) -> None:
    """Nothing can be pushed to a mirrored name; the message says what it is and what to do."""
    image = site.far.add_image(FAR, b"layer")
    upload = UploadID.random()
    for attempt in (
        worker.mirror.start_upload(HERE),
        worker.mirror.resume_upload(HERE, upload),
        worker.mirror.upload_offset(HERE, upload),
        worker.mirror.mount_blob(HERE, digest_of(b"layer"), ALL_NAMES, BY),
        worker.mirror.put_manifest(HERE, image, [TAG], by=BY),
    ):
        with pytest.raises(Denied, match=r"library/app is mirrored from docker\.io; push under another name"):
            await attempt


async def test_a_delete_drops_a_blob_in_use(site: Site, worker: Worker) -> None:
    """A mirrored blob is dropped also while manifests here refer to it: the next client gets what upstream has."""
    site.far.add_image(FAR, b"layer")
    await worker.mirror.get_manifest(HERE, TAG)
    assert await read_blob(worker.mirror, HERE, digest_of(b"layer")) == b"layer"
    await worker.mirror.delete_blob(HERE, digest_of(b"layer"), by=BY)
    with pytest.raises(BlobUnknown):
        await worker.store.resolve_blob(HERE, digest_of(b"layer"))
    assert await read_blob(worker.mirror, HERE, digest_of(b"layer")) == b"layer"


async def test_a_delete_drops_the_copy(site: Site, worker: Worker) -> None:
    """Deleting a mirrored tag, manifest or blob drops what is here; the next client gets what upstream has now."""
    old = site.far.add_image(FAR, b"old")
    await worker.mirror.get_manifest(HERE, TAG)
    assert await read_blob(worker.mirror, HERE, digest_of(b"old")) == b"old"
    new = site.far.add_image(FAR, b"new")
    await worker.mirror.delete_tag(HERE, TAG, by=BY)
    assert (await worker.mirror.get_manifest(HERE, TAG)).digest == new.digest
    await worker.mirror.delete_manifest(HERE, new.digest, by=BY)
    await worker.mirror.delete_blob(HERE, digest_of(b"old"), by=BY)
    with pytest.raises(ManifestUnknown):
        await worker.store.get_manifest(HERE, new.digest)
    with pytest.raises(BlobUnknown):
        await worker.store.resolve_blob(HERE, digest_of(b"old"))
    assert (await worker.mirror.get_manifest(HERE, TAG)).digest == new.digest
    assert (await worker.mirror.get_manifest(HERE, old.digest)).digest == old.digest
    assert await read_blob(worker.mirror, HERE, digest_of(b"old")) == b"old"


async def test_a_delete_forgets_what_was_unknown(site: Site, worker: Worker) -> None:
    """A delete of what is not here makes the mirror ask again at once."""
    with pytest.raises(ManifestUnknown):
        await worker.mirror.get_manifest(HERE, TAG)
    site.far.add_image(FAR, b"layer")
    with pytest.raises((ManifestUnknown, NameUnknown)):
        await worker.mirror.delete_tag(HERE, TAG, by=BY)
    await worker.mirror.get_manifest(HERE, TAG)


async def test_tags(site: Site, worker: Worker) -> None:
    """Upstream's tags are listed; while it is down those that were pulled, and the client is told so."""
    site.far.add_image(FAR, b"layer", tags=("1", "2", "3"))
    await worker.mirror.get_manifest(HERE, Tag("2"))
    page = await worker.mirror.tags(HERE, "1", 1)
    assert (list(page.items), page.more) == (["2"], True)
    assert NOTICE.get() is None
    site.far.faults.down = UpstreamUnavailable()
    assert list((await worker.mirror.tags(HERE, None, 10)).items) == ["2"]
    assert NOTICE.get() is not None
    with pytest.raises(UpstreamUnavailable):
        await worker.mirror.tags(RepositoryName("docker.io/library/never"), None, 10)


async def test_referrers(site: Site, worker: Worker) -> None:
    """Upstream's referrers are listed; while it is down those that were pulled."""
    image = site.far.add_image(FAR, b"layer")
    signatures = [
        site.far.add_manifest(FAR, image_of(site.far.add_blob(FAR, text), subject=image.digest))
        for text in (b"a", b"b")
    ]
    page = await worker.mirror.referrers(HERE, image.digest, None, None, 10)
    assert {found.digest for found in page.items} == {made.digest for made in signatures}
    await worker.mirror.get_manifest(HERE, signatures[0].digest)
    site.far.faults.down = UpstreamUnavailable()
    page = await worker.mirror.referrers(HERE, image.digest, None, None, 10)
    assert [found.digest for found in page.items] == [signatures[0].digest]
    assert NOTICE.get() is not None


async def test_repositories(site: Site, worker: Worker) -> None:
    """The mirror lists its own repositories that were pulled from, and no hosted ones."""
    for name in ("a/hosted", "docker.io", "docker.iox/y", "team/app"):
        await push_image(worker.store, RepositoryName(name), "seed", "1")
    for name in ("one", "two"):
        site.far.add_image(f"library/{name}", b"layer")
        await worker.mirror.get_manifest(RepositoryName(f"docker.io/library/{name}"), TAG)
    page = await worker.mirror.repositories(None, 10)
    assert (list(page.items), page.more) == (["docker.io/library/one", "docker.io/library/two"], False)
    page = await worker.mirror.repositories(None, 1)
    assert (list(page.items), page.more) == (["docker.io/library/one"], True)
    page = await worker.mirror.repositories("docker.io/library/one", 1)
    assert list(page.items) == ["docker.io/library/two"]


async def test_a_name_of_another_upstream(worker: Worker) -> None:
    """A name that is not the upstream's is never asked for there."""
    with pytest.raises(NameUnknown):
        await worker.mirror.get_manifest(RepositoryName("team/app"), TAG)


def test_it_is_a_registry(site: Site) -> None:
    """The mirror is a `Registry` in full."""
    from registry.mirror.mirror import Mirror

    assert issubclass(Mirror, Registry)
