"""Tags and manifests through the mirror: how long they are trusted, and what clients get when upstream does not say."""

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
from tests.unit.registry.mirror.conftest import MIRRORED_REPO, UPSTREAM_REPO, MirrorStore, MirrorWorker, wait_until

TAG = Tag("1")


@pytest.fixture
async def worker(site: MirrorStore) -> AsyncIterator[MirrorWorker]:
    site.configure(tag_ttl=300, miss_ttl=60)
    async with site.worker() as opened:
        yield opened


async def test_a_new_tag_costs_one_get(site: MirrorStore, worker: MirrorWorker) -> None:
    """The first HEAD of a tag, and the GETs by tag and digest after it, cost one request upstream."""
    image = site.far.add_image(UPSTREAM_REPO, b"layer")
    assert (await worker.mirror.resolve_manifest(MIRRORED_REPO, TAG)).digest == image.digest
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, TAG)).body == image.body
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, image.digest)).body == image.body
    assert site.far.calls == {"get manifest": 1}


async def test_many_ask_once(site: MirrorStore) -> None:
    """Many clients of two workers that ask for one new tag at once cost one request, and all get the manifest."""
    image = site.far.add_image(UPSTREAM_REPO, b"layer")
    site.far.faults.hold = asyncio.Event()
    async with site.worker() as one, site.worker() as two:
        asking = [asyncio.create_task(w.mirror.get_manifest(MIRRORED_REPO, TAG)) for w in (one, two) for _ in range(16)]
        await wait_until(lambda: site.far.calls["get manifest"] == 1)
        site.far.faults.hold.set()
        assert {m.digest for m in await asyncio.gather(*asking)} == {image.digest}
        assert site.far.calls == {"get manifest": 1}


async def test_a_waiter_that_leaves_ends_nothing(site: MirrorStore, worker: MirrorWorker) -> None:
    """A client that hangs up while upstream is asked takes nothing from the others who wait."""
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
    """Within its time to live a tag is served from here, also while upstream is down."""
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
    """A tag that expired a moment ago is served at once, and asked for meanwhile: the next client gets the new one."""
    image = await pulled(site, worker)
    newer = site.far.add_image(UPSTREAM_REPO, b"a newer layer")
    site.clock.now += 400
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, TAG)).digest == image.digest
    await wait_until(lambda: site.far.calls["get manifest"] == 2)
    await wait_until(lambda: not worker.mirror.busy)
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, TAG)).digest == newer.digest
    assert site.far.calls == {"get manifest": 2, "head manifest": 1}


async def test_a_long_expired_tag_is_asked_for_first(site: MirrorStore, worker: MirrorWorker) -> None:
    """A tag that expired long ago is asked for before it is served: one HEAD where it has not changed."""
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
    """The first pattern that fits a tag says how long it is trusted."""
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
    """While upstream does not answer, does not let us in, or something that may not be the upstream says that there is
    no such tag, a tag of any age is served as it was, and the client is told so. It stays."""
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


async def test_a_slow_upstream_is_not_waited_for(site: MirrorStore) -> None:
    """A client that can be given something older does not wait long for an upstream that stalls."""
    enter_request(request := RequestContext())
    site.patience = 0.02
    async with site.worker() as worker:
        image = await pulled(site, worker)
        site.clock.now += 3600
        site.far.faults.hold = asyncio.Event()
        assert (await worker.mirror.get_manifest(MIRRORED_REPO, TAG)).digest == image.digest
    told = request.notice
    assert told is not None
    assert "slow" in told


async def test_errors_without_anything_older(site: MirrorStore, worker: MirrorWorker) -> None:
    """With nothing to serve instead, the upstream's trouble is told as it is, and is not remembered as "unknown"."""
    site.far.add_image(UPSTREAM_REPO, b"layer")
    for error in (UpstreamUnavailable(), UpstreamTimeout(), TooManyRequests(retry_after=7), Denied()):
        site.far.faults.down = error
        with pytest.raises(type(error)):
            await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
    site.far.faults.down = None
    await worker.mirror.get_manifest(MIRRORED_REPO, TAG)


