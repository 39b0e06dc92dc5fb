"""Mirrors over a real store, in front of an upstream in memory, and a large blob that they fill."""

from __future__ import annotations

import asyncio
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
from storage.content import digest_of
from storage.data_dir.system import System
from storage.errors import BlobUnknown
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
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


class SlowDisk(System):
    """The real disk, but it can be full for metadata, or slow: each commit takes `pause` seconds longer."""

    full = False
    pause = 0.0

    def commit(self, commit: Callable[[], None], *, durable: bool) -> None:
        time.sleep(self.pause)
        if self.full:
            raise apsw.FullError("database or disk is full")
        super().commit(commit, durable=durable)


class MirrorWorker:
    """A mirror and its store, as one process has them."""

    def __init__(self, mirror: Mirror, store: StoredRegistry) -> None:
        self.mirror = mirror
        self.store = store


class MirrorStore:
    """A data directory, its upstream, the clocks, and the settings of its mirrors."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.far = FakeSource()
        self.clock = MirrorClock()
        self.disk = SlowDisk()
        self.monotonic = MirrorClock()
        self.stale_wait = 60.0
        self.start_timeout = 60.0
        self.stall_timeout = 60.0
        self.settings = Upstream(name="docker.io", prefetch="off")
        self.observer: MirrorObserver = UNOBSERVED
        prepare_data_dir(data)

    def configure(self, **changes: object) -> None:
        self.settings = Upstream.model_validate({**self.settings.model_dump(), **changes})

    @asynccontextmanager
    async def worker(self, far: FakeSource | None = None) -> AsyncIterator[MirrorWorker]:
        """Runs a mirror over the data directory, as one process does. `far`: the upstream; None: the one of the
        site."""
        async with open_registry(self.data, clock=self.clock, system=self.disk) as store:
            mirror = Mirror(
                store,
                far or self.far,
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
            )
            try:
                yield MirrorWorker(mirror, store)
            finally:
                await mirror.aclose()


def source_of_another_worker(site: MirrorStore) -> FakeSource:
    """Returns the same upstream, as another worker reaches it."""
    far = FakeSource(site.far.connections, site.far.endpoints)
    far.blobs, far.manifests, far.sent, far.faults = site.far.blobs, site.far.manifests, site.far.sent, site.far.faults
    return far


@pytest.fixture
def site(tmp_path: Path) -> MirrorStore:
    return MirrorStore(tmp_path / "data")


@pytest.fixture
async def worker(site: MirrorStore) -> AsyncIterator[MirrorWorker]:
    async with site.worker() as opened:
        yield opened


async def begin_pull(site: MirrorStore, worker: MirrorWorker, *layers: bytes) -> None:
    """Adds an image with these layers to the upstream, and pulls its manifest."""
    site.far.add_image(UPSTREAM_REPO, *(layers or (BIG,)))
    await worker.mirror.get_manifest(MIRRORED_REPO, Tag("1"))


async def read(reader: BlobReader) -> bytes:
    try:
        return b"".join([chunk async for chunk in reader])
    finally:
        await reader.aclose()


def sent_once(site: MirrorStore, digest: Digest, size: int) -> None:
    """Checks that the upstream sent every byte once."""
    spans = sorted(site.far.sent[digest])
    assert spans[0][0] == 0
    assert spans[-1][1] == size
    assert all(one[1] == two[0] for one, two in pairwise(spans))


async def stored(worker: MirrorWorker, digest: Digest, repo: RepositoryName = MIRRORED_REPO) -> None:
    """Waits until the blob is in the store."""
    async with asyncio.timeout(60):
        while True:
            try:
                await worker.store.resolve_blob(repo, digest)
            except BlobUnknown:
                await asyncio.sleep(0.001)
            else:
                return
