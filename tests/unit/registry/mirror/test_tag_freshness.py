"""Tags and manifests through the mirror: how long they are fresh, and what clients get when the upstream does not
answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from registry.mirror.upstream_client import UnconfirmedManifestUnknown
from registry.request import RequestContext, enter_request
from storage.content import Manifest, digest_of
from storage.errors import BlobUnknown, Denied, ManifestUnknown, TooManyRequests, UpstreamTimeout, UpstreamUnavailable
from storage.names import Digest, Tag
from tests.fakes.registry_content import index_of
from tests.unit.registry.conftest import wait_until
from tests.unit.registry.mirror.conftest import MIRRORED_REPO, UPSTREAM_REPO, MirrorStore, MirrorWorker

TAG = Tag("1")


@pytest.fixture
async def worker(site: MirrorStore) -> AsyncIterator[MirrorWorker]:
    site.configure(tag_ttl=300, miss_ttl=60)
    async with site.worker() as opened:
        yield opened


async def test_a_new_tag_costs_one_get(site: MirrorStore, worker: MirrorWorker) -> None:
    """The first HEAD of a tag, and the GETs by tag and digest after it, cost one upstream request."""
    image = site.far.add_image(UPSTREAM_REPO, b"layer")
    assert (await worker.mirror.resolve_manifest(MIRRORED_REPO, TAG)).digest == image.digest
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, TAG)).body == image.body
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, image.digest)).body == image.body
    assert site.far.calls == {"get manifest": 1}


async def test_many_ask_once(site: MirrorStore) -> None:
    """Many clients of two workers that request a new tag at once cost one upstream request, and all get the
    manifest."""
    image = site.far.add_image(UPSTREAM_REPO, b"layer")
    site.far.faults.hold = asyncio.Event()
    async with site.worker() as one, site.worker() as two:
        asking = [asyncio.create_task(w.mirror.get_manifest(MIRRORED_REPO, TAG)) for w in (one, two) for _ in range(16)]
        await wait_until(lambda: site.far.calls["get manifest"] == 1)
        site.far.faults.hold.set()
        assert {m.digest for m in await asyncio.gather(*asking)} == {image.digest}
        assert site.far.calls == {"get manifest": 1}


async def test_a_waiter_that_leaves_ends_nothing(site: MirrorStore, worker: MirrorWorker) -> None:
    """A client that disconnects while the upstream is asked does not end the request for others."""
    site.far.add_image(UPSTREAM_REPO, b"layer")
    site.far.faults.hold = asyncio.Event()
    first = asyncio.create_task(worker.mirror.get_manifest(MIRRORED_REPO, TAG))
    second = asyncio.create_task(worker.mirror.get_manifest(MIRRORED_REPO, TAG))
    await wait_until(lambda: site.far.calls["get manifest"] == 1)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    site.far.faults.hold.set()
    await second
    assert site.far.calls == {"get manifest": 1}


async def test_a_fresh_tag_asks_nobody(site: MirrorStore, worker: MirrorWorker) -> None:
    """A fresh tag is served from the store, also while the upstream is down."""
    enter_request(request := RequestContext())
    await pulled(site, worker)
    site.clock.now += 299
    site.far.faults.down = UpstreamUnavailable()
    await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
    assert site.far.calls == {"get manifest": 1}
    assert request.notice is None


async def pulled(site: MirrorStore, worker: MirrorWorker) -> Manifest:
    image = site.far.add_image(UPSTREAM_REPO, b"layer")
    await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
    return image


async def test_an_expired_tag_is_served_and_asked_for(site: MirrorStore, worker: MirrorWorker) -> None:
    """A stale tag is served at once while the upstream is asked. The next client gets the new manifest."""
    image = await pulled(site, worker)
    newer = site.far.add_image(UPSTREAM_REPO, b"a newer layer")
    site.clock.now += 400
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, TAG)).digest == image.digest
    await wait_until(lambda: site.far.calls["get manifest"] == 2)
    await wait_until(lambda: not worker.mirror.busy)
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, TAG)).digest == newer.digest
    assert site.far.calls == {"get manifest": 2, "head manifest": 1}


async def test_a_long_expired_tag_is_asked_for_first(site: MirrorStore, worker: MirrorWorker) -> None:
    """For a tag that expired long ago, the upstream is asked first: one HEAD if the tag has not changed."""
    image = await pulled(site, worker)
    site.clock.now += 601
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, TAG)).digest == image.digest
    assert site.far.calls == {"get manifest": 1, "head manifest": 1}
    newer = site.far.add_image(UPSTREAM_REPO, b"a newer layer")
    site.clock.now += 601
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, TAG)).digest == newer.digest
    assert site.far.calls == {"get manifest": 2, "head manifest": 2}
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, image.digest)).digest == image.digest


async def test_patterns(site: MirrorStore) -> None:
    """The first pattern that matches a tag sets its time to live."""
    site.configure(tag_ttls={"v*": 3600, "*": 10})
    site.far.add_image(UPSTREAM_REPO, b"layer", tags=("v1", "nightly"))
    async with site.worker() as worker:
        for tag in ("v1", "nightly"):
            await worker.mirror.get_manifest(MIRRORED_REPO, Tag(tag))
        site.clock.now += 3000
        for tag in ("v1", "nightly"):
            await worker.mirror.get_manifest(MIRRORED_REPO, Tag(tag))
        assert site.far.calls == {"get manifest": 2, "head manifest": 1}


@pytest.mark.parametrize(
    "error",
    [
        UpstreamUnavailable("it refuses connections"),
        UpstreamTimeout(),
        TooManyRequests(retry_after=60),
        UnconfirmedManifestUnknown(),
        Denied("it refuses the login configured for it"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_stale_if_error(site: MirrorStore, worker: MirrorWorker, error: Exception) -> None:
    """While the upstream fails, refuses our login, or an unconfirmed answer says that there is no such tag, a tag of
    any age is served with a notice. It is not dropped."""
    enter_request(request := RequestContext())
    image = await pulled(site, worker)
    site.clock.now += 30 * 86400
    site.far.faults.down = error  # type: ignore[assignment]
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, TAG)).digest == image.digest
    told = request.notice
    assert told is not None
    assert "docker.io/library/app:1" in told
    assert "30d" in told
    assert told.isascii()
    assert '"' not in told
    assert (await worker.store.resolve_manifest(MIRRORED_REPO, TAG)).digest == image.digest
    site.far.faults.down = UpstreamUnavailable()
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, TAG)).digest == image.digest


@pytest.mark.parametrize("by", ["tag", "digest"])
async def test_an_unconfirmed_unknown_is_not_cached(site: MirrorStore, worker: MirrorWorker, by: str) -> None:
    """An "unknown" that the upstream registry itself may not have sent says nothing about the manifest: the next
    request asks again."""
    image = site.far.add_image(UPSTREAM_REPO, b"layer")
    reference = TAG if by == "tag" else image.digest
    site.far.faults.down = UnconfirmedManifestUnknown()
    with pytest.raises(ManifestUnknown):
        await worker.mirror.get_manifest(MIRRORED_REPO, reference)
    site.far.faults.down = None
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, reference)).digest == image.digest


async def test_a_slow_upstream_is_not_waited_for(site: MirrorStore) -> None:
    """A client that can get a stale copy does not wait long for a stalled upstream."""
    enter_request(request := RequestContext())
    site.stale_wait = 0.02
    async with site.worker() as worker:
        image = await pulled(site, worker)
        site.clock.now += 3600
        site.far.faults.hold = asyncio.Event()
        assert (await worker.mirror.get_manifest(MIRRORED_REPO, TAG)).digest == image.digest
    told = request.notice
    assert told is not None
    assert "slow" in told


async def test_errors_without_anything_older(site: MirrorStore, worker: MirrorWorker) -> None:
    """Without a cached copy the upstream's error is raised, and it is not cached as "unknown"."""
    site.far.add_image(UPSTREAM_REPO, b"layer")
    for error in (UpstreamUnavailable(), UpstreamTimeout(), TooManyRequests(retry_after=7), Denied()):
        site.far.faults.down = error
        with pytest.raises(type(error)):
            await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
    site.far.faults.down = None
    await worker.mirror.get_manifest(MIRRORED_REPO, TAG)