async def test_few_requests_left(site: MirrorStore, worker: MirrorWorker) -> None:
    """When few requests are left, an expired tag is served as it was; one that is not here is still asked for."""
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
    """What upstream does not have is not asked for again for a short while, by no worker."""
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
    """A tag that upstream dropped is dropped here once it is asked for; its manifest stays to be had by digest."""
    image = await pulled(site, worker)
    del site.far.manifests[UPSTREAM_REPO, TAG]
    site.clock.now += 3600
    with pytest.raises(ManifestUnknown):
        await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, image.digest)).digest == image.digest
    assert site.far.calls == {"get manifest": 1, "head manifest": 1}


async def test_a_digest_never_expires(site: MirrorStore, worker: MirrorWorker) -> None:
    """A manifest that is here is served by digest for ever, without asking."""
    image = await pulled(site, worker)
    site.clock.now += 10 * 365 * 86400
    site.far.faults.down = UpstreamUnavailable()
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, image.digest)).body == image.body
    assert site.far.calls == {"get manifest": 1}


async def test_an_index_brings_only_itself(site: MirrorStore, worker: MirrorWorker) -> None:
    """Of an index only what is asked for is fetched."""
    one, two = (site.far.add_image(UPSTREAM_REPO, text, tags=()) for text in (b"amd64", b"arm64"))
    index = site.far.add_manifest(UPSTREAM_REPO, index_of([one.descriptor, two.descriptor]), "1")
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, TAG)).digest == index.digest
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, two.digest)).digest == two.digest
    with pytest.raises(ManifestUnknown):
        await worker.store.get_manifest(MIRRORED_REPO, one.digest)


async def test_it_survives_a_restart(site: MirrorStore) -> None:
    """What was pulled is served after a restart, with upstream switched off, which is not even contacted."""
    async with site.worker() as worker:
        image = await pulled(site, worker)
    site.far.closed = False
    site.far.faults.down = UpstreamUnavailable()
    async with site.worker() as worker:
        assert (await worker.mirror.get_manifest(MIRRORED_REPO, TAG)).digest == image.digest
        assert site.far.calls == {"get manifest": 1}


async def test_a_clock_set_back(site: MirrorStore, worker: MirrorWorker) -> None:
    """A clock that was set back does not make a tag fresh for years."""
    await pulled(site, worker)
    site.clock.now -= 10 * 86400
    await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
    assert site.far.calls["head manifest"] == 1


async def test_a_forced_renewal(site: MirrorStore, worker: MirrorWorker) -> None:
    """A tag can be asked for while it is fresh; who asked learns whether upstream could say."""
    await pulled(site, worker)
    newer = site.far.add_image(UPSTREAM_REPO, b"a newer layer")
    assert await worker.mirror.renew(MIRRORED_REPO, TAG) is None
    assert site.far.calls == {"get manifest": 1}
    site.far.faults.few_left = True
    assert await worker.mirror.renew(MIRRORED_REPO, TAG, force=True) is None
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, TAG)).digest == newer.digest
    site.far.faults.down = UpstreamUnavailable("it refuses connections")
    assert "it refuses connections" in str(await worker.mirror.renew(MIRRORED_REPO, TAG, force=True))
    site.far.faults.down = None
    del site.far.manifests[UPSTREAM_REPO, TAG]
    with pytest.raises(ManifestUnknown):
        await worker.mirror.renew(MIRRORED_REPO, TAG, force=True)


async def test_workers_do_not_wait_one_after_the_other(site: MirrorStore) -> None:
    """When one worker waited long for an upstream that then failed, those who waited for their turn fail with it."""
    site.patience = 0.02
    site.far.faults.hold = asyncio.Event()
    site.far.faults.down = UpstreamTimeout()
    async with site.worker() as one, site.worker() as two:
        asking = [asyncio.create_task(worker.mirror.get_manifest(MIRRORED_REPO, TAG)) for worker in (one, two)]
        await wait_until(lambda: site.far.calls["get manifest"] == 1)
        late = asyncio.get_running_loop().time() + 2 * site.patience
        await wait_until(lambda: asyncio.get_running_loop().time() > late)
        site.far.faults.hold.set()
        for outcome in await asyncio.gather(*asking, return_exceptions=True):
            assert isinstance(outcome, UpstreamTimeout)
    assert site.far.calls == {"get manifest": 1}


async def test_a_full_disk_takes_nothing_away(site: MirrorStore, worker: MirrorWorker) -> None:
    """While nothing can be written, a tag that is here is served, outdated where upstream has a newer one, and unknown
    ones are unknown."""
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
