"""What a mirror over a real store serves for tags with a cooldown, and for frozen tags. The cooldown is the time for
which a digest must hold a tag before the mirror serves it. A frozen tag is always served at the same digest."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from itertools import count

import pytest

from registry.mirror.cooldown_watch import round_interval, watch_young_tags
from registry.request import RequestContext, enter_request
from storage.content import Actor, Manifest
from storage.errors import (
    Denied,
    ManifestUnknown,
    RegistryError,
    StorageFailed,
    StorageFull,
    UpstreamUnavailable,
)
from storage.names import RepositoryName, Tag
from storage.upstream_tags import Sighting, TagFrozen, TagNotFrozen
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
HOUR = 3600.0
DAY = 24 * HOUR
BY = Actor(name="alice")


@pytest.fixture
async def worker(site: MirrorSite) -> AsyncIterator[MirrorWorker]:
    site.configure(tag_ttl=HOUR, miss_ttl=60, cooldown=3 * DAY)
    async with site.worker() as opened:
        yield opened


def move_tag(site: MirrorSite, layer: bytes) -> Manifest:
    """Moves the tag at the upstream to a new image with this layer, and returns the image's manifest."""
    return site.upstream.add_image(UPSTREAM_REPO, layer)


async def served(worker: MirrorWorker, tag: Tag = TAG, repo: RepositoryName = MIRRORED_REPO) -> str:
    """Returns the digest that the mirror serves for the tag. Checks that GET and HEAD agree on it."""
    manifest = await worker.mirror.get_manifest(repo, tag)
    assert (await worker.mirror.resolve_manifest(repo, tag)).digest == manifest.digest
    return manifest.digest


@pytest.mark.slow
async def test_a_tag_that_moves_three_times(site: MirrorSite) -> None:
    """At each moment, the newest digest that the tag has named for the cooldown is served. This also holds for a new
    process, and while the upstream is down. If a digest is held back, the notice in the response names this digest and
    the time until which it is held back."""
    site.configure(tag_ttl=HOUR, cooldown=3 * DAY)
    enter_request(request := RequestContext())
    images = [move_tag(site, b"first")]
    moves = {10.0: b"second", 11.0: b"third", 20.0: b"fourth"}
    # Pairs: a day, and the index of the image that is served on this day.
    before_third = [(0.0, 0), (5.0, 0), (10.0, 0), (10.5, 0)]
    after_third = [(11.0, 0), (13.5, 0), (13.9, 0), (14.0, 2), (19.0, 2)]  # the second image was replaced after a day
    after_fourth = [(20.0, 2), (22.9, 2), (23.0, 3), (60.0, 3)]
    started = site.clock.now
    for day, number in before_third + after_third + after_fourth:
        site.clock.now = started + day * DAY
        if day in moves:
            images.append(move_tag(site, moves[day]))
        site.upstream.closed = False  # the workers of the previous day have closed it
        async with site.worker() as worker, site.worker() as other:
            request.notice = None
            assert await served(worker) == images[number].digest, day
            notice = request.notice
            site.upstream.faults.down = UpstreamUnavailable("it refuses connections")
            site.clock.now += 2.1 * HOUR  # the cached answer is stale
            for each in (worker, other):
                assert await served(each) == images[number].digest, day
            site.upstream.faults.down = None
        if images[number] is images[-1]:
            assert notice is None, day
        else:
            assert images[-1].digest in str(notice)
            assert "cooldown of 3d holds back until 20" in str(notice)


async def test_time_passes_while_the_upstream_is_down(site: MirrorSite, worker: MirrorWorker) -> None:
    """While the upstream is down, a digest is served as soon as the tag has named it for the cooldown. The notice in
    the response says until when the digest is held back, and that the upstream is down."""
    enter_request(request := RequestContext())
    first = move_tag(site, b"first")
    await served(worker)
    site.clock.now += 10 * DAY
    second = move_tag(site, b"second")
    assert await served(worker) == first.digest
    site.upstream.faults.down = UpstreamUnavailable("it refuses connections")
    site.clock.now += 2 * DAY
    assert await served(worker) == first.digest
    assert "holds back until" in str(request.notice)
    assert "it refuses connections" in str(request.notice)
    site.clock.now += 1 * DAY
    assert await served(worker) == second.digest
    assert "holds back" not in str(request.notice)


