"""How long a mirror serves cached tags and manifests without asking the upstream, and what clients get while the
upstream does not answer. A tag is *fresh* until its time to live has passed since the last check, and *stale* after
that."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from registry.mirror.upstream_client import UnconfirmedManifestUnknown
from registry.request import RequestContext, enter_request
from storage.content import MIRROR_ACTOR, Manifest, UpstreamCheck, digest_of
from storage.data_dir.file_leases import FileLeases
from storage.errors import BlobUnknown, Denied, ManifestUnknown, TooManyRequests, UpstreamTimeout, UpstreamUnavailable
from storage.names import Digest, Reference, RepositoryName, Tag
from tests.fakes.mirror_source import FakeSource
from tests.fakes.registry_content import index_of
from tests.unit.registry.conftest import wait_until
from tests.unit.registry.mirror.conftest import (
    MIRRORED_REPO,
    UPSTREAM_REPO,
    MirrorSite,
    MirrorWorker,
    source_of_another_worker,
)

TAG = Tag("1")


@pytest.fixture
async def worker(site: MirrorSite) -> AsyncIterator[MirrorWorker]:
    site.configure(tag_ttl=300, miss_ttl=60)
    async with site.worker() as opened:
        yield opened


async def test_a_new_tag_costs_one_get(site: MirrorSite, worker: MirrorWorker) -> None:
    """The first HEAD of a tag, and the GETs by tag and digest after it, cost one upstream request."""
    image = site.upstream.add_image(UPSTREAM_REPO, b"layer")
    assert (await worker.mirror.resolve_manifest(MIRRORED_REPO, TAG)).digest == image.digest
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, TAG)).body == image.body
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, image.digest)).body == image.body
    assert site.upstream.calls == {"get manifest": 1}


async def test_simultaneous_requests_for_a_tag_cost_one_upstream_request(site: MirrorSite) -> None:
    """Many clients of two workers request a new tag at the same time. The mirror sends one request to the upstream, and
    all clients get the manifest."""
    image = site.upstream.add_image(UPSTREAM_REPO, b"layer")
    site.upstream.faults.hold = asyncio.Event()
    async with site.worker() as worker_1, site.worker() as worker_2:
        requests = [
            asyncio.create_task(worker.mirror.get_manifest(MIRRORED_REPO, TAG))
            for worker in (worker_1, worker_2)
            for _ in range(16)
        ]
        await wait_until(lambda: site.upstream.calls["get manifest"] == 1)
        site.upstream.faults.hold.set()
        assert {manifest.digest for manifest in await asyncio.gather(*requests)} == {image.digest}
        assert site.upstream.calls == {"get manifest": 1}


async def test_upstream_request_continues_when_one_client_disconnects(site: MirrorSite, worker: MirrorWorker) -> None:
    """Two clients wait for the same upstream request. If one client disconnects, the request continues for the other
    client."""
    site.upstream.add_image(UPSTREAM_REPO, b"layer")
    site.upstream.faults.hold = asyncio.Event()
    first = asyncio.create_task(worker.mirror.get_manifest(MIRRORED_REPO, TAG))
    second = asyncio.create_task(worker.mirror.get_manifest(MIRRORED_REPO, TAG))
    await wait_until(lambda: site.upstream.calls["get manifest"] == 1)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    site.upstream.faults.hold.set()
    await second
    assert site.upstream.calls == {"get manifest": 1}


async def test_a_fresh_tag_causes_no_upstream_request(site: MirrorSite, worker: MirrorWorker) -> None:
    """A fresh tag is served from the cache, without a notice and without a request to the upstream."""
    enter_request(request := RequestContext())
    await pull_new_image(site, worker)
    site.clock.now += 299
    site.upstream.faults.down = UpstreamUnavailable()
    await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
    assert site.upstream.calls == {"get manifest": 1}
    assert request.notice is None


async def pull_new_image(site: MirrorSite, worker: MirrorWorker) -> Manifest:
    image = site.upstream.add_image(UPSTREAM_REPO, b"layer")
    await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
    return image


async def test_a_stale_tag_is_served_and_checked_in_the_background(site: MirrorSite, worker: MirrorWorker) -> None:
    """A stale tag is served at once from the cache, while the mirror checks it at the upstream. The next client gets
    the new manifest."""
    image = await pull_new_image(site, worker)
    newer = site.upstream.add_image(UPSTREAM_REPO, b"a newer layer")
    site.clock.now += 400
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, TAG)).digest == image.digest
    await wait_until(lambda: site.upstream.calls["get manifest"] == 2)
    await wait_until(lambda: not worker.mirror.is_busy)
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, TAG)).digest == newer.digest
    assert site.upstream.calls == {"get manifest": 2, "head manifest": 1}


async def test_a_tag_that_expired_long_ago_is_checked_before_it_is_served(
    site: MirrorSite, worker: MirrorWorker
) -> None:
    """A tag that expired long ago is checked at the upstream before it is served. If the tag has not moved, the check
    is one HEAD request. If it has moved, the new manifest is fetched as well."""
    image = await pull_new_image(site, worker)
    site.clock.now += 601
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, TAG)).digest == image.digest
    assert site.upstream.calls == {"get manifest": 1, "head manifest": 1}
    newer = site.upstream.add_image(UPSTREAM_REPO, b"a newer layer")
    site.clock.now += 601
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, TAG)).digest == newer.digest
    assert site.upstream.calls == {"get manifest": 2, "head manifest": 2}
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, image.digest)).digest == image.digest


async def test_time_to_live_by_pattern(site: MirrorSite) -> None:
    """The first pattern that matches a tag sets its time to live."""
    site.configure(tag_ttls={"v*": 3600, "*": 10})
    site.upstream.add_image(UPSTREAM_REPO, b"layer", tags=("v1", "nightly"))
    async with site.worker() as worker:
        for tag in ("v1", "nightly"):
            await worker.mirror.get_manifest(MIRRORED_REPO, Tag(tag))
        site.clock.now += 3000
        for tag in ("v1", "nightly"):
            await worker.mirror.get_manifest(MIRRORED_REPO, Tag(tag))
        assert site.upstream.calls == {"get manifest": 2, "head manifest": 1}


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
async def test_a_cached_tag_is_served_if_the_upstream_fails(
    site: MirrorSite, worker: MirrorWorker, error: Exception
) -> None:
    """A cached tag of any age is served with a notice, and stays in the cache, in these cases: the upstream fails, it
    refuses the mirror's login, or it answers "unknown" in a way that may come from a firewall."""
    enter_request(request := RequestContext())
    image = await pull_new_image(site, worker)
    site.clock.now += 30 * 86400
    site.upstream.faults.down = error  # type: ignore[assignment]
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, TAG)).digest == image.digest
    notice = request.notice
    assert notice is not None
    assert "docker.io/library/app:1" in notice
    assert "30d" in notice
    assert notice.isascii()
    assert '"' not in notice
    assert (await worker.store.resolve_manifest(MIRRORED_REPO, TAG)).digest == image.digest
    site.upstream.faults.down = UpstreamUnavailable()
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, TAG)).digest == image.digest


