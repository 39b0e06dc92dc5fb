"""Tests of mirror requests that wait in a queue of the upstream client."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from registry.single_flight import note_sending, waiting_to_send
from storage.names import Tag
from tests.fakes.mirror_source import FakeSource, missing_digest
from tests.fakes.registry_content import index_of
from tests.unit.registry.conftest import wait_until
from tests.unit.registry.mirror.conftest import MIRRORED_REPO, UPSTREAM_REPO, MirrorSite

TAG = Tag("1")


class QueuedSource(FakeSource):
    """An upstream client whose requests wait in a queue until `turn` is set. `queued`: the length of the queue."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = asyncio.Event()
        self.queued = 0

    async def _called(self, kind: str, repo: str = "") -> None:
        self.queued += 1
        try:
            with waiting_to_send():
                await self.turn.wait()
        finally:
            self.queued -= 1
        note_sending()
        await super()._called(kind, repo)


@pytest.fixture
def source(site: MirrorSite) -> QueuedSource:
    site.upstream = queued_source = QueuedSource()
    site.configure(tag_ttl=300, miss_ttl=60)
    return queued_source


async def leave(client: asyncio.Task[Any]) -> None:
    client.cancel()
    with pytest.raises(asyncio.CancelledError):
        await client


async def test_request_for_a_manifest_is_dropped_when_its_clients_have_left(
    site: MirrorSite, source: QueuedSource
) -> None:
    """If all clients leave while the request for a manifest is queued, the upstream is not asked. A later client gets
    the manifest."""
    image = source.add_image(UPSTREAM_REPO, b"layer")
    async with site.worker() as worker:
        first, second = (asyncio.create_task(worker.mirror.get_manifest(MIRRORED_REPO, TAG)) for _ in range(2))
        await wait_until(lambda: source.queued == 1)
        await leave(first)
        assert source.queued == 1
        await leave(second)
        await wait_until(lambda: not source.queued)
        assert not worker.mirror.is_busy
        source.turn.set()
        assert (await worker.mirror.get_manifest(MIRRORED_REPO, TAG)).digest == image.digest
    assert source.calls == {"get manifest": 1}


async def test_request_for_a_manifest_continues_for_the_client_that_stays(
    site: MirrorSite, source: QueuedSource
) -> None:
    """If one of two clients leaves while the request is queued, the other client gets the manifest."""
    image = source.add_image(UPSTREAM_REPO, b"layer")
    async with site.worker() as worker:
        first, second = (asyncio.create_task(worker.mirror.get_manifest(MIRRORED_REPO, TAG)) for _ in range(2))
        await wait_until(lambda: source.queued == 1)
        await leave(first)
        source.turn.set()
        assert (await second).digest == image.digest
    assert source.calls == {"get manifest": 1}


@pytest.mark.parametrize("is_expired", [False, True])
async def test_cached_tag_is_checked_after_its_client_has_got_it(
    site: MirrorSite, source: QueuedSource, is_expired: bool
) -> None:
    """A client may get a cached tag whose time to live is over. The queued request about the tag continues without the
    client. `is_expired`: twice the time to live has passed, so the client first waits for the upstream for
    `stale_wait` seconds."""
    old = source.add_image(UPSTREAM_REPO, b"old")
    async with site.worker() as first_worker:
        source.turn.set()
        await first_worker.mirror.get_manifest(MIRRORED_REPO, TAG)
        source.turn.clear()
    source.closed = False  # the first worker has closed the source at its end
    new = source.add_manifest(UPSTREAM_REPO, index_of([old.descriptor]), "1")
    site.stale_wait = 0.02
    async with site.worker() as worker:
        site.clock.now += 601 if is_expired else 301
        assert (await worker.mirror.get_manifest(MIRRORED_REPO, TAG)).digest == old.digest
        await wait_until(lambda: source.queued == 1)
        source.turn.set()
        await wait_until(lambda: not worker.mirror.is_busy)
        assert (await worker.mirror.get_manifest(MIRRORED_REPO, TAG)).digest == new.digest


async def test_request_for_a_size_is_dropped_when_its_client_has_left(site: MirrorSite, source: QueuedSource) -> None:
    """If the client leaves while the request for a blob's size is queued, the upstream is not asked."""
    async with site.worker() as worker:
        client = asyncio.create_task(worker.mirror.resolve_blob(MIRRORED_REPO, missing_digest()))
        await wait_until(lambda: source.queued == 1)
        await leave(client)
        await wait_until(lambda: not source.queued)
    assert not source.calls
