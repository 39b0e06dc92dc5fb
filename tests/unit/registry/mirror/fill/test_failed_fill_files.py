"""A fill (the download of a blob from an upstream into the cache) that fails before it has got many bytes leaves no
files. Otherwise an upstream could fill the disk with files of blobs that it names and does not send."""

from __future__ import annotations

import asyncio
import os

import pytest

from storage.content import digest_of
from storage.errors import BlobUnknown, Denied, RegistryError, TooManyRequests, UpstreamTimeout, UpstreamUnavailable
from storage.names import Tag
from storage.partials import MIN_KEPT_BYTES
from tests.fakes.mirror_source import CHUNK
from tests.fakes.registry_content import read_blob
from tests.unit.registry.conftest import wait_until
from tests.unit.registry.mirror.conftest import (
    BIG,
    DIGEST,
    MIRRORED_REPO,
    UPSTREAM_REPO,
    MirrorSite,
    MirrorWorker,
    begin_pull,
    read_to_end,
    source_of_another_worker,
)

pytestmark = pytest.mark.slow


def partial_files(site: MirrorSite) -> list[str]:
    """Returns the names of the files of partial blobs (blobs that are not complete yet)."""
    return sorted(os.listdir(site.data / "partials"))


@pytest.mark.parametrize(
    "error",
    [
        UpstreamTimeout("late"),
        UpstreamUnavailable("503"),
        Denied("no"),
        TooManyRequests("later", retry_after=60),
        BlobUnknown("no such blob"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("data", [b"small", BIG], ids=["small", "large"])
async def test_failed_fill_without_bytes_leaves_no_files(
    site: MirrorSite, worker: MirrorWorker, error: RegistryError, data: bytes
) -> None:
    """A fill that gets no byte deletes the files of its partial blob. A later fill works."""
    await begin_pull(site, worker, data)
    site.upstream.faults.errors[UPSTREAM_REPO] = error
    with pytest.raises(type(error)):
        await read_blob(worker.mirror, MIRRORED_REPO, digest_of(data))
    await wait_until(lambda: not worker.mirror.is_busy)
    assert partial_files(site) == []
    site.upstream.faults.errors.clear()
    site.clock.now += 61
    assert await read_blob(worker.mirror, MIRRORED_REPO, digest_of(data)) == data


async def test_followers_get_the_failure_of_a_fill_whose_files_are_deleted(site: MirrorSite) -> None:
    """A fill gets no response until the upstream times out. Clients of the other workers get the same error, and their
    workers do not request the blob again."""
    site.upstream.add_image(UPSTREAM_REPO, BIG)
    other_source = source_of_another_worker(site)
    stall = site.upstream.faults.stall = asyncio.Event()
    site.upstream.faults.errors[UPSTREAM_REPO] = UpstreamTimeout("late")
    async with site.worker() as worker, site.worker(other_source) as other:
        await worker.mirror.get_manifest(MIRRORED_REPO, Tag("1"))
        first = asyncio.create_task(worker.mirror.open_blob(MIRRORED_REPO, DIGEST))
        await wait_until(lambda: site.upstream.calls["get blob"] == 1)
        second = asyncio.create_task(other.mirror.open_blob(MIRRORED_REPO, DIGEST))
        # another handle of the partial blob, to see when the other worker waits
        partial = await worker.store.partials.claim(DIGEST, len(BIG), "docker.io")
        await wait_until(lambda: partial.has_waiters)
        partial.close()
        stall.set()
        outcomes = await asyncio.gather(first, second, return_exceptions=True)
        assert [str(outcome) for outcome in outcomes] == ["late", "late"]
        assert other_source.calls["get blob"] == 0
        await wait_until(lambda: not worker.mirror.is_busy)
        assert partial_files(site) == []


@pytest.mark.parametrize("stored_bytes", [1, MIN_KEPT_BYTES - CHUNK, MIN_KEPT_BYTES])
async def test_failed_fill_keeps_only_many_bytes(site: MirrorSite, stored_bytes: int) -> None:
    """A fill that fails after a few bytes deletes them. It keeps `MIN_KEPT_BYTES` or more for the next fill."""
    site.stall_timeout = 0.2
    async with site.worker() as worker:
        await begin_pull(site, worker)
        site.upstream.faults.drops = [stored_bytes, *[0] * 1000]
        reader = await worker.mirror.open_blob(MIRRORED_REPO, DIGEST)
        with pytest.raises(UpstreamUnavailable):
            await read_to_end(reader)
        await wait_until(lambda: not worker.mirror.is_busy)
        assert len(partial_files(site)) == (2 if stored_bytes >= MIN_KEPT_BYTES else 0)
        site.upstream.faults.drops = []
        assert await read_blob(worker.mirror, MIRRORED_REPO, DIGEST) == BIG