@pytest.mark.parametrize("by", ["tag", "digest"])
async def test_an_unconfirmed_manifest_unknown_is_not_cached(site: MirrorSite, worker: MirrorWorker, by: str) -> None:
    """An "unknown" answer that may come from a firewall instead of the upstream registry is not cached. The next
    request asks the upstream again."""
    image = site.upstream.add_image(UPSTREAM_REPO, b"layer")
    reference = TAG if by == "tag" else image.digest
    site.upstream.faults.down = UnconfirmedManifestUnknown()
    with pytest.raises(ManifestUnknown):
        await worker.mirror.get_manifest(MIRRORED_REPO, reference)
    site.upstream.faults.down = None
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, reference)).digest == image.digest


async def test_a_slow_upstream_is_not_waited_for(site: MirrorSite) -> None:
    """If the upstream does not answer for a while and a stale copy is cached, the client gets the stale copy with a
    notice."""
    enter_request(request := RequestContext())
    async with site.worker() as patient:
        image = await pull_new_image(site, patient)
        site.stale_wait = 0.02
        async with site.worker(source_of_another_worker(site)) as worker:
            site.clock.now += 3600
            site.upstream.faults.hold = asyncio.Event()
            assert (await worker.mirror.get_manifest(MIRRORED_REPO, TAG)).digest == image.digest
    notice = request.notice
    assert notice is not None
    assert "slow" in notice


