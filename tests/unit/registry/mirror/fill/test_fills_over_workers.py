"""What the workers of one server know about each other's fills."""

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
from registry.mirror.fill.slots import PULL_IDLE_SECONDS
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
    MirrorStore,
    MirrorWorker,
    read,
    sent_once,
    source_of_another_worker,
)

pytestmark = pytest.mark.slow

FIRST = b"a first layer"
TAG = Tag("1")


async def take(worker: MirrorWorker, stack: AsyncExitStack, count: int) -> None:
    """Takes `count` connections, as other fills would."""
    for _ in range(count):
        assert await stack.enter_async_context(worker.store.leases.try_slot("upstream-docker.io", 4))


async def prefetched(site: MirrorStore, worker: MirrorWorker) -> threading.Event:
    """Prefetches a layer that no client has requested. Its second MiB arrives once the event is set."""
    site.far.add_image(UPSTREAM_REPO, FIRST, BIG)
    await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
    gate = site.far.faults.gates[MIB] = threading.Event()
    await read_blob(worker.mirror, MIRRORED_REPO, digest_of(FIRST))
    await wait_until(lambda: site.far.bytes_sent(DIGEST) == MIB)
    return gate


async def test_a_prefetch_becomes_urgent_when_another_worker_reads_it(site: MirrorStore) -> None:
    """If a client of another worker requests a layer that is being prefetched, the prefetching worker treats the layer
    as requested, even if few connections are left."""
    site.configure(prefetch="layers")
    async with site.worker() as one, site.worker(source_of_another_worker(site)) as two, AsyncExitStack() as stack:
        gate = await prefetched(site, one)
        await take(one, stack, 3)
        reader = await two.mirror.open_blob(MIRRORED_REPO, DIGEST)
        gate.set()
        async with asyncio.timeout(60):
            assert await read(reader) == BIG
    sent_once(site, DIGEST, len(BIG))


async def test_a_prefetch_that_only_another_worker_reads_is_completed(site: MirrorStore) -> None:
    """A prefetched layer is fetched to its end if only clients of another worker read it."""
    site.configure(prefetch="layers")
    other = source_of_another_worker(site)
    async with site.worker() as one, site.worker(other) as two:
        gate = await prefetched(site, one)
        reader = await two.mirror.open_blob(MIRRORED_REPO, DIGEST)
        site.monotonic.now += PULL_IDLE_SECONDS + 1
        gate.set()
        assert await read(reader) == BIG
        assert other.calls["get blob"] == 0
    sent_once(site, DIGEST, len(BIG))


async def test_followers_are_answered_while_the_fill_waits_for_a_connection(site: MirrorStore) -> None:
    """While a fill waits for a connection, clients of every worker are answered in time. The blob follows when there is
    a connection."""
    site.start_timeout = 0.2
    site.far.add_image(UPSTREAM_REPO, BIG)
    async with site.worker() as one, site.worker(source_of_another_worker(site)) as two:
        await one.mirror.get_manifest(MIRRORED_REPO, TAG)
        async with AsyncExitStack() as stack:
            await take(one, stack, 4)
            readers = [await worker.mirror.open_blob(MIRRORED_REPO, DIGEST) for worker in (one, two)]
        assert await asyncio.gather(*map(read, readers)) == [BIG, BIG]
    sent_once(site, DIGEST, len(BIG))


async def test_followers_get_an_error_if_the_upstream_does_not_answer(site: MirrorStore) -> None:
    """When the upstream does not answer a request, clients of all workers get an error in time."""
    site.start_timeout = 0.2
    site.far.add_image(UPSTREAM_REPO, BIG)
    stall = site.far.faults.stall = asyncio.Event()
    async with site.worker() as one, site.worker(source_of_another_worker(site)) as two:
        await one.mirror.get_manifest(MIRRORED_REPO, TAG)
        for worker in (one, two):
            with pytest.raises(UpstreamTimeout):
                await worker.mirror.open_blob(MIRRORED_REPO, DIGEST)
    stall.set()
    site.start_timeout = 30.0
    async with site.worker(source_of_another_worker(site)) as patient:
        assert await read_blob(patient.mirror, MIRRORED_REPO, DIGEST) == BIG


