"""The pull recorder counts the pulls of manifests in memory, and stores the counts in batches."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import pytest

from storage.content import Pull, digest_of
from storage.errors import NameUnknown, StorageFull
from storage.names import Digest, RepositoryName
from storage.pulls import MAX_SAVED_PULLS, PullCount, PullRecord, Pulls
from storage.store.stored_registry import StoredRegistry
from storage.upkeep import pull_recorder
from storage.upkeep.pull_recorder import MARK_SECONDS, STORE_SECONDS, PullRecorder
from storage.upkeep.schedule import cancel_all
from tests.fakes.registry_content import push_image
from tests.fakes.upkeep_store import APP, START, Clock


async def locate_hosted(repo: RepositoryName) -> tuple[object, RepositoryName, str | None]:
    """Returns the repository under its own name: no mirror (None) and no upstream."""
    return None, repo, None


class FakePulls(Pulls):
    """A store of pulls whose disk is full while `is_full` is true. It records all saved pulls and the sizes of the
    batches. It calls `before_save` before it saves a batch or finds out that the disk is full."""

    def __init__(self) -> None:
        self.is_full = True
        self.saved: list[PullCount] = []
        self.batches: list[int] = []
        self.marks: list[float] = []
        self.has_marked = asyncio.Event()
        self.has_saved = asyncio.Event()
        self.before_save: Callable[[], None] = lambda: None

    async def save(self, counts: Sequence[PullCount]) -> None:
        self.before_save()
        if self.is_full:
            raise StorageFull
        self.saved += counts
        self.batches.append(len(counts))
        self.has_saved.set()

    async def mark_pulls_recorded(self, now: float) -> None:
        if self.is_full:
            raise StorageFull
        self.marks.append(now)
        self.has_marked.set()

    async def record_of(self, repo: RepositoryName, digest: Digest) -> PullRecord | None:
        return None


def pull_number(number: int) -> Pull:
    """Returns a pull of a manifest that depends on the number."""
    return APP, digest_of(b"%d" % number)


async def test_pulls_are_stored_with_their_number_and_last_time(store: StoredRegistry, clock: Clock) -> None:
    """The number of pulls and the time of the last pull are stored. If there are no new pulls, nothing changes."""
    image = await push_image(store, APP, "a", "1")
    recorder = PullRecorder(store.pulls, locate_hosted, clock)
    for _ in range(3):
        clock.now += 10
        recorder.count((APP, image.digest))
    assert await store.pulls.record_of(APP, image.digest) is None
    await recorder.store()
    assert await store.pulls.record_of(APP, image.digest) == PullRecord("", START + 30, 3)
    await recorder.store()
    assert await store.pulls.record_of(APP, image.digest) == PullRecord("", START + 30, 3)


async def test_pulls_are_stored_under_the_full_name(store: StoredRegistry, clock: Clock) -> None:
    """A pull under a short name is stored under the full name of the mirrored repository, with its upstream. A pull of
    an unknown name is not stored."""

    async def locate(repo: RepositoryName) -> tuple[object, RepositoryName, str | None]:
        if repo == "docker.io":
            raise NameUnknown
        return None, RepositoryName(f"docker.io/library/{repo}"), "docker.io"

    full_name = RepositoryName("docker.io/library/ubuntu")
    image = await push_image(store, full_name, "a", "1")
    recorder = PullRecorder(store.pulls, locate, clock)
    recorder.count((RepositoryName("docker.io"), image.digest))
    recorder.count((RepositoryName("ubuntu"), image.digest))
    await recorder.store()
    assert await store.pulls.record_of(full_name, image.digest) == PullRecord("docker.io", START, 1)


async def test_a_full_disk_loses_no_pulls(clock: Clock) -> None:
    """Pulls that could not be stored because the disk was full are stored when it has space again, together with later
    pulls. One of the later pulls comes while the first ones are being stored."""
    pulls = FakePulls()
    recorder = PullRecorder(pulls, locate_hosted, clock)
    recorder.count(pull_number(0))
    pulls.before_save = lambda: recorder.count(pull_number(0))
    with pytest.raises(StorageFull):
        await recorder.store()
    recorder.count(pull_number(0))
    pulls.before_save = lambda: None
    pulls.is_full = False
    await recorder.store()
    assert [(count.pulls, count.last) for count in pulls.saved] == [(3, START)]


async def test_batches_are_limited(clock: Clock) -> None:
    """A batch has at most `MAX_SAVED_PULLS` manifests."""
    pulls = FakePulls()
    pulls.is_full = False
    recorder = PullRecorder(pulls, locate_hosted, clock)
    for number in range(2 * MAX_SAVED_PULLS + 1):
        recorder.count(pull_number(number))
    await recorder.store()
    assert pulls.batches == [MAX_SAVED_PULLS, MAX_SAVED_PULLS, 1]


async def test_the_number_of_counted_manifests_is_limited(clock: Clock) -> None:
    """While the disk is full, pulls are counted for a limited number of manifests. Pulls of further manifests are not
    counted."""
    pulls = FakePulls()
    recorder = PullRecorder(pulls, locate_hosted, clock, capacity=2)
    for number in (0, 1, 2, 1):
        recorder.count(pull_number(number))
    with pytest.raises(StorageFull):
        await recorder.store()
    for number in (3, 1):
        recorder.count(pull_number(number))
    pulls.is_full = False
    await recorder.store()
    saved = [(count.repository, count.digest, count.pulls) for count in pulls.saved]
    assert saved == [(*pull_number(0), 1), (*pull_number(1), 3)]


async def test_a_full_recorder_stores_at_once(clock: Clock) -> None:
    """When the recorder has counted pulls of as many manifests as it can hold, it stores them at once, before the
    interval ends."""
    pulls = FakePulls()
    pulls.is_full = False
    clock.now = STORE_SECONDS * 1000  # an interval has just begun: they begin at multiples of `STORE_SECONDS`
    recorder = PullRecorder(pulls, locate_hosted, clock, capacity=3)
    running = asyncio.create_task(recorder.run())
    async with asyncio.timeout(10):
        for number in range(3):
            recorder.count(pull_number(number))
        await pulls.has_saved.wait()
    running.cancel()
    assert pulls.batches == [3]


async def test_all_processes_store_at_the_same_time(clock: Clock) -> None:
    """A process stores its pulls at times that are multiples of the interval, whenever it was started. So all processes
    store at the same time."""
    clock.now = STORE_SECONDS * 1000 - 0.05
    pulls = FakePulls()
    pulls.is_full = False
    recorder = PullRecorder(pulls, locate_hosted, clock)
    recorder.count(pull_number(0))
    running = asyncio.create_task(recorder.run())
    async with asyncio.timeout(10):
        await pulls.has_saved.wait()
    running.cancel()


def test_counting_costs_little() -> None:
    """Counting a pull takes less than 2 µs. For comparison, a request that is answered from the response cache takes
    about 25 µs."""
    recorder = PullRecorder(FakePulls(), locate_hosted, time.time)
    pull = pull_number(0)
    durations = []
    for _ in range(20):
        started = time.perf_counter()
        for _ in range(1000):
            recorder.count(pull)
        durations.append(time.perf_counter() - started)
    assert min(durations) / 1000 < 2e-6


async def test_the_recorder_records_that_it_runs(clock: Clock) -> None:
    """The recorder records that it runs once in each interval of `MARK_SECONDS`, at the same times in all processes.
    While the disk is full, it does not, and it does so as soon as there is space again."""
    pulls = FakePulls()
    recorder = PullRecorder(pulls, locate_hosted, clock)
    begin = clock.now = clock.now // MARK_SECONDS * MARK_SECONDS
    await recorder.mark_pulls_recorded()
    assert pulls.marks == []
    pulls.is_full = False
    for second in range(10, 1000, 10):
        clock.now = begin + second
        await recorder.mark_pulls_recorded()
    assert pulls.marks == [begin + 10, begin + MARK_SECONDS, begin + 2 * MARK_SECONDS, begin + 3 * MARK_SECONDS]


async def test_the_recorder_records_soon_after_the_start_that_it_runs(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recorder that was just started records within `STORE_SECONDS` that it runs, also if there are no pulls."""
    monkeypatch.setattr(pull_recorder, "STORE_SECONDS", 0.05)
    pulls = FakePulls()
    pulls.is_full = False
    running = asyncio.create_task(PullRecorder(pulls, locate_hosted, clock).run())
    async with asyncio.timeout(10):
        await pulls.has_marked.wait()
    await cancel_all([running])
    assert pulls.marks == [START]