async def test_a_pull_by_digest_is_not_held_back(site: MirrorSite, worker: MirrorWorker) -> None:
    """A digest that the cooldown holds back for pulls by tag can be pulled by digest, without a notice."""
    enter_request(request := RequestContext())
    move_tag(site, b"first")
    await served(worker)
    site.clock.now += 10 * DAY
    second = move_tag(site, b"second")
    assert (await worker.mirror.get_manifest(MIRRORED_REPO, second.digest)).body == second.body
    assert request.notice is None


async def test_a_served_digest_that_is_not_cached(site: MirrorSite, worker: MirrorWorker) -> None:
    """If the manifest that must be served was removed from the cache, it is fetched by digest. If the upstream does not
    have this manifest any more, the tag is unknown. The newer digest is still held back."""
    first = move_tag(site, b"first")
    await served(worker)
    site.clock.now += 10 * DAY
    move_tag(site, b"second")
    await served(worker)
    await worker.mirror.delete_manifest(MIRRORED_REPO, first.digest, by=BY)
    assert await served(worker) == first.digest
    await worker.mirror.delete_manifest(MIRRORED_REPO, first.digest, by=BY)
    del site.upstream.manifests[UPSTREAM_REPO, first.digest]
    with pytest.raises(ManifestUnknown):
        await served(worker)


async def test_an_older_cached_digest_is_served_instead(site: MirrorSite, worker: MirrorWorker) -> None:
    """If the digest that should be served cannot be fetched, an older cached digest is served, with a notice. The
    upstream is down in the first case, and has deleted the digest in the second case."""
    enter_request(request := RequestContext())
    first = move_tag(site, b"first")
    await served(worker)
    site.clock.now += 10 * DAY
    second = move_tag(site, b"second")
    await served(worker)
    await worker.mirror.delete_manifest(MIRRORED_REPO, second.digest, by=BY)
    await served(worker)
    await worker.store.delete_manifest(MIRRORED_REPO, second.digest, by=BY)  # now the tag is not cached, either
    site.clock.now += 3 * DAY
    site.upstream.faults.down = UpstreamUnavailable("it refuses connections")
    assert await served(worker) == first.digest
    assert f"{second.digest} cannot be fetched" in str(request.notice)
    assert "asking docker.io failed: it refuses connections" in str(request.notice)
    site.upstream.faults.down = None
    third = move_tag(site, b"third")
    del site.upstream.manifests[UPSTREAM_REPO, second.digest]
    await worker.mirror.revalidate(MIRRORED_REPO, TAG, force=True)
    assert await served(worker) == first.digest
    assert f"{second.digest} cannot be fetched" in str(request.notice)
    assert third.digest in str(request.notice)


async def test_new_tags_are_refused(site: MirrorSite) -> None:
    """With `cooldown_new = "refuse"`, pulls of a tag are denied until a digest has held the tag for the cooldown. The
    error names the time from which the tag is served. The upstream is asked once per time to live of the tag. Pulls by
    digest work."""
    site.configure(tag_ttl=HOUR, cooldown=3 * DAY, cooldown_new="refuse")
    image = move_tag(site, b"first")
    async with site.worker() as worker:
        for _ in range(3):
            with pytest.raises(Denied, match=r"is served from 2025-06-18 15:06:40 UTC on; until then, pull it by dig"):
                await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
        assert site.upstream.calls == {"get manifest": 1}
        assert (await worker.mirror.get_manifest(MIRRORED_REPO, image.digest)).digest == image.digest
        site.clock.now += 3 * DAY
        assert await served(worker) == image.digest


