"""In which order and how far a mirror asks its upstream about young tags: tags that have moved within their cooldown.
The cooldown is the time for which a digest must hold a tag before the mirror serves it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest

from registry.mirror import cooldown_watch
from registry.mirror.cooldown_watch import watch_young_tags
from registry.mirror.mirror import MAX_UNANSWERED_REPOSITORIES
from registry.mirror.served_tags import ServedTags
from registry.mirror.upstream_client import UnconfirmedManifestUnknown, UpstreamContentInvalid
from storage.content import MIRROR_ACTOR, digest_of
from storage.errors import (
    Denied,
    ManifestUnknown,
    QuotaExceeded,
    RegistryError,
    StorageFull,
    TooManyRequests,
    UpstreamUnavailable,
)
from storage.metadata.sqlite.database import connect
from storage.names import RepositoryName, Tag
from tests.unit.registry.conftest import wait_until
from tests.unit.registry.mirror.conftest import MirrorSite, MirrorWorker, source_of_another_worker

TAG = Tag("1")
HOUR = 3600.0
DAY = 24 * HOUR


@pytest.fixture
async def worker(site: MirrorSite) -> AsyncIterator[MirrorWorker]:
    site.configure(tag_ttl=HOUR, cooldown=3 * DAY)
    async with site.worker() as opened:
        yield opened


def mirrored(name: str) -> RepositoryName:
    """Returns the name that the repository `name` of the upstream has in this registry."""
    return RepositoryName(f"docker.io/library/{name}")


async def make_young_tags(site: MirrorSite, worker: MirrorWorker, names: str) -> None:
    """Pulls a tag of each repository, in this order, and moves all these tags at the upstream after an hour. `names`:
    one letter for each repository."""
    for name in names:
        site.upstream.add_image(f"library/{name}", b"first")
        await worker.mirror.get_manifest(mirrored(name), TAG)
        site.clock.now += 1
    for name in names:
        site.upstream.add_image(f"library/{name}", b"second")
    site.clock.now += HOUR


async def repositories_with_noticed_move(worker: MirrorWorker, names: str) -> str:
    """Returns the letters of the repositories whose move the mirror has recorded."""
    sightings = {name: await worker.store.upstream_tags.sightings(mirrored(name), TAG) for name in names}
    return "".join(name for name in names if len(sightings[name]) > 1)


@pytest.mark.parametrize("is_cached", [True, False])
@pytest.mark.parametrize(
    "error",
    [
        Denied(),
        UnconfirmedManifestUnknown(),
        UpstreamContentInvalid(),
        UpstreamUnavailable(),
        TooManyRequests(retry_after=60),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_failing_repository_does_not_end_a_round(
    site: MirrorSite, worker: MirrorWorker, error: RegistryError, is_cached: bool
) -> None:
    """The upstream gives no usable answer about one repository, for example because it was deleted. The mirror still
    notices the moves of the tags after it. `is_cached`: whether the failing tag is cached."""
    await make_young_tags(site, worker, "abc")
    if not is_cached:
        await worker.store.delete_tag(mirrored("a"), TAG, by=MIRROR_ACTOR)
    site.upstream.faults.manifest_errors = {"library/a": error}
    await worker.mirror.recheck_young_tags()
    assert await repositories_with_noticed_move(worker, "abc") == "bc"


async def test_many_deleted_repositories_do_not_end_a_round(site: MirrorSite, worker: MirrorWorker) -> None:
    """Somebody has deleted many repositories of the upstream that were pulled before. The mirror still notices the
    moves of the tags after them."""
    await make_young_tags(site, worker, "abcdefgh")
    site.upstream.faults.manifest_errors = {f"library/{name}": Denied() for name in "abcdefg"}
    await worker.mirror.recheck_young_tags()
    assert await repositories_with_noticed_move(worker, "abcdefgh") == "h"


async def make_young_tags_of_one_repository(site: MirrorSite, worker: MirrorWorker, name: str, tags: list[Tag]) -> None:
    """Pulls these tags of the repository `name`."""
    for tag in tags:
        site.upstream.add_image(f"library/{name}", b"first", tags=(tag,))
        await worker.mirror.get_manifest(mirrored(name), tag)
        site.clock.now += 1


@pytest.mark.parametrize(
    ("error", "requests"), [(Denied(), 1), (UpstreamContentInvalid(), 3)], ids=["refused repository", "invalid tag"]
)
async def test_refused_repository_is_asked_about_once_in_a_round(
    site: MirrorSite,
    worker: MirrorWorker,
    error: RegistryError,
    requests: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """If the upstream refuses a repository, for example because the password is wrong, the round skips the other tags
    of the repository: each request is a failed login, and many of them can lock the account. An invalid manifest is no
    reason to skip other tags. The log has one line for each failing repository. The next round asks again."""
    await make_young_tags_of_one_repository(site, worker, "a", [Tag("1"), Tag("2"), Tag("3")])
    await make_young_tags(site, worker, "b")
    site.upstream.faults.manifest_errors = {"library/a": error}
    for _ in range(2):
        site.clock.now += 1
        site.upstream.calls.clear()
        caplog.clear()
        with caplog.at_level("INFO", "registry.mirror"):
            await worker.mirror.recheck_young_tags()
        assert site.upstream.calls["head manifest"] == requests + 1
        assert [record.getMessage() for record in caplog.records if "library/a" in record.getMessage()] == [
            f"cannot ask docker.io about docker.io/library/a:1: {error.message}"
        ]
    assert await repositories_with_noticed_move(worker, "b") == "b"


@pytest.mark.parametrize("error", [StorageFull(), QuotaExceeded()], ids=lambda error: type(error).__name__)
async def test_full_storage_is_not_logged_as_a_failed_request(
    site: MirrorSite, worker: MirrorWorker, error: RegistryError, caplog: pytest.LogCaptureFixture
) -> None:
    """If the new manifest of a young tag cannot be stored, the log does not say that the upstream cannot be asked. The
    round still asks about the other tags of the repository."""
    await make_young_tags_of_one_repository(site, worker, "a", [Tag("1"), Tag("2")])
    site.upstream.faults.manifest_errors = {"library/a": error}
    site.upstream.calls.clear()
    with caplog.at_level("INFO", "registry.mirror"):
        await worker.mirror.recheck_young_tags()
    assert site.upstream.calls["head manifest"] == 2
    (line,) = (record.getMessage() for record in caplog.records if "library/a" in record.getMessage())
    assert line == f"cannot store the answer of docker.io about docker.io/library/a:1: {error.message}"


async def test_first_round_of_a_process_begins_at_a_random_tag(site: MirrorSite) -> None:
    """The first round of a process begins at a random tag. So the mirror asks about the tags after failing repositories
    even if each process is replaced by a reload before its second round."""
    site.configure(tag_ttl=HOUR, cooldown=3 * DAY)
    async with site.worker() as worker:
        await make_young_tags(site, worker, "abcdef")
    site.random_number = 0.3  # chooses the third tag, after which the round begins
    site.upstream.faults.manifest_errors = {f"library/{name}": UpstreamUnavailable() for name in "abc"}
    async with site.worker(source_of_another_worker(site)) as worker:
        with pytest.raises(UpstreamUnavailable):
            await worker.mirror.recheck_young_tags()
        assert await repositories_with_noticed_move(worker, "abcdef") == "def"


async def test_each_tag_can_be_the_start_of_a_first_round(site: MirrorSite, worker: MirrorWorker) -> None:
    """The first round starts at one of the tags of this upstream. The choice depends only on the random number, even if
    the mirror has seen all tags at nearly the same time."""
    await make_young_tags(site, worker, "abc")
    starts = []
    for number in (0.9, 0.4, 0.3):
        served_tags = ServedTags(worker.store.upstream_tags, site.settings, site.clock, lambda: number)  # noqa: B023
        start = await served_tags.pick_random_move()
        starts.append(start and start.repository)
    assert starts == [mirrored("a"), mirrored("b"), mirrored("c")]


async def test_round_continues_after_the_repositories_that_ended_the_one_before(
    site: MirrorSite, worker: MirrorWorker
) -> None:
    """A round ends early if the upstream does not answer about several repositories in a row. The next round starts
    with the tag after them, and asks about the first tags at its end. When the upstream answers again, a round asks
    about all tags."""
    await make_young_tags(site, worker, "abcdef")
    site.upstream.faults.manifest_errors = {f"library/{name}": UpstreamUnavailable() for name in "bcd"}
    assert MAX_UNANSWERED_REPOSITORIES == 3
    with pytest.raises(UpstreamUnavailable):
        await worker.mirror.recheck_young_tags()
    assert await repositories_with_noticed_move(worker, "abcdef") == "a"
    site.upstream.calls.clear()
    with pytest.raises(UpstreamUnavailable):
        await worker.mirror.recheck_young_tags()
    assert await repositories_with_noticed_move(worker, "abcdef") == "aef"
    site.upstream.faults.manifest_errors = {}
    await worker.mirror.recheck_young_tags()
    assert await repositories_with_noticed_move(worker, "abcdef") == "abcdef"


async def test_only_heads_are_sent_while_few_requests_are_left(site: MirrorSite, worker: MirrorWorker) -> None:
    """Clients of the mirror have used up most of the GET requests that the upstream allows. The mirror still notices
    moves and deletions of young tags, with HEAD requests only. It fetches the new manifests when more requests are
    left."""
    await make_young_tags(site, worker, "abc")
    del site.upstream.manifests["library/b", TAG]
    await worker.store.delete_tag(mirrored("c"), TAG, by=MIRROR_ACTOR)
    site.upstream.faults.is_near_rate_limit = True
    site.upstream.calls.clear()
    await worker.mirror.recheck_young_tags()
    assert site.upstream.calls == {"head manifest": 3}
    assert await repositories_with_noticed_move(worker, "abc") == "ac"
    with pytest.raises(ManifestUnknown):
        await worker.mirror.resolve_manifest(mirrored("b"), TAG)
    site.clock.now += 1
    await worker.mirror.recheck_young_tags()
    assert site.upstream.calls == {"head manifest": 5}  # not about the deleted tag, which would take a GET
    site.upstream.faults.is_near_rate_limit = False
    site.clock.now += HOUR
    await worker.mirror.recheck_young_tags()
    second = site.upstream.manifests["library/a", TAG].digest
    assert (await worker.store.resolve_manifest(mirrored("a"), TAG)).digest == second


async def test_frozen_tags_are_not_asked_about(site: MirrorSite, worker: MirrorWorker) -> None:
    """A round does not ask the upstream about a tag that is frozen at one digest."""
    await make_young_tags(site, worker, "ab")
    digest = site.upstream.manifests["library/a", TAG].digest
    await worker.store.upstream_tags.freeze(mirrored("a"), TAG, digest, by=MIRROR_ACTOR)
    await worker.mirror.recheck_young_tags()
    assert await repositories_with_noticed_move(worker, "ab") == "b"


async def test_other_tasks_run_while_moves_are_read(site: MirrorSite, worker: MirrorWorker) -> None:
    """The store has many moves of tags of another upstream, which the mirror skips. Other tasks of the process run
    after every hundred of these moves."""
    db = connect(site.data / "entrepot.db")
    with closing(db), db:
        db.executemany(
            "INSERT INTO upstream_tag (repository, tag, since, digest) VALUES ('ghcr.io/app', ?, ?, ?)",
            [(f"t{number}", site.clock.now - 1 - number, digest_of(b"")) for number in range(400)],
        )
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count_turns())
    assert [move async for move in worker.mirror.served_tags.moves_of_young_tags()] == []
    counting.cancel()
    assert turns >= 4


async def test_first_round_does_not_wait_for_the_interval(
    site: MirrorSite, worker: MirrorWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first round of a process runs soon after its start, so that a server that reloads its settings more often
    than the interval also asks about young tags."""
    monkeypatch.setattr(cooldown_watch, "FIRST_ROUND_SECONDS", 0.01)
    await make_young_tags(site, worker, "a")
    site.upstream.calls.clear()
    async with watch_young_tags([worker.mirror], HOUR, worker.store.leases):
        await wait_until(lambda: site.upstream.calls["head manifest"] > 0)