@pytest.mark.parametrize("by", ["tag", "digest"])
async def test_an_image_that_is_evicted_during_the_check_is_fetched_again(
    site: MirrorSite, worker: MirrorWorker, by: str
) -> None:
    """If the eviction removes an image while the upstream is asked about its tag, clients of the tag get the image, not
    "unknown". The image is fetched once. `by`: whether only the tag was removed, or also the
    manifest."""
    image = await pull_new_image(site, worker)
    site.clock.now += 601
    site.upstream.faults.hold = hold = asyncio.Event()
    async with site.worker(source_of_another_worker(site)) as asking:
        upstream = asking.mirror._upstream
        assert isinstance(upstream, FakeSource)
        clients = [asyncio.create_task(asking.mirror.get_manifest(MIRRORED_REPO, TAG)) for _ in range(3)]
        await wait_until(lambda: upstream.calls["head manifest"] == 1)
        await worker.store.delete_tag(MIRRORED_REPO, TAG, by=MIRROR_ACTOR)
        if by == "digest":
            await worker.store.delete_manifest(MIRRORED_REPO, image.digest, by=MIRROR_ACTOR)
        hold.set()
        assert {manifest.digest for manifest in await asyncio.gather(*clients)} == {image.digest}
        assert upstream.calls["head manifest"] == 1
        assert upstream.calls["get manifest"] == 1


async def test_an_image_that_is_evicted_while_the_upstream_fails(site: MirrorSite, worker: MirrorWorker) -> None:
    """If the upstream fails while the eviction removes the image, the client gets the upstream's error, not
    "unknown"."""
    await pull_new_image(site, worker)
    site.clock.now += 601
    site.upstream.faults.hold = hold = asyncio.Event()
    client = asyncio.create_task(worker.mirror.get_manifest(MIRRORED_REPO, TAG))
    await wait_until(lambda: site.upstream.calls["head manifest"] == 1)
    await worker.store.delete_tag(MIRRORED_REPO, TAG, by=MIRROR_ACTOR)
    site.upstream.faults.down = UpstreamUnavailable()
    hold.set()
    with pytest.raises(UpstreamUnavailable):
        await client


async def test_upstream_error_without_a_cached_copy(site: MirrorSite, worker: MirrorWorker) -> None:
    """If nothing is cached, the client gets the upstream's error. The error is not cached as "unknown"."""
    site.upstream.add_image(UPSTREAM_REPO, b"layer")
    for error in (UpstreamUnavailable(), UpstreamTimeout(), TooManyRequests(retry_after=7), Denied()):
        site.upstream.faults.down = error
        with pytest.raises(type(error)):
            await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
    site.upstream.faults.down = None
    await worker.mirror.get_manifest(MIRRORED_REPO, TAG)


async def test_a_stale_tag_is_served_if_few_requests_are_left(site: MirrorSite, worker: MirrorWorker) -> None:
    """While the upstream's rate limit leaves only few requests, a stale tag is served with a notice, without asking the
    upstream. A tag that is not cached is still requested."""
    enter_request(request := RequestContext())
    await pull_new_image(site, worker)
    other = site.upstream.add_image(UPSTREAM_REPO, b"other", tags=("2",))
    site.upstream.faults.is_near_rate_limit = True
    for age in (400, 4000):
        site.clock.now += age
        await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
    assert request.notice is not None
    assert site.upstream.calls == {"get manifest": 1}
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, Tag("2"))).digest == other.digest