async def test_cooldown_applies_to_matching_tags_that_are_not_exempt(site: MirrorSite) -> None:
    """The cooldown applies only to tags that match `cooldown_tags` and do not match `cooldown_exempt`. Repositories of
    Docker Hub can be exempted by their short names as well."""
    site.configure(
        tag_ttl=HOUR,
        cooldown=3 * DAY,
        cooldown_tags=["v*", "1"],
        cooldown_exempt=["app:v2-*", "team/**", "docker.io/other/app", "**:v9"],
    )
    is_delayed_by_tag = {
        ("library/app", "1"): True,
        ("library/app", "v1"): True,
        ("library/app", "v2-rc"): False,
        ("library/app", "edge"): False,
        ("library/app", "v9"): False,
        ("library/tool", "v2-rc"): True,
        ("team/app", "v1"): False,
        ("other/app", "v1"): False,
    }
    for repo, tag in is_delayed_by_tag:
        site.upstream.add_image(repo, b"first", tags=(tag,))
    async with site.worker() as worker:
        for repo, tag in is_delayed_by_tag:
            await served(worker, Tag(tag), RepositoryName(f"docker.io/{repo}"))
        site.clock.now += 10 * DAY
        for (repo, tag), is_delayed in is_delayed_by_tag.items():
            second = site.upstream.add_image(repo, b"second", tags=(tag,))
            served_digest = await served(worker, Tag(tag), RepositoryName(f"docker.io/{repo}"))
            assert (served_digest != second.digest) is is_delayed, (repo, tag)


async def test_young_tags_are_checked_without_pulls(site: MirrorSite, worker: MirrorWorker) -> None:
    """Tags that have moved within the cooldown are checked at the upstream even if no client pulls them, so that the
    mirror notices when the upstream withdraws a digest."""
    first = move_tag(site, b"first")
    site.upstream.add_image(UPSTREAM_REPO, b"other", tags=("old",))
    await served(worker)
    await served(worker, Tag("old"))
    site.clock.now += 10 * DAY
    move_tag(site, b"second")
    assert await served(worker) == first.digest
    third = move_tag(site, b"third")
    site.upstream.calls.clear()
    for _ in range(3):
        site.clock.now += DAY
        await worker.mirror.recheck_young_tags()
    assert site.upstream.calls == {"head manifest": 3, "get manifest": 1}
    assert await served(worker) == first.digest
    site.clock.now += 2 * DAY
    await worker.mirror.recheck_young_tags()
    assert await served(worker) == third.digest
    move_tag(site, b"fourth")
    await worker.mirror.revalidate(MIRRORED_REPO, TAG, force=True)
    del site.upstream.manifests[UPSTREAM_REPO, TAG]
    site.clock.now += HOUR
    await worker.mirror.recheck_young_tags()
    with pytest.raises(ManifestUnknown):
        await served(worker)


async def test_one_process_checks_young_tags(site: MirrorSite, worker: MirrorWorker) -> None:
    """Only one of two processes checks young tags. This process continues after a round in which the upstream was down.
    When it ends, the other process takes over the checks."""
    move_tag(site, b"first")
    await served(worker)
    site.clock.now += HOUR
    other_upstream = source_of_another_worker(site)
    async with site.worker(other_upstream) as other, AsyncExitStack() as first_watch:
        await first_watch.enter_async_context(watch_young_tags([worker.mirror], 0.01, worker.store.leases))
        await wait_until(lambda: site.upstream.calls["head manifest"] > 0)
        async with watch_young_tags([other.mirror], 0.01, other.store.leases):
            site.upstream.faults.down = UpstreamUnavailable("it refuses connections")
            calls_before_failure = site.upstream.calls["head manifest"]
            await wait_until(lambda: site.upstream.calls["head manifest"] > calls_before_failure + 5)
            site.upstream.faults.down = None
            assert other_upstream.calls == {}
            await first_watch.aclose()
            await wait_until(lambda: other_upstream.calls["head manifest"] > 1)


def test_the_time_between_rounds() -> None:
    """The time between two rounds of checks depends on the shortest cooldown. It is between a minute and an hour."""
    assert round_interval([3 * DAY, 30 * DAY]) == HOUR
    assert round_interval([30 * DAY, 10 * HOUR]) == HOUR / 2
    assert round_interval([1.0]) == 60


@pytest.mark.parametrize("suffix", ["", ".sig"])
async def test_signatures_are_not_held_back(site: MirrorSite, suffix: str) -> None:
    """The tags of signatures and other referrers of a digest are neither refused nor delayed."""
    site.configure(tag_ttl=HOUR, cooldown=3 * DAY, cooldown_new="refuse")
    tag = Tag(f"sha256-{'0a' * 32}{suffix}")
    async with site.worker() as worker:
        for layer in (b"first", b"second"):
            image = site.upstream.add_image(UPSTREAM_REPO, layer, tags=(tag,))
            assert await served(worker, tag) == image.digest
            site.clock.now += DAY


