"""Tags with a cooldown, and frozen tags, through a mirror over a real store: what is served at each moment."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from registry.mirror.cooldown_watch import round_interval, watch_young_tags
from registry.request import RequestContext, enter_request
from storage.content import Actor, Manifest
from storage.errors import Denied, ManifestUnknown, UpstreamUnavailable
from storage.names import RepositoryName, Tag
from storage.upstream_tags import TagFrozen, TagNotFrozen
from tests.fakes.registry_content import index_of
from tests.unit.registry.conftest import wait_until
from tests.unit.registry.mirror.conftest import (
    MIRRORED_REPO,
    UPSTREAM_REPO,
    MirrorStore,
    MirrorWorker,
    source_of_another_worker,
)

TAG = Tag("1")
HOUR = 3600.0
DAY = 24 * HOUR
BY = Actor(name="alice")


@pytest.fixture
async def worker(site: MirrorStore) -> AsyncIterator[MirrorWorker]:
    site.configure(tag_ttl=HOUR, miss_ttl=60, cooldown=3 * DAY)
    async with site.worker() as opened:
        yield opened


def moved(site: MirrorStore, layer: bytes) -> Manifest:
    """Moves the tag at the upstream to an image with this layer."""
    return site.far.add_image(UPSTREAM_REPO, layer)


async def served(worker: MirrorWorker, tag: Tag = TAG, repo: RepositoryName = MIRRORED_REPO) -> str:
    """Returns the digest of the tag, on which GET and HEAD agree."""
    found = await worker.mirror.get_manifest(repo, tag)
    assert (await worker.mirror.resolve_manifest(repo, tag)).digest == found.digest
    return found.digest


async def test_a_tag_that_moves_three_times(site: MirrorStore) -> None:
    """At each moment the newest digest that has held the tag for the cooldown is served, also by a new process, and
    while the upstream is down. The answer says what is held back, and until when."""
    site.configure(tag_ttl=HOUR, cooldown=3 * DAY)
    enter_request(request := RequestContext())
    images = [moved(site, b"first")]
    moves = {10.0: b"second", 11.0: b"third", 20.0: b"fourth"}
    before_third = [(0.0, 0), (5.0, 0), (10.0, 0), (10.5, 0)]
    after_third = [(11.0, 0), (13.5, 0), (13.9, 0), (14.0, 2), (19.0, 2)]  # the second one was replaced after a day
    after_fourth = [(20.0, 2), (22.9, 2), (23.0, 3), (60.0, 3)]
    started = site.clock.now
    for day, number in before_third + after_third + after_fourth:
        site.clock.now = started + day * DAY
        if day in moves:
            images.append(moved(site, moves[day]))
        site.far.closed = False
        async with site.worker() as worker, site.worker() as other:
            request.notice = None
            assert await served(worker) == images[number].digest, day
            notice = request.notice
            site.far.faults.down = UpstreamUnavailable("it refuses connections")
            site.clock.now += 2.1 * HOUR
            for each in (worker, other):
                assert await served(each) == images[number].digest, day
            site.far.faults.down = None
        if images[number] is images[-1]:
            assert notice is None, day
        else:
            assert images[-1].digest in str(notice)
            assert "cooldown of 3d holds back until 20" in str(notice)


async def test_time_passes_while_the_upstream_is_down(site: MirrorStore, worker: MirrorWorker) -> None:
    """A digest that has held the tag long enough is served although the upstream does not answer, with both notices."""
    enter_request(request := RequestContext())
    first = moved(site, b"first")
    await served(worker)
    site.clock.now += 10 * DAY
    second = moved(site, b"second")
    assert await served(worker) == first.digest
    site.far.faults.down = UpstreamUnavailable("it refuses connections")
    site.clock.now += 2 * DAY
    assert await served(worker) == first.digest
    assert "holds back until" in str(request.notice)
    assert "it refuses connections" in str(request.notice)
    site.clock.now += 1 * DAY
    assert await served(worker) == second.digest
    assert "holds back" not in str(request.notice)


async def test_a_digest_is_not_held_back(site: MirrorStore, worker: MirrorWorker) -> None:
    """A pull by digest gets what the cooldown holds back, without a notice."""
    enter_request(request := RequestContext())
    moved(site, b"first")
    await served(worker)
    site.clock.now += 10 * DAY
    second = moved(site, b"second")
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, second.digest)).body == second.body
    assert request.notice is None


async def test_a_served_digest_that_is_not_cached(site: MirrorStore, worker: MirrorWorker) -> None:
    """If the served digest was removed from the cache, it is fetched by digest. If the upstream does not have it any
    more, the tag is unknown, and the newer digest is still held back."""
    first = moved(site, b"first")
    await served(worker)
    site.clock.now += 10 * DAY
    moved(site, b"second")
    await served(worker)
    await worker.mirror.delete_manifest(MIRRORED_REPO, first.digest, by=BY)
    assert await served(worker) == first.digest
    await worker.mirror.delete_manifest(MIRRORED_REPO, first.digest, by=BY)
    del site.far.manifests[UPSTREAM_REPO, first.digest]
    with pytest.raises(ManifestUnknown):
        await served(worker)


async def test_the_second_best_is_served(site: MirrorStore, worker: MirrorWorker) -> None:
    """If the digest that should be served cannot be fetched, an older cached digest is served, with a notice. This
    holds while the upstream is down, and if the upstream does not have the digest any more."""
    enter_request(request := RequestContext())
    first = moved(site, b"first")
    await served(worker)
    site.clock.now += 10 * DAY
    second = moved(site, b"second")
    await served(worker)
    await worker.mirror.delete_manifest(MIRRORED_REPO, second.digest, by=BY)
    await served(worker)
    await worker.store.delete_manifest(MIRRORED_REPO, second.digest, by=BY)  # the tag is not cached any more, either
    site.clock.now += 3 * DAY
    site.far.faults.down = UpstreamUnavailable("it refuses connections")
    assert await served(worker) == first.digest
    assert f"{second.digest} cannot be had" in str(request.notice)
    assert "asking docker.io failed: it refuses connections" in str(request.notice)
    site.far.faults.down = None
    third = moved(site, b"third")
    del site.far.manifests[UPSTREAM_REPO, second.digest]
    await worker.mirror.revalidate(MIRRORED_REPO, TAG, force=True)
    assert await served(worker) == first.digest
    assert f"{second.digest} cannot be had" in str(request.notice)
    assert third.digest in str(request.notice)


async def test_new_tags_are_refused(site: MirrorStore) -> None:
    """With `refuse`, a tag is unknown until a digest has held it for the cooldown. The error says until when. The
    upstream is asked once per time to live. Pulls by digest work."""
    site.configure(tag_ttl=HOUR, cooldown=3 * DAY, cooldown_new="refuse")
    image = moved(site, b"first")
    async with site.worker() as worker:
        for _ in range(3):
            with pytest.raises(Denied, match=r"is served from 2025-06-18 15:06:40 UTC on; until then, pull it by dig"):
                await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
        assert site.far.calls == {"get manifest": 1}
        assert (await worker.mirror.get_manifest(MIRRORED_REPO, image.digest)).digest == image.digest
        site.clock.now += 3 * DAY
        assert await served(worker) == image.digest


async def test_what_the_cooldown_applies_to(site: MirrorStore) -> None:
    """The cooldown applies only to the tags in `cooldown_tags` that are not exempt. Repositories of Docker Hub can be
    exempt by their short names as well."""
    site.configure(
        tag_ttl=HOUR,
        cooldown=3 * DAY,
        cooldown_tags=["v*", "1"],
        cooldown_exempt=["app:v2-*", "team/**", "docker.io/other/app", "**:v9"],
    )
    cases = {
        ("library/app", "1"): True,
        ("library/app", "v1"): True,
        ("library/app", "v2-rc"): False,
        ("library/app", "edge"): False,
        ("library/app", "v9"): False,
        ("library/tool", "v2-rc"): True,
        ("team/app", "v1"): False,
        ("other/app", "v1"): False,
    }
    for repo, tag in cases:
        site.far.add_image(repo, b"first", tags=(tag,))
    async with site.worker() as worker:
        for repo, tag in cases:
            await served(worker, Tag(tag), RepositoryName(f"docker.io/{repo}"))
        site.clock.now += 10 * DAY
        for (repo, tag), is_delayed in cases.items():
            second = site.far.add_image(repo, b"second", tags=(tag,))
            found = await served(worker, Tag(tag), RepositoryName(f"docker.io/{repo}"))
            assert (found != second.digest) is is_delayed, (repo, tag)


async def test_young_tags_are_looked_at(site: MirrorStore, worker: MirrorWorker) -> None:
    """Tags that have moved within the cooldown are checked even if nobody pulls them, so that a digest which the
    upstream withdraws does not become mature. No tag is checked while few requests are left."""
    first = moved(site, b"first")
    site.far.add_image(UPSTREAM_REPO, b"other", tags=("old",))
    await served(worker)
    await served(worker, Tag("old"))
    site.clock.now += 10 * DAY
    moved(site, b"second")
    assert await served(worker) == first.digest
    third = moved(site, b"third")
    site.far.calls.clear()
    site.far.faults.few_left = True
    await worker.mirror.recheck_young_tags()
    assert site.far.calls == {}
    site.far.faults.few_left = False
    for _ in range(3):
        site.clock.now += DAY
        await worker.mirror.recheck_young_tags()
    assert site.far.calls == {"head manifest": 3, "get manifest": 1}
    assert await served(worker) == first.digest
    site.clock.now += 2 * DAY
    await worker.mirror.recheck_young_tags()
    assert await served(worker) == third.digest
    moved(site, b"fourth")
    await worker.mirror.revalidate(MIRRORED_REPO, TAG, force=True)
    del site.far.manifests[UPSTREAM_REPO, TAG]
    site.clock.now += HOUR
    await worker.mirror.recheck_young_tags()
    with pytest.raises(ManifestUnknown):
        await served(worker)
    site.far.faults.down = UpstreamUnavailable("it refuses connections")
    with pytest.raises(UpstreamUnavailable):
        await worker.mirror.recheck_young_tags()


async def test_one_process_looks_at_young_tags(site: MirrorStore, worker: MirrorWorker) -> None:
    """Only one of two processes checks young tags. It continues after a round in which the upstream was down. If it
    ends, the other process takes over."""
    moved(site, b"first")
    await served(worker)
    site.clock.now += HOUR
    far = source_of_another_worker(site)
    async with site.worker(far) as other, AsyncExitStack() as first:
        await first.enter_async_context(watch_young_tags([worker.mirror], 0.01, worker.store.leases))
        await wait_until(lambda: site.far.calls["head manifest"] > 0)
        async with watch_young_tags([other.mirror], 0.01, other.store.leases):
            site.far.faults.down = UpstreamUnavailable("it refuses connections")
            failed = site.far.calls["head manifest"]
            await wait_until(lambda: site.far.calls["head manifest"] > failed + 5)
            site.far.faults.down = None
            assert far.calls == {}
            await first.aclose()
            await wait_until(lambda: far.calls["head manifest"] > 1)


def test_the_time_between_rounds() -> None:
    """The time between two rounds of checks follows from the shortest cooldown, within limits."""
    assert round_interval([3 * DAY, 30 * DAY]) == HOUR
    assert round_interval([30 * DAY, 10 * HOUR]) == HOUR / 2
    assert round_interval([1.0]) == 60


@pytest.mark.parametrize("suffix", ["", ".sig"])
async def test_signatures_are_not_held_back(site: MirrorStore, suffix: str) -> None:
    """The tags of signatures and other referrers of a digest are neither refused nor delayed."""
    site.configure(tag_ttl=HOUR, cooldown=3 * DAY, cooldown_new="refuse")
    tag = Tag(f"sha256-{'0a' * 32}{suffix}")
    async with site.worker() as worker:
        for layer in (b"first", b"second"):
            image = site.far.add_image(UPSTREAM_REPO, layer, tags=(tag,))
            assert await served(worker, tag) == image.digest
            site.clock.now += DAY


async def test_a_cooldown_that_is_set_later(site: MirrorStore) -> None:
    """Sightings from before the cooldown was set count."""
    site.configure(tag_ttl=HOUR)
    first = moved(site, b"first")
    async with site.worker() as worker:
        await served(worker)
        site.clock.now += 10 * DAY
        second = moved(site, b"second")
        assert await served(worker) == second.digest
    site.far.closed = False
    site.configure(cooldown=3 * DAY)
    async with site.worker() as worker:
        assert await served(worker) == first.digest
        site.clock.now += 3 * DAY
        assert await served(worker) == second.digest


async def test_a_tag_that_is_gone_at_the_upstream(site: MirrorStore, worker: MirrorWorker) -> None:
    """A tag that the upstream has deleted is unknown at once, in spite of the cooldown. If the tag comes back with
    other content, this content is held back."""
    first = moved(site, b"first")
    await served(worker)
    site.clock.now += 10 * DAY
    del site.far.manifests[UPSTREAM_REPO, TAG]
    with pytest.raises(ManifestUnknown):
        await served(worker)
    site.clock.now += DAY
    second = moved(site, b"second")
    assert await served(worker) == first.digest
    site.clock.now += 3 * DAY
    assert await served(worker) == second.digest


async def test_a_full_disk(site: MirrorStore, worker: MirrorWorker) -> None:
    """A move of a tag takes no effect if the full disk does not allow to record it."""
    first = moved(site, b"first")
    await served(worker)
    site.clock.now += 10 * DAY
    second = moved(site, b"second")
    site.disk.full = True
    assert await served(worker) == first.digest
    site.clock.now += 10 * DAY
    assert await served(worker) == first.digest
    site.disk.full = False
    assert await served(worker) == first.digest
    site.clock.now += 3 * DAY
    assert await served(worker) == second.digest


async def test_a_frozen_tag(site: MirrorStore, worker: MirrorWorker) -> None:
    """A frozen tag is served at its digest by all processes, whatever the upstream and the cooldown say, and without a
    request to the upstream. After it is unfrozen, the cooldown decides again."""
    enter_request(request := RequestContext())
    first = moved(site, b"first")
    await served(worker)
    site.clock.now += 10 * DAY
    second = moved(site, b"second")
    await served(worker)
    site.clock.now += 3 * DAY
    await worker.store.upstream_tags.freeze(MIRRORED_REPO, TAG, first.digest, by=BY)
    site.far.calls.clear()
    async with site.worker() as other:
        for each in (worker, other):
            assert await served(each) == first.digest
            assert await each.mirror.revalidate(MIRRORED_REPO, TAG, force=True) is None
    site.far.closed = False
    assert site.far.calls == {}
    assert request.notice == f"{MIRRORED_REPO}:1 is frozen at {first.digest} since 2025-06-28 15:06:40 UTC"
    await worker.store.upstream_tags.unfreeze(MIRRORED_REPO, TAG, by=BY)
    assert await served(worker) == second.digest


async def test_a_frozen_digest_is_fetched(site: MirrorStore, worker: MirrorWorker) -> None:
    """The manifest of a frozen tag is fetched by digest if it is not cached, although the upstream has no such tag."""
    image = site.far.add_image(UPSTREAM_REPO, b"layer", tags=())
    await worker.store.upstream_tags.freeze(MIRRORED_REPO, TAG, image.digest, by=BY)
    assert await served(worker) == image.digest


async def test_what_a_frozen_tag_needs_cannot_be_deleted(site: MirrorStore, worker: MirrorWorker) -> None:
    """While a tag is frozen, neither the tag, nor its manifest, nor manifests and blobs below it can be deleted, and
    the error says what to do. Other content of the repository can be deleted, and all of it after the tag is
    unfrozen."""
    other = site.far.add_image(UPSTREAM_REPO, b"other", tags=("2",))
    child = site.far.add_image(UPSTREAM_REPO, b"child", tags=())
    inner = site.far.add_manifest(UPSTREAM_REPO, index_of([child.descriptor]))
    index = site.far.add_manifest(UPSTREAM_REPO, index_of([inner.descriptor]), "1")
    mirror = worker.mirror
    for reference in (Tag("1"), inner.digest, child.digest, Tag("2")):
        image = await mirror.get_manifest(MIRRORED_REPO, reference)
        for blob in image.blobs:
            reader = await mirror.open_blob(MIRRORED_REPO, blob.digest)
            assert b"".join([piece async for piece in reader])
            await reader.aclose()
    await worker.store.upstream_tags.freeze(MIRRORED_REPO, TAG, index.digest, by=BY)
    layer, other_layer = child.blobs[-1].digest, other.blobs[-1].digest
    refusal = rf"{MIRRORED_REPO}:1 is frozen at {index.digest}.*; unfreeze it first: entrepot mirror unfreeze"
    with pytest.raises(TagFrozen, match=refusal):
        await mirror.delete_tag(MIRRORED_REPO, TAG, by=BY)
    for manifest in (index, inner, child):
        with pytest.raises(TagFrozen, match=refusal):
            await mirror.delete_manifest(MIRRORED_REPO, manifest.digest, by=BY)
    with pytest.raises(TagFrozen, match=refusal):
        await mirror.delete_blob(MIRRORED_REPO, layer, by=BY)
    site.far.faults.down = UpstreamUnavailable()
    assert await served(worker) == index.digest
    assert (await mirror.resolve_blob(MIRRORED_REPO, layer)).size == len(b"child")
    await mirror.delete_blob(MIRRORED_REPO, other_layer, by=BY)
    await mirror.delete_tag(MIRRORED_REPO, Tag("2"), by=BY)
    await mirror.delete_manifest(MIRRORED_REPO, other.digest, by=BY)
    await worker.store.upstream_tags.unfreeze(MIRRORED_REPO, TAG, by=BY)
    await mirror.delete_blob(MIRRORED_REPO, layer, by=BY)
    await mirror.delete_tag(MIRRORED_REPO, TAG, by=BY)
    await mirror.delete_manifest(MIRRORED_REPO, child.digest, by=BY)


async def test_the_frozen_tags(site: MirrorStore, worker: MirrorWorker) -> None:
    """Frozen tags are listed in pages, in order. To freeze a tag again at the same digest changes nothing. The audit
    log names who froze and unfroze a tag."""
    one, two = moved(site, b"first").digest, moved(site, b"second").digest
    tags = worker.store.upstream_tags
    other = RepositoryName("docker.io/library/other")
    frozen = [await tags.freeze(repo, Tag(tag), one, by=BY) for repo in (MIRRORED_REPO, other) for tag in "12"]
    site.clock.now += 5
    assert await tags.freeze(MIRRORED_REPO, TAG, one, by=Actor(name="bob")) == frozen[0]
    page = await tags.frozen_tags(None, 3)
    assert (list(page.items), page.more) == (frozen[:3], True)
    assert list((await tags.frozen_tags(str(frozen[2]), 3)).items) == frozen[3:]
    again = await tags.freeze(MIRRORED_REPO, TAG, two, by=Actor(name="bob"))
    assert (again.digest, again.actor, again.at) == (two, "bob", site.clock.now)
    assert [each.digest for each in await tags.frozen_in(MIRRORED_REPO)] == [two, one]
    assert await tags.unfreeze(MIRRORED_REPO, TAG, by=BY) == again
    with pytest.raises(TagNotFrozen, match=r"docker\.io/library/app:1 is not frozen"):
        await tags.unfreeze(MIRRORED_REPO, TAG, by=BY)