@pytest.mark.parametrize("reference", [TAG, digest_of(b"no manifest")])
async def test_an_unknown_manifest_is_cached_for_a_short_time(
    site: MirrorSite, worker: MirrorWorker, reference: Tag | Digest
) -> None:
    """After the upstream has answered that it does not have a manifest, no worker requests this manifest again for a
    short time."""
    async with site.worker() as other:
        for mirror in (worker.mirror, other.mirror, worker.mirror):
            with pytest.raises(ManifestUnknown):
                await mirror.get_manifest(MIRRORED_REPO, reference)
        assert site.upstream.calls == {"get manifest": 1}
        site.clock.now += 61
        with pytest.raises(ManifestUnknown):
            await other.mirror.get_manifest(MIRRORED_REPO, reference)
        assert site.upstream.calls == {"get manifest": 2}


async def test_a_tag_that_the_upstream_has_deleted(site: MirrorSite, worker: MirrorWorker) -> None:
    """When a check finds that the upstream has deleted a tag, the tag is removed from the cache. Its manifest can still
    be pulled by digest."""
    image = await pull_new_image(site, worker)
    del site.upstream.manifests[UPSTREAM_REPO, TAG]
    site.clock.now += 3600
    with pytest.raises(ManifestUnknown):
        await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, image.digest)).digest == image.digest
    assert site.upstream.calls == {"get manifest": 1, "head manifest": 1}


async def test_a_digest_never_expires(site: MirrorSite, worker: MirrorWorker) -> None:
    """A cached manifest is served by digest at any age, without a request to the upstream."""
    image = await pull_new_image(site, worker)
    site.clock.now += 10 * 365 * 86400
    site.upstream.faults.down = UpstreamUnavailable()
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, image.digest)).body == image.body
    assert site.upstream.calls == {"get manifest": 1}


async def test_a_pull_of_an_index_fetches_no_other_manifest(site: MirrorSite, worker: MirrorWorker) -> None:
    """When a client pulls an index, the manifests in the index are not fetched until a client requests them."""
    amd64, arm64 = (site.upstream.add_image(UPSTREAM_REPO, text, tags=()) for text in (b"amd64", b"arm64"))
    index = site.upstream.add_manifest(UPSTREAM_REPO, index_of([amd64.descriptor, arm64.descriptor]), "1")
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, TAG)).digest == index.digest
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, arm64.digest)).digest == arm64.digest
    with pytest.raises(ManifestUnknown):
        await worker.store.get_manifest(MIRRORED_REPO, amd64.digest)


async def test_cached_tags_are_served_after_a_restart(site: MirrorSite) -> None:
    """After a restart, a cached tag is served without a request to the upstream, which is down."""
    async with site.worker() as worker:
        image = await pull_new_image(site, worker)
    site.upstream.closed = False
    site.upstream.faults.down = UpstreamUnavailable()
    async with site.worker() as worker:
        assert (await worker.mirror.get_manifest(MIRRORED_REPO, TAG)).digest == image.digest
        assert site.upstream.calls == {"get manifest": 1}


async def test_a_clock_set_back(site: MirrorSite, worker: MirrorWorker) -> None:
    """After the clock was set back, the last check of a tag can lie in the future. The tag then counts as stale and is
    checked again."""
    await pull_new_image(site, worker)
    site.clock.now -= 10 * 86400
    await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
    assert site.upstream.calls["head manifest"] == 1