async def test_a_cooldown_that_is_set_later(site: MirrorSite) -> None:
    """The mirror records the moves of a tag even without a cooldown. If a cooldown is configured later, the moves that
    were recorded before count."""
    site.configure(tag_ttl=HOUR)
    first = move_tag(site, b"first")
    async with site.worker() as worker:
        await served(worker)
        site.clock.now += 10 * DAY
        second = move_tag(site, b"second")
        assert await served(worker) == second.digest
    site.upstream.closed = False
    site.configure(cooldown=3 * DAY)
    async with site.worker() as worker:
        assert await served(worker) == first.digest
        site.clock.now += 3 * DAY
        assert await served(worker) == second.digest


async def test_a_tag_that_the_upstream_has_deleted(site: MirrorSite, worker: MirrorWorker) -> None:
    """A tag that the upstream has deleted is unknown at once, in spite of the cooldown. If the upstream creates the tag
    again with another digest, this digest is held back."""
    first = move_tag(site, b"first")
    await served(worker)
    site.clock.now += 10 * DAY
    del site.upstream.manifests[UPSTREAM_REPO, TAG]
    with pytest.raises(ManifestUnknown):
        await served(worker)
    site.clock.now += DAY
    second = move_tag(site, b"second")
    assert await served(worker) == first.digest
    site.clock.now += 3 * DAY
    assert await served(worker) == second.digest


async def test_a_full_disk(site: MirrorSite, worker: MirrorWorker) -> None:
    """A move of a tag that cannot be recorded because the disk is full has no effect. Its cooldown starts when the move
    is recorded."""
    first = move_tag(site, b"first")
    await served(worker)
    site.clock.now += 10 * DAY
    second = move_tag(site, b"second")
    site.disk.full = True
    assert await served(worker) == first.digest
    site.clock.now += 10 * DAY
    assert await served(worker) == first.digest
    site.disk.full = False
    assert await served(worker) == first.digest
    site.clock.now += 3 * DAY
    assert await served(worker) == second.digest


@pytest.mark.parametrize("lost_writes", [1, 2])
@pytest.mark.parametrize("error", [StorageFull, StorageFailed])
async def test_a_first_digest_that_was_not_recorded(
    site: MirrorSite,
    worker: MirrorWorker,
    monkeypatch: pytest.MonkeyPatch,
    error: type[RegistryError],
    lost_writes: int,
) -> None:
    """The first digest of a tag is cached, but what the tag points at could not be recorded. The next digest is held
    back for the cooldown all the same, also if it can be recorded only when its manifest is stored."""
    tags = worker.store.upstream_tags
    save_sightings, failures = tags.save_sightings, count(1)

    async def fail_first(repo: RepositoryName, tag: Tag, sightings: Sequence[Sighting]) -> None:
        if next(failures) <= lost_writes:
            raise error
        await save_sightings(repo, tag, sightings)

    monkeypatch.setattr(tags, "save_sightings", fail_first)
    first = move_tag(site, b"first")
    assert await served(worker) == first.digest
    site.clock.now += 10 * DAY
    second = move_tag(site, b"second")
    assert await served(worker) == first.digest
    site.clock.now += 3 * DAY + 1
    assert await served(worker) == second.digest


async def test_a_frozen_tag(site: MirrorSite, worker: MirrorWorker) -> None:
    """All processes serve a frozen tag at its digest, without a request to the upstream and regardless of the cooldown.
    After the tag is unfrozen, the cooldown decides again which digest is served."""
    enter_request(request := RequestContext())
    first = move_tag(site, b"first")
    await served(worker)
    site.clock.now += 10 * DAY
    second = move_tag(site, b"second")
    await served(worker)
    site.clock.now += 3 * DAY
    await worker.store.upstream_tags.freeze(MIRRORED_REPO, TAG, first.digest, by=BY)
    site.upstream.calls.clear()
    async with site.worker() as other:
        for each in (worker, other):
            assert await served(each) == first.digest
            assert await each.mirror.revalidate(MIRRORED_REPO, TAG, force=True) is None
    site.upstream.closed = False
    assert site.upstream.calls == {}
    assert request.notice == f"{MIRRORED_REPO}:1 is frozen at {first.digest} since 2025-06-28 15:06:40 UTC"
    await worker.store.upstream_tags.unfreeze(MIRRORED_REPO, TAG, by=BY)
    assert await served(worker) == second.digest


