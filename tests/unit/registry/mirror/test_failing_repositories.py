"""A blob that two repositories of an upstream have: if the upstream does not send it for one repository, clients still
get it from the other one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from storage.composition import open_registry
from storage.content import digest_of
from storage.errors import BlobUnknown, Denied, RegistryError, TooManyRequests, UpstreamTimeout, UpstreamUnavailable
from storage.names import Digest, RepositoryName, Tag
from tests.fakes.registry_content import read_blob
from tests.unit.registry.conftest import wait_until
from tests.unit.registry.mirror.conftest import (
    BIG,
    DIGEST,
    MIB,
    MIRRORED_REPO,
    OTHER,
    UPSTREAM_REPO,
    MirrorSite,
    MirrorWorker,
    assert_each_byte_sent_once,
    read_to_end,
    source_of_another_worker,
)

pytestmark = pytest.mark.slow

SMALL = BIG[:1000]
TAG = Tag("1")


@pytest.fixture(params=["same worker", "other worker"])
async def other_worker(
    site: MirrorSite, worker: MirrorWorker, request: pytest.FixtureRequest
) -> AsyncIterator[MirrorWorker]:
    """The worker that the clients of the second repository use."""
    if request.param == "same worker":
        yield worker
    else:
        async with site.worker(source_of_another_worker(site)) as another:
            yield another


async def pull_manifests(site: MirrorSite, worker: MirrorWorker, data: bytes) -> None:
    """Adds an image with the layer `data` to both repositories of the upstream, and pulls its manifests."""
    for upstream_repo, repo in ((UPSTREAM_REPO, MIRRORED_REPO), ("library/other", OTHER)):
        site.upstream.add_image(upstream_repo, data)
        await worker.mirror.get_manifest(repo, TAG)


async def pull_copies(site: MirrorSite, worker: MirrorWorker, data: bytes, count: int) -> list[RepositoryName]:
    """Adds an image with the layer `data` to `count` repositories of the upstream, pulls its manifests, and returns the
    repositories."""
    repos = [RepositoryName(f"docker.io/library/copy{number}") for number in range(count)]
    for repo in repos:
        site.upstream.add_image(repo.removeprefix("docker.io/"), data)
        await worker.mirror.get_manifest(repo, TAG)
    return repos


def hang(site: MirrorSite, *repos: str) -> asyncio.Event:
    """Makes downloads of blobs of these repositories wait until the returned event is set."""
    stall = site.upstream.faults.stall = asyncio.Event()
    site.upstream.faults.stalled_repos = set(repos)
    return stall


@pytest.mark.parametrize("data", [SMALL, BIG], ids=["small", "large"])
async def test_hanging_repository_does_not_delay_another(
    site: MirrorSite, worker: MirrorWorker, other_worker: MirrorWorker, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The upstream does not respond to the request for a blob from one repository. A client that requests the same
    blob from another repository gets it, and the upstream sends each byte once."""
    monkeypatch.setattr("registry.mirror.blobs.SILENCE_SECONDS", 0.05)
    await pull_manifests(site, worker, data)
    digest = site.upstream.manifests["library/other", TAG].blobs[-1].digest
    stall = hang(site, UPSTREAM_REPO)
    waiting = asyncio.create_task(read_blob(worker.mirror, MIRRORED_REPO, digest))
    await wait_until(lambda: site.upstream.calls["get blob"] == 1)
    async with asyncio.timeout(30):
        bodies = await asyncio.gather(*(read_blob(other_worker.mirror, OTHER, digest) for _ in range(8)))
    assert bodies == [data] * 8
    assert not waiting.done()
    assert_each_byte_sent_once(site, digest, len(data))
    stall.set()
    assert await waiting == data


async def store_old_bytes(worker: MirrorWorker, stop: int = MIB) -> None:
    """Stores the first `stop` bytes of `BIG` in its partial, as a worker does that then dies."""
    dying = await worker.store.partials.claim(DIGEST, len(BIG), "docker.io")
    await asyncio.to_thread(dying.write_at, 0, BIG[:stop])
    dying.close()