async def test_few_requests_left(site: MirrorStore, worker: MirrorWorker) -> None:
    """If few requests are left, an expired tag is served without asking the upstream. A tag that is not cached is still
    requested."""
    enter_request(request := RequestContext())
    await pulled(site, worker)
    other = site.far.add_image(UPSTREAM_REPO, b"other", tags=("2",))
    site.far.faults.few_left = True
    for age in (400, 4000):
        site.clock.now += age
        await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
    assert request.notice is not None
    assert site.far.calls == {"get manifest": 1}
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, Tag("2"))).digest == other.digest


@pytest.mark.parametrize("reference", [TAG, digest_of(b"no manifest")])
async def test_unknown_is_remembered_for_a_moment(
    site: MirrorStore, worker: MirrorWorker, reference: Tag | Digest
) -> None:
    """After the upstream has said that it does not have a manifest, no worker asks for it again for a short time."""
    async with site.worker() as other:
        for mirror in (worker.mirror, other.mirror, worker.mirror):
            with pytest.raises(ManifestUnknown):
                await mirror.get_manifest(MIRRORED_REPO, reference)
        assert site.far.calls == {"get manifest": 1}
        site.clock.now += 61
        with pytest.raises(ManifestUnknown):
            await other.mirror.get_manifest(MIRRORED_REPO, reference)
        assert site.far.calls == {"get manifest": 2}