async def test_a_frozen_digest_is_fetched(site: MirrorSite, worker: MirrorWorker) -> None:
    """If the manifest of a frozen tag is not cached, it is fetched by digest, even if the upstream does not have the
    tag."""
    image = site.upstream.add_image(UPSTREAM_REPO, b"layer", tags=())
    await worker.store.upstream_tags.freeze(MIRRORED_REPO, TAG, image.digest, by=BY)
    assert await served(worker) == image.digest


async def test_content_of_a_frozen_tag_cannot_be_deleted(site: MirrorSite, worker: MirrorWorker) -> None:
    """While a tag is frozen, the tag and its manifest cannot be deleted, nor can the manifests and blobs to which this
    manifest refers. The error says how to unfreeze the tag. Other content of the repository can be deleted. After the
    tag is unfrozen, all content can be deleted."""
    other = site.upstream.add_image(UPSTREAM_REPO, b"other", tags=("2",))
    child = site.upstream.add_image(UPSTREAM_REPO, b"child", tags=())
    inner = site.upstream.add_manifest(UPSTREAM_REPO, index_of([child.descriptor]))
    index = site.upstream.add_manifest(UPSTREAM_REPO, index_of([inner.descriptor]), "1")
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
    site.upstream.faults.down = UpstreamUnavailable()
    assert await served(worker) == index.digest
    assert (await mirror.resolve_blob(MIRRORED_REPO, layer)).size == len(b"child")
    await mirror.delete_blob(MIRRORED_REPO, other_layer, by=BY)
    await mirror.delete_tag(MIRRORED_REPO, Tag("2"), by=BY)
    await mirror.delete_manifest(MIRRORED_REPO, other.digest, by=BY)
    await worker.store.upstream_tags.unfreeze(MIRRORED_REPO, TAG, by=BY)
    await mirror.delete_blob(MIRRORED_REPO, layer, by=BY)
    await mirror.delete_tag(MIRRORED_REPO, TAG, by=BY)
    await mirror.delete_manifest(MIRRORED_REPO, child.digest, by=BY)


async def test_frozen_tags_are_listed_in_pages(site: MirrorSite, worker: MirrorWorker) -> None:
    """Frozen tags are listed in pages, in order. If a tag is frozen again at the same digest, nothing changes. If it is
    frozen at another digest, the record names the new digest, the user and the time."""
    first_digest, second_digest = move_tag(site, b"first").digest, move_tag(site, b"second").digest
    tags = worker.store.upstream_tags
    other = RepositoryName("docker.io/library/other")
    frozen = [await tags.freeze(repo, Tag(tag), first_digest, by=BY) for repo in (MIRRORED_REPO, other) for tag in "12"]
    site.clock.now += 5
    assert await tags.freeze(MIRRORED_REPO, TAG, first_digest, by=Actor(name="bob")) == frozen[0]
    page = await tags.frozen_tags(None, 3)
    assert (list(page.items), page.more) == (frozen[:3], True)
    assert list((await tags.frozen_tags(str(frozen[2]), 3)).items) == frozen[3:]
    refrozen = await tags.freeze(MIRRORED_REPO, TAG, second_digest, by=Actor(name="bob"))
    assert (refrozen.digest, refrozen.actor, refrozen.at) == (second_digest, "bob", site.clock.now)
    assert [each.digest for each in await tags.frozen_tags_in(MIRRORED_REPO)] == [second_digest, first_digest]
    assert await tags.unfreeze(MIRRORED_REPO, TAG, by=BY) == refrozen
    with pytest.raises(TagNotFrozen, match=r"docker\.io/library/app:1 is not frozen"):
        await tags.unfreeze(MIRRORED_REPO, TAG, by=BY)