async def test_an_owner_that_gives_up_tells_its_followers(site: MirrorStore) -> None:
    """When the owner gives up, readers of all workers fail at once instead of trying for as long themselves. A later
    request is a new attempt."""
    site.stall_timeout = 1.0
    site.far.add_image(UPSTREAM_REPO, BIG)
    others = [source_of_another_worker(site) for _ in range(3)]
    async with AsyncExitStack() as stack:
        owner = await stack.enter_async_context(site.worker())
        workers = [await stack.enter_async_context(site.worker(far)) for far in others]
        await owner.mirror.get_manifest(MIRRORED_REPO, TAG)
        site.far.faults.drops = [MIB, *[0] * 1000]
        readers = [await worker.mirror.open_blob(MIRRORED_REPO, DIGEST) for worker in (owner, *workers)]
        ends = await asyncio.gather(*map(read, readers), return_exceptions=True)
        assert [type(end) for end in ends] == [UpstreamUnavailable] * 4
        assert {str(end) for end in ends} == {"the connection broke"}
        assert [far.calls["get blob"] for far in others] == [0, 0, 0]
        site.far.faults.drops = []
        assert await read_blob(workers[0].mirror, MIRRORED_REPO, DIGEST) == BIG
        assert others[0].calls["get blob"] > 0
    sent_once(site, DIGEST, len(BIG))


async def test_a_failure_for_one_repository_does_not_count_for_another(site: MirrorStore) -> None:
    """If the owner of a fill fails for its repository, a follower for another repository takes over."""
    site.stall_timeout = 0.5
    site.far.add_image(UPSTREAM_REPO, BIG)
    site.far.add_image("library/other", BIG)
    other = source_of_another_worker(site)
    async with site.worker() as one, site.worker(other) as two:
        await one.mirror.get_manifest(MIRRORED_REPO, TAG)
        await two.mirror.get_manifest(OTHER, TAG)
        site.far.faults.drops = [MIB, *[0] * 20]
        first = await one.mirror.open_blob(MIRRORED_REPO, DIGEST)
        second = await two.mirror.open_blob(OTHER, DIGEST)
        reading = asyncio.create_task(read(second))
        with pytest.raises(UpstreamUnavailable):
            await read(first)
        site.far.faults.drops.clear()
        assert await reading == BIG
    sent_once(site, DIGEST, len(BIG))


async def test_wrong_bytes_are_fetched_once(site: MirrorStore) -> None:
    """All workers know who sent corrupt bytes before their readers retry: no worker asks that endpoint again."""
    site.far.endpoints = ("https://one", "https://two")
    site.far.faults.corrupt = {"https://one"}
    site.far.add_image(UPSTREAM_REPO, BIG)
    async with AsyncExitStack() as stack:
        workers = [await stack.enter_async_context(site.worker(source_of_another_worker(site))) for _ in range(4)]
        await workers[0].mirror.get_manifest(MIRRORED_REPO, TAG)
        gate = site.far.faults.gates[MIB] = threading.Event()
        readers = [await worker.mirror.open_blob(MIRRORED_REPO, DIGEST) for worker in workers]
        reading = [asyncio.create_task(read(reader)) for reader in readers]
        gate.set()
        ends = await asyncio.gather(*reading, return_exceptions=True)
        assert [type(end) for end in ends] == [DigestInvalid] * 4
        site.far.sent[DIGEST].clear()
        got = await asyncio.gather(*(read_blob(worker.mirror, MIRRORED_REPO, DIGEST) for worker in workers))
        assert got == [BIG] * 4
    sent_once(site, DIGEST, len(BIG))


@pytest.mark.parametrize("full", [True, False])
async def test_a_start_on_a_full_disk_warms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    """A service that opened its database read-only does not take the lease for warming, because the service that
    replaces it later needs this lease."""

    def without_room(*args: Any, immutable: Any = None, **more: Any) -> Any:
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
    monkeypatch.setattr("storage.composition.SqliteDatabase", without_room)
    async with open_backend(settings, serving=True, may_open_read_only=True) as backend:
        assert backend.store.is_read_only == full
        rounds = [task for task in asyncio.all_tasks() if "_rounds" in repr(task.get_coro())]
        assert len(rounds) == (0 if full else 1)


@pytest.fixture
def partial_files(site: MirrorStore) -> Callable[[], list[str]]:
    """Returns the names of the files of partial blobs."""
    return lambda: sorted(os.listdir(site.data / "partials"))


async def test_a_blob_that_another_worker_has_just_stored(
    site: MirrorStore, monkeypatch: pytest.MonkeyPatch, partial_files: Callable[[], list[str]]
) -> None:
    """A worker that claims a blob just after another one has stored it leaves no partial blob behind."""
    site.far.add_image(UPSTREAM_REPO, FIRST)
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
    sent_once(site, digest_of(FIRST), len(FIRST))


async def test_a_follower_of_a_discarded_partial_blob(
    site: MirrorStore, partial_files: Callable[[], list[str]]
) -> None:
    """A worker that waits for a partial blob which its owner discards claims the blob anew."""
    site.far.add_image(UPSTREAM_REPO, FIRST)
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
