"""What counts as activity, and when it is stored."""

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

NOON = 1_700_000_000 // HOUR_SECONDS * HOUR_SECONDS


@dataclass
class Noted:
    """What the distribution API notes about a request."""

    kind: str = "manifests"
    cache_state: str = ""
    repo: str = "ubuntu"
    item: str = "24.04"
    request_id: str = "r1"
    name: str = "alice"
    upstream: str = "docker.io"


class FullDisk(ActivityLog):
    """An activity log that stores nothing until there is room."""

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
class Server:
    """The counts of a server, and requests to it."""

    metrics: Metrics = field(default_factory=lambda: Metrics(["docker.io"], workers=1))

    def __post_init__(self) -> None:
        self.metrics.start_worker()
        self.recorder = RequestRecorder(self.metrics)
        self.counts = self.metrics.activity

    def answer(self, method: str, status: int, sent: int = 0, *, whole: bool = True, **noted: str) -> None:
        """Counts a request with this method and this status of its response."""
        scope: Scope = {
            "type": "http",
            "method": method,
            "path": "/v2/",
            "raw_path": b"/v2/",
            "headers": [],
            "client": None,
            "extensions": {REQUEST_NOTES_EXTENSION: {"exchange": Noted(**noted)}},
        }
        self.recorder.on_request_end(scope, RequestEnd(status, 0, sent, 0.0, is_complete=whole))


@pytest.fixture
def server() -> Server:
    return Server()


def test_what_is_counted(server: Server) -> None:
    """Pulls and pushes are successful requests for manifests. A response of a mirror is a hit unless its content had to
    be fetched."""
    for method, status in (("GET", 200), ("HEAD", 200), ("GET", 304), ("GET", 404), ("PUT", 201), ("PUT", 400)):
        server.answer(method, status)
    server.answer("GET", 200, whole=False)
    server.answer("GET", 200, 50, kind="blobs")
    server.answer("PUT", 201, kind="session")
    assert server.counts.unstored() == Activity(pulls=3, pushes=1)
    for state, sent in (("hit", 1), ("stale", 10), ("revalidated", 100), ("miss", 1000)):
        server.answer("GET", 200, sent, kind="blobs", cache_state=state)
    server.answer("GET", 200, 5000, kind="tags", cache_state="hit")
    cells, mirror = server.metrics.cells.own, server.metrics.mirror
    cells[mirror.fetched_bytes.cell("0", "blob")] += 800
    cells[mirror.fetched_bytes.cell("0", "manifest")] += 8
    assert server.counts.unstored() == Activity(3, 1, hits=3, misses=1, fetched_bytes=808, saved_bytes=111)


async def test_activity_is_stored_once(server: Server, store: StoredRegistry, clock: Clock) -> None:
    """Whichever process stores the activity, it is stored once. Later activity is stored the next time. Without
    activity, nothing is written."""
    clock.now = NOON + 600.0
    server.answer("GET", 200)
    await ActivityRecorder(store.activity, store.leases, server.counts, clock).store()
    assert server.counts.unstored() == Activity()
    server.answer("GET", 200)
    other = ActivityRecorder(store.activity, store.leases, server.counts, clock)
    await other.store()
    version = store.metadata.version()
    await other.store()
    assert store.metadata.version() == version
    assert await store.activity.buckets(NOON, HOUR_SECONDS) == [ActivityBucket(NOON, Activity(pulls=2))]


async def test_a_new_version_of_the_program_goes_on(server: Server, store: StoredRegistry, clock: Clock) -> None:
    """A new version of the program takes over the counts, and knows how much of them is stored."""
    server.answer("GET", 200)
    await ActivityRecorder(store.activity, store.leases, server.counts, clock).store()
    server.answer("PUT", 201)
    after = Metrics(["docker.io"], 1, server.metrics.memory._replace(descriptor=_copy(server)))
    assert after.activity.unstored() == Activity(pushes=1)


def _copy(server: Server) -> int:
    import os

    return os.dup(server.metrics.memory.descriptor)


async def test_a_full_disk_loses_nothing(server: Server, store: StoredRegistry, clock: Clock) -> None:
    """Activity that could not be stored is stored once there is room, together with the activity since then."""
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


async def test_a_process_without_memory_of_its_own_stores_nothing(store: StoredRegistry, clock: Clock) -> None:
    """If too many processes run, a process without cells of its own cannot know what it has stored. It leaves the
    storing to the others."""
    server = Server()
    server.answer("GET", 200)
    stranger = Metrics(["docker.io"], 1, server.metrics.memory._replace(descriptor=_copy(server)))
    assert stranger.activity.unstored() == Activity(pulls=1)
    await ActivityRecorder(store.activity, store.leases, stranger.activity, clock).store()
    assert await store.activity.buckets(0, HOUR_SECONDS) == []


async def test_one_process_stores_at_fixed_times(
    server: Server, store: StoredRegistry, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of an hour, one process stores the activity of that hour."""
    monkeypatch.setattr(activity_recorder, "STORE_SECONDS", 0.01)
    clock.now = NOON + HOUR_SECONDS + 0.005
    disk = FullDisk()
    disk.is_full = False
    recorders = [ActivityRecorder(disk, store.leases, server.counts, clock) for _ in range(2)]
    tasks = [asyncio.create_task(recorder.run()) for recorder in recorders]
    server.answer("GET", 200)
    async with asyncio.timeout(60):
        while not disk.added:  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.005)
    await recorders[1].store_last()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    ((at, activity),) = disk.added
    assert (at // HOUR_SECONDS * HOUR_SECONDS, activity) == (NOON, Activity(pulls=1))
