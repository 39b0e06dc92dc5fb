"""Activity is the number of pulls, pushes and mirror requests in each hour. The tests check which requests count, and
when the processes of a server store the counts."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from registry.asgi import REQUEST_NOTES_EXTENSION, Scope
from registry.server.connection.request_reports import RequestEnd
from registry.telemetry import activity_recorder
from registry.telemetry.activity_recorder import ActivityRecorder
from registry.telemetry.metrics import Metrics
from registry.telemetry.request_recorder import RequestRecorder
from storage.activity import HOUR_SECONDS, Activity, ActivityBucket, ActivityLog
from storage.errors import StorageFull
from storage.store.stored_registry import StoredRegistry
from tests.fakes.upkeep_store import Clock

FULL_HOUR = 1_700_000_000 // HOUR_SECONDS * HOUR_SECONDS
"""A time in seconds at which an hour begins."""


@dataclass
class NotedRequest:
    """What the distribution API notes about a request."""

    kind: str = "manifests"
    cache_state: str = ""
    repo: str = "ubuntu"
    resource_id: str = "24.04"
    request_id: str = "r1"
    principal_name: str = "alice"
    upstream: str = "docker.io"


class FullDisk(ActivityLog):
    """A store of activity whose disk is full while `is_full` is true. `added`: all stored activity."""

    def __init__(self) -> None:
        self.is_full = True
        self.added: list[tuple[float, Activity]] = []

    async def add(self, at: float, activity: Activity) -> None:
        if self.is_full:
            raise StorageFull
        self.added.append((at, activity))

    async def buckets(self, since: float, seconds: int) -> list[ActivityBucket]:
        return []


@dataclass
class CountingServer:
    """The counts of a server, and requests to it."""

    metrics: Metrics = field(default_factory=lambda: Metrics(["docker.io"], workers=1))

    def __post_init__(self) -> None:
        self.metrics.start_worker()
        self.recorder = RequestRecorder(self.metrics)
        self.counts = self.metrics.activity

    def answer(self, method: str, status: int, sent: int = 0, *, is_complete: bool = True, **notes: str) -> None:
        """Counts a request with this method and this status of its response."""
        scope: Scope = {
            "type": "http",
            "method": method,
            "path": "/v2/",
            "raw_path": b"/v2/",
            "headers": [],
            "client": None,
            "extensions": {REQUEST_NOTES_EXTENSION: {"exchange": NotedRequest(**notes)}},
        }
        self.recorder.on_request_end(scope, RequestEnd(status, 0, sent, 0.0, is_complete=is_complete))


@pytest.fixture
def server() -> CountingServer:
    return CountingServer()


def test_which_requests_count(server: CountingServer) -> None:
    """A GET or HEAD of a manifest with a complete response and the status 200 or 304 counts as a pull. A successful PUT
    counts as a push. A response of a mirror counts as a miss if its content had to be fetched, and as a hit
    otherwise."""
    for method, status in (("GET", 200), ("HEAD", 200), ("GET", 304), ("GET", 404), ("PUT", 201), ("PUT", 400)):
        server.answer(method, status)
    server.answer("GET", 200, is_complete=False)
    server.answer("GET", 200, 50, kind="blobs")
    server.answer("PUT", 201, kind="session")
    assert server.counts.compute_unstored() == Activity(pulls=3, pushes=1)
    for state, sent in (("hit", 1), ("stale", 10), ("revalidated", 100), ("miss", 1000)):
        server.answer("GET", 200, sent, kind="blobs", cache_state=state)
    server.answer("GET", 200, 5000, kind="tags", cache_state="hit")
    cells, mirror = server.metrics.cells.own, server.metrics.mirror
    cells[mirror.fetched_bytes.cell("0", "blob")] += 800
    cells[mirror.fetched_bytes.cell("0", "manifest")] += 8
    assert server.counts.compute_unstored() == Activity(3, 1, hits=3, misses=1, fetched_bytes=808, saved_bytes=111)


async def test_activity_is_stored_once(server: CountingServer, store: StoredRegistry, clock: Clock) -> None:
    """Activity is stored once, whichever process stores it. Later activity is stored the next time. If there is no new
    activity, nothing is written."""
    clock.now = FULL_HOUR + 600.0
    server.answer("GET", 200)
    await ActivityRecorder(store.activity, store.leases, server.counts, clock).store()
    assert server.counts.compute_unstored() == Activity()
    server.answer("GET", 200)
    other_recorder = ActivityRecorder(store.activity, store.leases, server.counts, clock)
    await other_recorder.store()
    version = store.metadata.version()
    await other_recorder.store()
    assert store.metadata.version() == version
    assert await store.activity.buckets(FULL_HOUR, HOUR_SECONDS) == [ActivityBucket(FULL_HOUR, Activity(pulls=2))]


async def test_a_new_version_of_the_program_takes_over_the_counts(
    server: CountingServer, store: StoredRegistry, clock: Clock
) -> None:
    """When a new version of the program takes over from the running one, it also takes over the counts in shared
    memory. It stores only the activity that the old version has not stored."""
    server.answer("GET", 200)
    await ActivityRecorder(store.activity, store.leases, server.counts, clock).store()
    server.answer("PUT", 201)
    new_metrics = Metrics(["docker.io"], 1, server.metrics.memory._replace(descriptor=_descriptor_copy(server)))
    assert new_metrics.activity.compute_unstored() == Activity(pushes=1)


def _descriptor_copy(server: CountingServer) -> int:
    """Returns a second descriptor of the server's shared memory."""
    import os

    return os.dup(server.metrics.memory.descriptor)