async def test_force_checks_even_a_fresh_tag(site: MirrorSite, worker: MirrorWorker) -> None:
    """With `force`, even a fresh tag is checked at the upstream. The result is None if the upstream answered, and the
    error otherwise."""
    await pull_new_image(site, worker)
    newer = site.upstream.add_image(UPSTREAM_REPO, b"a newer layer")
    assert await worker.mirror.revalidate(MIRRORED_REPO, TAG) is None
    assert site.upstream.calls == {"get manifest": 1}
    site.upstream.faults.is_near_rate_limit = True
    assert await worker.mirror.revalidate(MIRRORED_REPO, TAG, force=True) is None
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, TAG)).digest == newer.digest
    site.upstream.faults.down = UpstreamUnavailable("it refuses connections")
    assert "it refuses connections" in str(await worker.mirror.revalidate(MIRRORED_REPO, TAG, force=True))
    site.upstream.faults.down = None
    del site.upstream.manifests[UPSTREAM_REPO, TAG]
    with pytest.raises(ManifestUnknown):
        await worker.mirror.revalidate(MIRRORED_REPO, TAG, force=True)


async def test_workers_that_wait_for_the_same_check_fail_together(site: MirrorSite) -> None:
    """One worker asks the upstream while the other workers wait for its lease. If the request fails, the waiting
    workers fail at once as well, and do not ask the upstream themselves."""
    site.upstream.faults.hold = asyncio.Event()
    site.upstream.faults.down = UpstreamTimeout()
    async with site.worker() as worker_1:
        first = asyncio.create_task(worker_1.mirror.get_manifest(MIRRORED_REPO, TAG))
        await wait_until(lambda: site.upstream.calls["get manifest"] == 1)
        site.stale_wait = 0.02
        async with site.worker() as worker_2:
            second = asyncio.create_task(worker_2.mirror.get_manifest(MIRRORED_REPO, TAG))
            leases = worker_2.store.leases
            assert isinstance(leases, FileLeases)
            await wait_until(lambda: leases._queues._locks)  # the second worker waits for the lease
            wait_end = asyncio.get_running_loop().time() + 2 * site.stale_wait
            await wait_until(lambda: asyncio.get_running_loop().time() > wait_end)
            site.upstream.faults.hold.set()
            for outcome in await asyncio.gather(first, second, return_exceptions=True):
                assert isinstance(outcome, UpstreamTimeout)
    assert site.upstream.calls == {"get manifest": 1}


async def test_late_worker_asks_the_upstream_if_no_other_has(site: MirrorSite, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that is late itself, for example on a machine that stalls, has waited for no other worker. It asks the
    upstream, and its client gets the manifest."""
    image = site.upstream.add_image(UPSTREAM_REPO, b"layer")
    site.stale_wait = 0.02
    async with site.worker() as worker:
        last_check = worker.store.records.last_check

        async def last_check_late(repo: RepositoryName, reference: Reference) -> UpstreamCheck | None:
            await asyncio.sleep(2 * site.stale_wait)
            return await last_check(repo, reference)

        monkeypatch.setattr(worker.store.records, "last_check", last_check_late)
        assert (await worker.mirror.get_manifest(MIRRORED_REPO, TAG)).digest == image.digest


async def test_cached_tags_are_served_on_a_full_disk(site: MirrorSite, worker: MirrorWorker) -> None:
    """While the disk is full, a cached tag is served. If the upstream has moved the tag, the old manifest is served
    with a notice. A tag or blob that the upstream does not have is unknown."""
    enter_request(request := RequestContext())
    image = await pull_new_image(site, worker)
    site.disk.full = True
    for newer in (False, True):
        if newer:
            site.upstream.add_image(UPSTREAM_REPO, b"a newer layer")
        site.clock.now += 601
        assert (await worker.mirror.get_manifest(MIRRORED_REPO, TAG)).digest == image.digest
        assert (request.notice is not None) is newer
    with pytest.raises(ManifestUnknown):
        await worker.mirror.get_manifest(MIRRORED_REPO, Tag("none"))
    with pytest.raises(BlobUnknown):
        await worker.mirror.resolve_blob(MIRRORED_REPO, digest_of(b"none"))
