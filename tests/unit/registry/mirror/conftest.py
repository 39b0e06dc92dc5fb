"""Fixtures of the mirror tests: mirrors over a real store, with an upstream in memory, and a large test blob."""

from __future__ import annotations

import asyncio
import errno
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import apsw
import pytest

from registry.config import Upstream
from registry.mirror.mirror import Mirror
from registry.mirror.observer import UNOBSERVED, MirrorObserver
from storage.composition import open_registry, prepare_data_dir
from storage.content import Span, digest_of
from storage.data_dir.system import System
from storage.errors import BlobUnknown, UpstreamTimeout
from storage.interface import BlobReader
from storage.names import Digest, RepositoryName, Tag
from storage.store.stored_registry import StoredRegistry
from tests.fakes.mirror_source import FakeSource

MIRRORED_REPO = RepositoryName("docker.io/library/app")
UPSTREAM_REPO = "library/app"
NOW = 1_750_000_000.0
MIB = 1 << 20
BIG = random.Random(4).randbytes(12 * MIB + 12345)
DIGEST = digest_of(BIG)
OTHER = RepositoryName("docker.io/library/other")


class MirrorClock:
    """A clock that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


class SlowDisk(System):
    """The real disk with four faults. If `full` is set, no metadata can be written. If `refuses_blobs` is set, no
    download of a blob can be stored. Before each commit of metadata, the disk waits for `pause` seconds. `unlink`
    deletes the file at once, but returns `unlink_pause` seconds later."""

    full = False
    refuses_blobs = False
    pause = 0.0
    unlink_pause = 0.0

    def commit(self, commit: Callable[[], None], *, durable: bool) -> None:
        time.sleep(self.pause)
        if self.full:
            raise apsw.FullError("database or disk is full")
        super().commit(commit, durable=durable)

    def truncate(self, fd: int, size: int) -> None:
        if self.refuses_blobs:
            raise OSError(errno.ENOSPC, "no space left on the disk")
        super().truncate(fd, size)

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        time.sleep(self.unlink_pause)


class MirrorWorker:
    """The mirror and the store of a worker process."""

    def __init__(self, mirror: Mirror, store: StoredRegistry) -> None:
        self.mirror = mirror
        self.store = store

    def set_start_timeout(self, seconds: float) -> None:
        """Sets the start timeout for the clients that come from now on."""
        self.mirror._blobs._start_timeout = seconds

    def is_queued(self, digest: Digest) -> bool:
        """Returns whether the blob's fill waits for a connection."""
        return any(fill.digest == digest and fill.is_queued for fill in self.mirror.running_fills)


class MirrorSite:
    """A server site: a data directory, and the upstream, clocks and settings for the mirrors of its workers."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.upstream = FakeSource()
        self.clock = MirrorClock()
        self.disk = SlowDisk()
        self.monotonic = MirrorClock()
        self.stale_wait = 60.0
        self.start_timeout = 60.0
        self.stall_timeout = 60.0
        self.settings = Upstream(name="docker.io", prefetch="off")
        self.observer: MirrorObserver = UNOBSERVED
        self.random_number = 1.0
        """The random number that the mirrors use. It chooses where a new mirror begins its first round of
        `recheck_young_tags`. A tag is young if it has moved within its cooldown. With 1.0, the round begins with the
        young tag that moved first."""
        prepare_data_dir(data)

    def configure(self, **changes: object) -> None:
        self.settings = Upstream.model_validate({**self.settings.model_dump(), **changes})

    @asynccontextmanager
    async def worker(self, upstream: FakeSource | None = None) -> AsyncIterator[MirrorWorker]:
        """Runs a mirror over the data directory, as a worker process does. If `upstream` is None, the mirror uses
        `self.upstream`."""
        async with open_registry(self.data, clock=self.clock, system=self.disk) as store:
            mirror = Mirror(
                store,
                upstream or self.upstream,
                store.partials,
                store.records,
                store.leases,
                self.settings,
                self.clock,
                self.monotonic,
                self.stale_wait,
                self.start_timeout,
                self.stall_timeout,
                tags=store.upstream_tags,
                observer=self.observer,
                random_number=lambda: self.random_number,
            )
            try:
                yield MirrorWorker(mirror, store)
            finally:
                await mirror.aclose()


def source_of_another_worker(site: MirrorSite) -> FakeSource:
    """Returns a second client of the site's upstream, for another worker. The two clients share the content and the
    faults of the upstream, but each counts its own requests."""
    upstream = FakeSource(site.upstream.connections, site.upstream.endpoints)
    upstream.blobs, upstream.manifests, upstream.sent, upstream.faults = (
        site.upstream.blobs,
        site.upstream.manifests,
        site.upstream.sent,
        site.upstream.faults,
    )
    return upstream


@pytest.fixture
def site(tmp_path: Path) -> MirrorSite:
    return MirrorSite(tmp_path / "data")


@pytest.fixture
async def worker(site: MirrorSite) -> AsyncIterator[MirrorWorker]:
    async with site.worker() as opened:
        yield opened


async def begin_pull(site: MirrorSite, worker: MirrorWorker, *layers: bytes) -> None:
    """Adds an image with these layers to the upstream, and pulls its manifest."""
    site.upstream.add_image(UPSTREAM_REPO, *(layers or (BIG,)))
    await worker.mirror.get_manifest(MIRRORED_REPO, Tag("1"))


async def open_in_time(
    worker: MirrorWorker, repo: RepositoryName, digest: Digest, span: Span | None = None
) -> BlobReader:
    """Opens a blob whose fill may wait for a connection. On a slow machine, the start timeout may pass before the fill
    begins to wait. The client then tries again. While the fill waits, a timeout is a failure of the test."""
    async with asyncio.timeout(60):
        while True:
            try:
                return await worker.mirror.open_blob(repo, digest, span)
            except UpstreamTimeout:
                assert not worker.is_queued(digest)


async def read_to_end(reader: BlobReader) -> bytes:
    try:
        return b"".join([chunk async for chunk in reader])
    finally:
        await reader.aclose()


def assert_each_byte_sent_once(site: MirrorSite, digest: Digest, size: int) -> None:
    """Checks that the upstream sent every byte of the blob exactly once."""
    spans = sorted(site.upstream.sent[digest])
    assert spans[0][0] == 0
    assert spans[-1][1] == size
    assert all(span[1] == following[0] for span, following in pairwise(spans))


async def wait_until_stored(worker: MirrorWorker, digest: Digest, repo: RepositoryName = MIRRORED_REPO) -> None:
    """Waits until the blob is in the store."""
    async with asyncio.timeout(60):
        while True:
            try:
                await worker.store.resolve_blob(repo, digest)
            except BlobUnknown:
                await asyncio.sleep(0.001)
            else:
                return