async def test_a_full_disk_loses_nothing(server: CountingServer, store: StoredRegistry, clock: Clock) -> None:
    """Activity that could not be stored because the disk was full is stored when the disk has space again, together
    with later activity."""
    disk = FullDisk()
    recorder = ActivityRecorder(disk, store.leases, server.counts, clock)
    server.answer("GET", 200)
    with pytest.raises(StorageFull):
        await recorder.store()
    server.answer("GET", 200)
    await recorder.store_last()
    disk.is_full = False
    await recorder.store_last()
    assert [activity for _, activity in disk.added] == [Activity(pulls=2)]


async def test_a_process_without_cells_of_its_own_stores_nothing(store: StoredRegistry, clock: Clock) -> None:
    """Each process has cells in the shared memory. If too many processes run, a process gets no cells, so it cannot
    record what it has stored. It stores nothing, and the other processes store the activity."""
    server = CountingServer()
    server.answer("GET", 200)
    metrics_without_cells = Metrics(
        ["docker.io"], 1, server.metrics.memory._replace(descriptor=_descriptor_copy(server))
    )
    assert metrics_without_cells.activity.compute_unstored() == Activity(pulls=1)
    await ActivityRecorder(store.activity, store.leases, metrics_without_cells.activity, clock).store()
    assert await store.activity.buckets(0, HOUR_SECONDS) == []


async def test_one_process_stores_the_activity_of_the_last_hour(
    server: CountingServer, store: StoredRegistry, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the end of an hour, one of the processes stores the activity of this hour."""
    monkeypatch.setattr(activity_recorder, "STORE_SECONDS", 0.01)
    clock.now = FULL_HOUR + HOUR_SECONDS + 0.005
    disk = FullDisk()
    disk.is_full = False
    recorders = [ActivityRecorder(disk, store.leases, server.counts, clock) for _ in range(2)]
    tasks = [asyncio.create_task(recorder.run()) for recorder in recorders]
    server.answer("GET", 200)
    async with asyncio.timeout(60):
        while not disk.added:  # noqa: ASYNC110 - no event signals it
            await asyncio.sleep(0.005)
    await recorders[1].store_last()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    ((at, activity),) = disk.added
    assert (at // HOUR_SECONDS * HOUR_SECONDS, activity) == (FULL_HOUR, Activity(pulls=1))