async def test_upstream_that_does_not_answer_delays_no_other(
    site: MirrorSite, worker: MirrorWorker, tmp_path: Path
) -> None:
    """While a round waits for the answer of one upstream, the rounds of another upstream go on. Only one round at a
    time asks an upstream."""
    await make_young_tags(site, worker, "a")
    site.upstream.calls.clear()
    silent_site = MirrorSite(tmp_path / "silent")
    silent_site.configure(tag_ttl=HOUR, cooldown=3 * DAY)
    async with silent_site.worker() as silent:
        await make_young_tags(silent_site, silent, "a")
        silent_site.upstream.calls.clear()
        silent_site.upstream.faults.hold = asyncio.Event()
        async with watch_young_tags([silent.mirror, worker.mirror], 0.01, worker.store.leases):
            await wait_until(lambda: silent_site.upstream.calls.total() > 0)
            await wait_for_requests(site, site.upstream.calls["head manifest"] + 3)
            assert silent_site.upstream.calls.total() == 1
            silent_site.upstream.faults.hold.set()
            await wait_for_requests(silent_site, 3)


async def wait_for_requests(site: MirrorSite, count: int) -> None:
    """Waits until rounds have sent this number of HEAD requests. Moves the clock on meanwhile, because a round leaves
    out moves that were recorded at its own time."""

    def has_requests() -> bool:
        site.clock.now += 1
        return site.upstream.calls["head manifest"] >= count

    await wait_until(has_requests)