async def test_a_tag_that_is_gone(site: MirrorStore, worker: MirrorWorker) -> None:
    """A tag that the upstream has deleted is dropped at its next check. Its manifest can still be pulled by digest."""
    image = await pulled(site, worker)
    del site.far.manifests[UPSTREAM_REPO, TAG]
    site.clock.now += 3600
    with pytest.raises(ManifestUnknown):
        await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, image.digest)).digest == image.digest
    assert site.far.calls == {"get manifest": 1, "head manifest": 1}


async def test_a_digest_never_expires(site: MirrorStore, worker: MirrorWorker) -> None:
    """A cached manifest is served by digest for ever without asking the upstream."""
    image = await pulled(site, worker)
    site.clock.now += 10 * 365 * 86400
    site.far.faults.down = UpstreamUnavailable()
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, image.digest)).body == image.body
    assert site.far.calls == {"get manifest": 1}


async def test_an_index_brings_only_itself(site: MirrorStore, worker: MirrorWorker) -> None:
    """Pulling an index fetches only the manifests that are requested."""
    one, two = (site.far.add_image(UPSTREAM_REPO, text, tags=()) for text in (b"amd64", b"arm64"))
    index = site.far.add_manifest(UPSTREAM_REPO, index_of([one.descriptor, two.descriptor]), "1")
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, TAG)).digest == index.digest
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, two.digest)).digest == two.digest
    with pytest.raises(ManifestUnknown):
        await worker.store.get_manifest(MIRRORED_REPO, one.digest)


async def test_it_survives_a_restart(site: MirrorStore) -> None:
    """After a restart, cached content is served while the upstream is off, and the upstream is not contacted."""
    async with site.worker() as worker:
        image = await pulled(site, worker)
    site.far.closed = False
    site.far.faults.down = UpstreamUnavailable()
    async with site.worker() as worker:
        assert (await worker.mirror.get_manifest(MIRRORED_REPO, TAG)).digest == image.digest
        assert site.far.calls == {"get manifest": 1}


async def test_a_clock_set_back(site: MirrorStore, worker: MirrorWorker) -> None:
    """After the clock is set back, a tag does not stay fresh for years."""
    await pulled(site, worker)
    site.clock.now -= 10 * 86400
    await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
    assert site.far.calls["head manifest"] == 1


async def test_a_forced_renewal(site: MirrorStore, worker: MirrorWorker) -> None:
    """With `force`, a fresh tag is checked at the upstream. The result says whether the upstream answered."""
    await pulled(site, worker)
    newer = site.far.add_image(UPSTREAM_REPO, b"a newer layer")
    assert await worker.mirror.revalidate(MIRRORED_REPO, TAG) is None
    assert site.far.calls == {"get manifest": 1}
    site.far.faults.few_left = True
    assert await worker.mirror.revalidate(MIRRORED_REPO, TAG, force=True) is None
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, TAG)).digest == newer.digest
    site.far.faults.down = UpstreamUnavailable("it refuses connections")
    assert "it refuses connections" in str(await worker.mirror.revalidate(MIRRORED_REPO, TAG, force=True))
    site.far.faults.down = None
    del site.far.manifests[UPSTREAM_REPO, TAG]
    with pytest.raises(ManifestUnknown):
        await worker.mirror.revalidate(MIRRORED_REPO, TAG, force=True)


async def test_workers_do_not_wait_one_after_the_other(site: MirrorStore) -> None:
    """If one worker waited for an upstream that then failed, the workers that waited for its lease fail at once,
    instead of waiting for the upstream themselves."""
    site.stale_wait = 0.02
    site.far.faults.hold = asyncio.Event()
    site.far.faults.down = UpstreamTimeout()
    async with site.worker() as one, site.worker() as two:
        asking = [asyncio.create_task(worker.mirror.get_manifest(MIRRORED_REPO, TAG)) for worker in (one, two)]
        await wait_until(lambda: site.far.calls["get manifest"] == 1)
        late = asyncio.get_running_loop().time() + 2 * site.stale_wait
        await wait_until(lambda: asyncio.get_running_loop().time() > late)
        site.far.faults.hold.set()
        for outcome in await asyncio.gather(*asking, return_exceptions=True):
            assert isinstance(outcome, UpstreamTimeout)
    assert site.far.calls == {"get manifest": 1}


async def test_a_full_disk_takes_nothing_away(site: MirrorStore, worker: MirrorWorker) -> None:
    """While nothing can be written, a cached tag is served, even if the upstream has a newer one. Tags that are not
    cached are unknown."""
    enter_request(request := RequestContext())
    image = await pulled(site, worker)
    site.disk.full = True
    for newer in (False, True):
        if newer:
            site.far.add_image(UPSTREAM_REPO, b"a newer layer")
        site.clock.now += 601
        assert (await worker.mirror.get_manifest(MIRRORED_REPO, TAG)).digest == image.digest
        assert (request.notice is not None) is newer
    with pytest.raises(ManifestUnknown):
        await worker.mirror.get_manifest(MIRRORED_REPO, Tag("none"))
    with pytest.raises(BlobUnknown):
        await worker.mirror.resolve_blob(MIRRORED_REPO, digest_of(b"none"))