async def test_old_bytes_are_no_response_for_another_worker(
    site: MirrorSite, worker: MirrorWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker has died in the middle of a blob. The next owner requests the rest from a repository for which the
    upstream does not respond. Clients of another worker get the blob from another repository."""
    monkeypatch.setattr("registry.mirror.blobs.SILENCE_SECONDS", 0.05)
    await pull_manifests(site, worker, BIG)
    await store_old_bytes(worker)
    stall = hang(site, UPSTREAM_REPO)
    async with site.worker(source_of_another_worker(site)) as another:
        waiting = asyncio.create_task(read_blob(worker.mirror, MIRRORED_REPO, DIGEST))
        await wait_until(lambda: site.upstream.calls["get blob"] == 1)
        async with asyncio.timeout(30):
            bodies = await asyncio.gather(*(read_blob(another.mirror, OTHER, DIGEST) for _ in range(4)))
        assert bodies == [BIG] * 4
        assert not waiting.done()
        stall.set()
        assert await waiting == BIG


async def test_response_counts_after_the_owner_has_died(site: MirrorSite, worker: MirrorWorker) -> None:
    """A worker has got a response, and dies in the middle of the blob. The next owner has followed it, and waits for
    the upstream. A client of a third worker gets the first bytes at once."""
    await pull_manifests(site, worker, BIG)
    async with open_registry(site.data) as other, site.worker(source_of_another_worker(site)) as third:
        await third.mirror.get_manifest(MIRRORED_REPO, TAG)
        owner = await other.partials.claim(DIGEST, len(BIG), "docker.io")
        owner.mark_upstream_request(RepositoryName(UPSTREAM_REPO))
        owner.mark_response()
        await asyncio.to_thread(owner.write_at, 0, BIG[:MIB])
        reader = await worker.mirror.open_blob(MIRRORED_REPO, DIGEST)
        stall = hang(site, UPSTREAM_REPO)
        owner.close()
        await wait_until(lambda: site.upstream.calls["get blob"] == 1)
        async with asyncio.timeout(30):
            late = await third.mirror.open_blob(MIRRORED_REPO, DIGEST)
            assert await late.readable_until(0) == MIB
        stall.set()
        assert await read_to_end(reader) == BIG
        assert await read_to_end(late) == BIG


@pytest.mark.parametrize("next_offset", [MIB, 5 * MIB])
async def test_client_gets_old_bytes_when_others_arrive_in_another_worker(
    site: MirrorSite, worker: MirrorWorker, next_offset: int
) -> None:
    """A worker has died in the middle of a blob, and another process continues the download. A client of this worker
    gets its response when the first new byte arrives, wherever that byte is."""
    await pull_manifests(site, worker, BIG)
    await store_old_bytes(worker)
    async with open_registry(site.data) as other:
        owner = await other.partials.claim(DIGEST, len(BIG), "docker.io")
        owner.mark_upstream_request(RepositoryName(UPSTREAM_REPO))
        opening = asyncio.create_task(worker.mirror.open_blob(MIRRORED_REPO, DIGEST))
        await wait_until(lambda: owner.has_waiters)
        _, unfinished = await asyncio.wait([opening], timeout=0.1)
        assert unfinished
        await asyncio.to_thread(owner.write_at, next_offset, BIG[next_offset : next_offset + 1])
        async with asyncio.timeout(30):
            reader = await opening
            assert await reader.readable_until(0) >= MIB
        owner.close()
        assert await read_to_end(reader) == BIG


@pytest.mark.parametrize("end", ["commits", "dies", "discards"])
async def test_client_that_waits_for_new_bytes_when_the_owner_ends(
    site: MirrorSite, worker: MirrorWorker, end: str
) -> None:
    """A client waits for the owner in another process, which has only old bytes, when the owner ends. The client gets
    the blob."""
    await pull_manifests(site, worker, BIG)
    await store_old_bytes(worker)
    async with open_registry(site.data) as other:
        owner = await other.partials.claim(DIGEST, len(BIG), "docker.io")
        owner.mark_upstream_request(RepositoryName(UPSTREAM_REPO))
        reading = asyncio.create_task(read_blob(worker.mirror, MIRRORED_REPO, DIGEST))
        await wait_until(lambda: owner.has_waiters)
        if end == "commits":
            await asyncio.to_thread(owner.write_at, MIB, BIG[MIB:])
            await owner.commit(OTHER)
        elif end == "discards":
            await owner.discard()
        owner.close()
        async with asyncio.timeout(30):
            assert await reading == BIG
    assert (site.upstream.calls["get blob"] == 0) == (end == "commits")


async def test_silent_blob_takes_at_most_two_connections(site: MirrorSite, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients of two workers request a blob from ten repositories, and the upstream responds to no request for this
    blob. The workers send only two requests for it, so connections stay free for other blobs. When the upstream
    responds, all clients get the blob, and the upstream has sent it twice at most."""
    monkeypatch.setattr("registry.mirror.blobs.SILENCE_SECONDS", 0.02)
    sources = [site.upstream, source_of_another_worker(site)]
    async with site.worker() as worker, site.worker(sources[1]) as other:
        repos = await pull_copies(site, worker, BIG, count=10)
        _, unrelated = site.upstream.add_image("library/unrelated", BIG[1:]).blobs
        await worker.mirror.get_manifest(RepositoryName("docker.io/library/unrelated"), TAG)
        stall = hang(site, *(repo.removeprefix("docker.io/") for repo in repos))
        reading = [
            asyncio.create_task(read_blob((worker, other)[number % 2].mirror, repo, DIGEST))
            for number, repo in enumerate(repos)
        ]
        await wait_until(lambda: sum(source.calls["get blob"] for source in sources) == 2)
        _, unfinished = await asyncio.wait(reading, timeout=0.5)
        assert len(unfinished) == len(repos)
        assert sum(source.calls["get blob"] for source in sources) == 2
        async with asyncio.timeout(30):
            unrelated_repo = RepositoryName("docker.io/library/unrelated")
            assert await read_blob(worker.mirror, unrelated_repo, unrelated.digest) == BIG[1:]
        stall.set()
        assert await asyncio.gather(*reading) == [BIG] * len(repos)
    assert site.upstream.bytes_sent(DIGEST) <= 2 * len(BIG)


async def test_repository_is_served_after_two_others_time_out(
    site: MirrorSite, worker: MirrorWorker, other_worker: MirrorWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients request a blob from two repositories for which the upstream does not respond, and then from a third one,
    which has it. When the first two requests time out, the client of the third repository gets the blob."""
    monkeypatch.setattr("registry.mirror.blobs.SILENCE_SECONDS", 0.02)
    first, second, third = await pull_copies(site, worker, BIG, count=3)
    silent = [repo.removeprefix("docker.io/") for repo in (first, second)]
    stall = hang(site, *silent)
    for upstream_repo in silent:
        site.upstream.faults.errors[upstream_repo] = UpstreamTimeout("late")
    failing = [asyncio.create_task(read_blob(worker.mirror, repo, DIGEST)) for repo in (first, second)]
    await wait_until(lambda: site.upstream.calls["get blob"] == 2)
    reading = asyncio.create_task(read_blob(other_worker.mirror, third, DIGEST))
    await asyncio.wait([reading], timeout=0.1)
    stall.set()
    assert await reading == BIG
    for error in await asyncio.gather(*failing, return_exceptions=True):
        assert isinstance(error, UpstreamTimeout) or error == BIG  # a client that still waits may get the blob


async def test_many_failing_repositories_do_not_fail_another(
    site: MirrorSite, worker: MirrorWorker, other_worker: MirrorWorker
) -> None:
    """Clients request a blob from eight repositories for which the upstream refuses to send it, and then from a ninth
    one, which has it. The client of the ninth repository gets the blob."""
    *refused, last = await pull_copies(site, worker, SMALL, count=9)
    for repo in refused:
        site.upstream.faults.errors[repo.removeprefix("docker.io/")] = Denied("no")
    digest = digest_of(SMALL)
    stall = hang(site, *site.upstream.faults.errors)
    failing = [asyncio.create_task(read_blob(worker.mirror, repo, digest)) for repo in refused]
    await wait_until(lambda: site.upstream.calls["get blob"] == 1)
    (fill,) = worker.mirror.running_fills
    await wait_until(lambda: set(refused) == fill.repositories)
    reading = asyncio.create_task(read_blob(other_worker.mirror, last, digest))
    if other_worker is worker:
        await wait_until(lambda: last in fill.repositories)
    stall.set()
    assert await reading == SMALL
    for error in await asyncio.gather(*failing, return_exceptions=True):
        assert isinstance(error, Denied) or error == SMALL  # a client that still waits may get the blob


async def test_slow_repository_is_asked_once(site: MirrorSite, monkeypatch: pytest.MonkeyPatch) -> None:
    """The upstream takes long to respond to the request for a blob. Clients of all workers that request the blob from
    the same repository wait for the same response."""
    monkeypatch.setattr("registry.mirror.blobs.SILENCE_SECONDS", 0.01)
    other_source = source_of_another_worker(site)
    async with site.worker() as worker, site.worker(other_source) as other:
        await pull_manifests(site, worker, BIG)
        stall = hang(site, UPSTREAM_REPO)
        reading = [asyncio.create_task(read_blob(worker.mirror, MIRRORED_REPO, DIGEST))]
        await wait_until(lambda: site.upstream.calls["get blob"] == 1)
        reading.append(asyncio.create_task(read_blob(other.mirror, MIRRORED_REPO, DIGEST)))
        _, unfinished = await asyncio.wait(reading, timeout=0.5)
        assert len(unfinished) == 2
        assert (site.upstream.calls["get blob"], other_source.calls["get blob"]) == (1, 0)
        stall.set()
        assert await asyncio.gather(*reading) == [BIG, BIG]
    assert_each_byte_sent_once(site, DIGEST, len(BIG))


@pytest.mark.parametrize(
    "error",
    [UpstreamTimeout("late"), UpstreamUnavailable("503"), Denied("no"), TooManyRequests("later", retry_after=60)],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("data", [SMALL, BIG], ids=["small", "large"])
async def test_error_of_a_repository_is_not_the_error_of_another(
    site: MirrorSite,
    worker: MirrorWorker,
    other_worker: MirrorWorker,
    error: RegistryError,
    data: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While a client of another repository waits for the same blob, the upstream refuses to send the blob for the first
    repository. Only clients of the first repository get the error."""
    monkeypatch.setattr("registry.mirror.blobs.SILENCE_SECONDS", 60)  # so that a busy machine starts no separate fill
    await pull_manifests(site, worker, data)
    digest = site.upstream.manifests["library/other", TAG].blobs[-1].digest
    stall = hang(site, UPSTREAM_REPO)
    site.upstream.faults.errors[UPSTREAM_REPO] = error
    failing = asyncio.create_task(read_blob(worker.mirror, MIRRORED_REPO, digest))
    await wait_until(lambda: site.upstream.calls["get blob"] == 1)
    reading = asyncio.create_task(read_blob(other_worker.mirror, OTHER, digest))
    if other_worker is worker:
        (fill,) = worker.mirror.running_fills
        await wait_until(lambda: OTHER in fill.repositories)
    stall.set()
    with pytest.raises(type(error)):
        await failing
    assert await reading == data
    assert_each_byte_sent_once(site, digest, len(data))


async def test_broken_download_continues_with_another_repository(
    site: MirrorSite, worker: MirrorWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A download breaks off, and the upstream then refuses to send the blob for the first repository. The missing bytes
    are requested from the second repository, and the clients of both repositories get the whole blob."""
    monkeypatch.setattr("registry.mirror.blobs.SILENCE_SECONDS", 60)  # so that a busy machine starts no separate fill
    await pull_manifests(site, worker, BIG)
    site.upstream.faults.drops = [MIB]
    stall = hang(site, UPSTREAM_REPO)
    readers = [asyncio.create_task(worker.mirror.open_blob(repo, DIGEST)) for repo in (MIRRORED_REPO, OTHER)]
    await wait_until(lambda: site.upstream.calls["get blob"] == 1)
    (fill,) = worker.mirror.running_fills
    await wait_until(lambda: OTHER in fill.repositories)

    def refuse(_: Digest) -> None:
        site.upstream.faults.errors[UPSTREAM_REPO] = Denied("no")

    site.upstream.on_fetch = refuse  # called for each further request
    stall.set()
    assert await asyncio.gather(*[read_to_end(await reader) for reader in readers]) == [BIG, BIG]
    assert_each_byte_sent_once(site, DIGEST, len(BIG))


async def test_broken_download_continues_with_the_repository_that_sent_bytes(
    site: MirrorSite, worker: MirrorWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients request a blob from one repository that has it and from 30 that do not, and wait for the same download.
    When the connection breaks, the missing bytes are requested from the repository that has sent the first bytes."""
    monkeypatch.setattr("registry.mirror.blobs.SILENCE_SECONDS", 60)
    (good, *missing), readers, stall = await join_download(site, worker, BIG, count=31)
    site.upstream.faults.drops = [MIB]
    for repo in missing:
        site.upstream.faults.errors[repo.removeprefix("docker.io/")] = BlobUnknown()
    stall.set()
    assert await asyncio.gather(*readers) == [BIG] * len(readers)
    assert set(site.upstream.requested_repos[DIGEST]) == {good.removeprefix("docker.io/")}
    assert_each_byte_sent_once(site, DIGEST, len(BIG))


async def test_repository_that_does_not_have_the_blob_is_asked_once(
    site: MirrorSite, worker: MirrorWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A download breaks off, and the upstream then fails for the repository that has sent bytes. This repository is
    left after two failures in a row, and is asked again between two others. A repository that does not have the blob is
    not asked again."""
    monkeypatch.setattr("registry.mirror.blobs.SILENCE_SECONDS", 60)
    monkeypatch.setattr("registry.mirror.fill.retry.LONGEST_PAUSE_SECONDS", 0.01)
    data = BIG[: 2 * MIB]
    repos, readers, stall = await join_download(site, worker, data, count=4)
    names = [repo.removeprefix("docker.io/") for repo in repos]
    site.upstream.faults.drops = [MIB]
    site.upstream.faults.errors.update({names[1]: BlobUnknown(), names[2]: BlobUnknown()})

    def fail(_: Digest) -> None:
        site.upstream.faults.errors[names[0]] = UpstreamUnavailable("503")

    site.upstream.on_fetch = fail  # called for each further request
    stall.set()
    assert await asyncio.gather(*readers) == [data] * len(readers)
    sender, first, second, last = names
    assert site.upstream.requested_repos[digest_of(data)] == [
        *(sender, sender, first),
        *(sender, sender, second),
        *(sender, sender, last),
    ]
    assert_each_byte_sent_once(site, digest_of(data), len(data))


async def join_download(
    site: MirrorSite, worker: MirrorWorker, data: bytes, count: int
) -> tuple[list[RepositoryName], list[asyncio.Task[bytes]], asyncio.Event]:
    """Starts to read a blob of several repositories. Returns the repositories, the tasks that read the blob, and an
    event. The upstream responds to the request from the first repository when the event is set."""
    repos = await pull_copies(site, worker, data, count)
    stall = hang(site, repos[0].removeprefix("docker.io/"))
    readers = [asyncio.create_task(read_blob(worker.mirror, repo, digest_of(data))) for repo in repos]
    await wait_until(lambda: site.upstream.calls["get blob"] == 1)
    (fill,) = worker.mirror.running_fills
    await wait_until(lambda: fill.repositories == set(repos))
    return repos, readers, stall
