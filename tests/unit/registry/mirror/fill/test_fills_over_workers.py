"""How the worker processes of a server share fills. A fill is the download of a blob from an upstream into the cache.
One worker owns the fill. Other workers follow it: they serve the bytes that the owner has stored."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import apsw
import pytest

from registry.backend import open_backend
from registry.config import Settings
from registry.mirror.fill.demand import PULL_IDLE_SECONDS
from registry.single_flight import cancel_and_wait
from storage.composition import open_registry, prepare_data_dir
from storage.content import digest_of
from storage.errors import DigestInvalid, UpstreamTimeout, UpstreamUnavailable
from storage.metadata.sqlite.sqlite_database import SqliteDatabase
from storage.names import Digest, Tag
from storage.partials import Partial
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
    open_in_time,
    read_to_end,
    source_of_another_worker,
)

pytestmark = pytest.mark.slow

FIRST = b"a first layer"
TAG = Tag("1")


async def take_connections(worker: MirrorWorker, stack: AsyncExitStack, count: int) -> None:
    """Takes `count` of the 4 upstream connections, as other fills would."""
    for _ in range(count):
        assert await stack.enter_async_context(worker.store.leases.try_slot("upstream-docker.io", 4))


async def begin_prefetch(site: MirrorSite, worker: MirrorWorker) -> threading.Event:
    """Starts the prefetch of a layer that no client has requested. Only its first MiB arrives until the returned event
    is set."""
    site.upstream.add_image(UPSTREAM_REPO, FIRST, BIG)
    await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
    gate = site.upstream.faults.gates[MIB] = threading.Event()
    await read_blob(worker.mirror, MIRRORED_REPO, digest_of(FIRST))
    await wait_until(lambda: site.upstream.bytes_sent(DIGEST) == MIB)
    await wait_until(lambda: [fill.digest for fill in worker.mirror.running_fills] == [DIGEST])
    return gate


async def test_a_prefetch_becomes_urgent_when_another_worker_reads_it(site: MirrorSite) -> None:
    """A prefetch does not use the last free connections to the upstream. If a client of another worker requests the
    layer, the prefetching worker treats the layer as requested and completes it even over the last connection."""
    site.configure(prefetch="layers")
    async with (
        site.worker() as worker_1,
        site.worker(source_of_another_worker(site)) as worker_2,
        AsyncExitStack() as stack,
    ):
        gate = await begin_prefetch(site, worker_1)
        await take_connections(worker_1, stack, 3)
        reader = await worker_2.mirror.open_blob(MIRRORED_REPO, DIGEST)
        gate.set()
        async with asyncio.timeout(60):
            assert await read_to_end(reader) == BIG
    assert_each_byte_sent_once(site, DIGEST, len(BIG))


async def test_a_prefetch_that_only_another_worker_reads_is_completed(site: MirrorSite) -> None:
    """A worker prefetches a layer that only a client of another worker reads. The worker fetches the layer to its end,
    although the pull in this worker is over."""
    site.configure(prefetch="layers")
    other = source_of_another_worker(site)
    async with site.worker() as worker_1, site.worker(other) as worker_2:
        gate = await begin_prefetch(site, worker_1)
        reader = await worker_2.mirror.open_blob(MIRRORED_REPO, DIGEST)
        site.monotonic.now += PULL_IDLE_SECONDS + 1
        gate.set()
        assert await read_to_end(reader) == BIG
        assert other.calls["get blob"] == 0
    assert_each_byte_sent_once(site, DIGEST, len(BIG))


async def test_followers_are_answered_while_the_fill_waits_for_a_connection(site: MirrorSite) -> None:
    """While a fill waits for a free connection, clients of every worker get the headers of the response in time. The
    bytes follow when a connection is free."""
    site.start_timeout = 0.2
    site.upstream.add_image(UPSTREAM_REPO, BIG)
    async with site.worker() as worker_1, site.worker(source_of_another_worker(site)) as worker_2:
        await worker_1.mirror.get_manifest(MIRRORED_REPO, TAG)
        async with AsyncExitStack() as stack:
            await take_connections(worker_1, stack, 4)
            readers = [await open_in_time(worker, MIRRORED_REPO, DIGEST) for worker in (worker_1, worker_2)]
        assert await asyncio.gather(*map(read_to_end, readers)) == [BIG, BIG]
    assert_each_byte_sent_once(site, DIGEST, len(BIG))


async def test_followers_get_an_error_if_the_upstream_does_not_answer(site: MirrorSite) -> None:
    """If the upstream does not answer the request for a blob, clients of all workers get an error after the start
    timeout."""
    site.upstream.add_image(UPSTREAM_REPO, BIG)
    stall = site.upstream.faults.stall = asyncio.Event()
    async with site.worker() as worker_1, site.worker(source_of_another_worker(site)) as worker_2:
        await worker_1.mirror.get_manifest(MIRRORED_REPO, TAG)
        first = asyncio.create_task(worker_1.mirror.open_blob(MIRRORED_REPO, DIGEST))
        await wait_until(lambda: site.upstream.calls["get blob"] == 1)
        for worker in (worker_1, worker_2):
            worker.set_start_timeout(0.2)
            with pytest.raises(UpstreamTimeout):
                await worker.mirror.open_blob(MIRRORED_REPO, DIGEST)
        await cancel_and_wait([first])
    stall.set()
    async with site.worker(source_of_another_worker(site)) as later_worker:
        assert await read_blob(later_worker.mirror, MIRRORED_REPO, DIGEST) == BIG


async def test_followers_fail_at_once_when_the_owner_gives_up(site: MirrorSite) -> None:
    """When the owner of a fill gives up, the readers of all workers get its error at once. Their workers do not start
    attempts of their own. A later request starts a new attempt."""
    site.stall_timeout = 1.0
    site.upstream.add_image(UPSTREAM_REPO, BIG)
    other_sources = [source_of_another_worker(site) for _ in range(3)]
    async with AsyncExitStack() as stack:
        owner = await stack.enter_async_context(site.worker())
        workers = [await stack.enter_async_context(site.worker(upstream)) for upstream in other_sources]
        await owner.mirror.get_manifest(MIRRORED_REPO, TAG)
        site.upstream.faults.drops = [MIB, *[0] * 1000]
        gate = site.upstream.faults.gates[MIB - 1] = threading.Event()  # the stall timeout begins after the last reader
        readers = [await worker.mirror.open_blob(MIRRORED_REPO, DIGEST) for worker in (owner, *workers)]
        gate.set()
        outcomes = await asyncio.gather(*map(read_to_end, readers), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [UpstreamUnavailable] * 4
        assert {str(outcome) for outcome in outcomes} == {"the connection broke"}
        assert [upstream.calls["get blob"] for upstream in other_sources] == [0, 0, 0]
        site.upstream.faults.drops = []
        assert await read_blob(workers[0].mirror, MIRRORED_REPO, DIGEST) == BIG
        assert other_sources[0].calls["get blob"] > 0
    assert_each_byte_sent_once(site, DIGEST, len(BIG))


async def test_a_failure_for_one_repository_does_not_count_for_another(site: MirrorSite) -> None:
    """If the owner of a fill fails, a follower that reads the blob from another repository takes over the fill."""
    site.stall_timeout = 0.5
    site.upstream.add_image(UPSTREAM_REPO, BIG)
    site.upstream.add_image("library/other", BIG)
    other = source_of_another_worker(site)
    async with site.worker() as worker_1, site.worker(other) as worker_2:
        await worker_1.mirror.get_manifest(MIRRORED_REPO, TAG)
        await worker_2.mirror.get_manifest(OTHER, TAG)
        site.upstream.faults.drops = [MIB, *[0] * 20]
        gate = site.upstream.faults.gates[MIB - 1] = threading.Event()
        first = await worker_1.mirror.open_blob(MIRRORED_REPO, DIGEST)
        second = await worker_2.mirror.open_blob(OTHER, DIGEST)
        reading = asyncio.create_task(read_to_end(second))
        gate.set()
        with pytest.raises(UpstreamUnavailable):
            await read_to_end(first)
        site.upstream.faults.drops.clear()
        assert await reading == BIG
    assert_each_byte_sent_once(site, DIGEST, len(BIG))


async def test_all_workers_avoid_an_endpoint_that_sent_corrupt_bytes(site: MirrorSite) -> None:
    """Before the readers of a corrupt blob can retry, the endpoint that sent the corrupt bytes is recorded for all
    workers. No worker requests the blob from this endpoint again."""
    site.upstream.endpoints = ("https://one", "https://two")
    site.upstream.faults.corrupt = {"https://one"}
    site.upstream.add_image(UPSTREAM_REPO, BIG)
    async with AsyncExitStack() as stack:
        workers = [await stack.enter_async_context(site.worker(source_of_another_worker(site))) for _ in range(4)]
        await workers[0].mirror.get_manifest(MIRRORED_REPO, TAG)
        gate = site.upstream.faults.gates[MIB] = threading.Event()
        readers = [await worker.mirror.open_blob(MIRRORED_REPO, DIGEST) for worker in workers]
        reading = [asyncio.create_task(read_to_end(reader)) for reader in readers]
        gate.set()
        outcomes = await asyncio.gather(*reading, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [DigestInvalid] * 4
        site.upstream.sent[DIGEST].clear()
        bodies = await asyncio.gather(*(read_blob(worker.mirror, MIRRORED_REPO, DIGEST) for worker in workers))
        assert bodies == [BIG] * 4
    assert_each_byte_sent_once(site, DIGEST, len(BIG))


@pytest.mark.parametrize("full", [True, False])
async def test_a_server_on_a_full_disk_does_not_warm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    """On a full disk, the database is opened read-only. A service in this state does not warm its cache (pull
    configured images in advance): it would take a lease that the service which replaces it needs."""

    def open_on_full_disk(*args: Any, immutable: Any = None, **more: Any) -> Any:
        if full and immutable is None:
            raise apsw.FullError("database or disk is full")
        return SqliteDatabase(*args, immutable=immutable, **more)

    settings = Settings.model_validate(
        {
            "data": tmp_path / "data",
            "upstream": [{"name": "far.test"}],
            "warm": {"references": ["far.test/library/app:1"]},
        }
    )
    prepare_data_dir(settings.data)
    monkeypatch.setattr("storage.composition.SqliteDatabase", open_on_full_disk)
    async with open_backend(settings, is_server=True, may_open_read_only=True) as backend:
        assert backend.store.is_read_only == full
        # The task that warms the cache runs a coroutine with the name `_rounds`.
        warming_tasks = [task for task in asyncio.all_tasks() if "_rounds" in repr(task.get_coro())]
        assert len(warming_tasks) == (0 if full else 1)


@pytest.fixture
def partial_files(site: MirrorSite) -> Callable[[], list[str]]:
    """Returns a function that lists the files of partial blobs (blobs that are not complete yet)."""
    return lambda: sorted(os.listdir(site.data / "partials"))


async def test_a_blob_that_another_worker_has_just_stored(
    site: MirrorSite, monkeypatch: pytest.MonkeyPatch, partial_files: Callable[[], list[str]]
) -> None:
    """If a worker claims a blob just after another worker has stored this blob, no partial blob is left behind."""
    site.upstream.add_image(UPSTREAM_REPO, FIRST)
    async with site.worker() as early, site.worker(source_of_another_worker(site)) as late:
        is_claiming, may_claim = asyncio.Event(), asyncio.Event()
        claim = late.store.partials.claim

        async def claim_later(digest: Digest, size: int, source: str = "") -> Partial:
            is_claiming.set()
            await may_claim.wait()
            return await claim(digest, size, source)

        monkeypatch.setattr(late.store.partials, "claim", claim_later)
        await late.mirror.get_manifest(MIRRORED_REPO, TAG)
        reading = asyncio.create_task(read_blob(late.mirror, MIRRORED_REPO, digest_of(FIRST)))
        await is_claiming.wait()
        assert await read_blob(early.mirror, MIRRORED_REPO, digest_of(FIRST)) == FIRST
        may_claim.set()
        assert await reading == FIRST
        assert partial_files() == []
    assert_each_byte_sent_once(site, digest_of(FIRST), len(FIRST))


async def test_a_follower_of_a_discarded_partial_blob(site: MirrorSite, partial_files: Callable[[], list[str]]) -> None:
    """A worker waits for a partial blob that another worker owns. If the owner discards the partial blob, the waiting
    worker claims the blob itself and fetches it."""
    site.upstream.add_image(UPSTREAM_REPO, FIRST)
    async with site.worker() as worker, open_registry(site.data) as other:
        await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
        owner = await other.partials.claim(digest_of(FIRST), len(FIRST), "docker.io")
        assert owner.is_owner
        reading = asyncio.create_task(read_blob(worker.mirror, MIRRORED_REPO, digest_of(FIRST)))
        await wait_until(lambda: owner.has_waiters)
        await owner.discard()
        owner.close()
        assert await reading == FIRST
        assert partial_files() == []
