"""Mirrors over a real store, in front of an upstream in memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import apsw
import pytest

from registry.config import Upstream
from registry.mirror.mirror import Mirror
from storage.composition import open_registry, prepare_data_dir
from storage.data_dir.system import System
from storage.names import RepositoryName
from storage.store.stored_registry import StoredRegistry
from tests.fakes.mirror_source import FakeSource

MIRRORED_REPO = RepositoryName("docker.io/library/app")
UPSTREAM_REPO = "library/app"
NOW = 1_750_000_000.0


async def wait_until(holds: Callable[[], bool]) -> None:
    """Waits for a condition that another task or thread brings about."""
    async with asyncio.timeout(60):
        while not holds():  # noqa: ASYNC110  the other side knows nothing of who waits
            await asyncio.sleep(0.001)


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
    """A mirror and the store below it, as one process has them."""

    def __init__(self, mirror: Mirror, store: StoredRegistry) -> None:
        self.mirror = mirror
        self.store = store


class MirrorStore:
    """A data directory, its upstream, the clocks, and the settings of mirrors over them."""

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
        prepare_data_dir(data)

    def configure(self, **changes: object) -> None:
        self.settings = Upstream.model_validate({**self.settings.model_dump(), **changes})

    @asynccontextmanager
    async def worker(self, far: FakeSource | None = None) -> AsyncIterator[MirrorWorker]:
        """Runs a mirror over the data directory, as one process does. `far`: an upstream of its own."""
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
