"""Connection slots: the permits for the connections to one upstream, which fills (downloads into the cache) and
pass-throughs (blobs that go to one client without being stored) share."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

from registry.mirror.fill import slot_holders, slots
from registry.mirror.fill.demand import Demand
from registry.mirror.fill.slots import ConnectionSlots
from registry.mirror.upstream_client import UpstreamClient
from registry.single_flight import cancel_and_wait
from storage.data_dir.file_leases import FileLeases
from storage.data_dir.system import System
from tests.unit.registry.conftest import wait_until
from tests.unit.registry.mirror.conftest import MIB

CONNECTIONS = 8
"""Number of connection slots."""


class Worker:
    """One of the processes that share the slots."""

    def __init__(self, path: Path) -> None:
        self.leases = FileLeases(path, System())
        upstream: UpstreamClient = SimpleNamespace(name="hub", connections=CONNECTIONS)
        self.slots = ConnectionSlots(self.leases, upstream)

    async def take_slot(self, stack: AsyncExitStack) -> None:
        """Takes a slot until `stack` ends, as a fill does. Fails if none is free."""
        assert await stack.enter_async_context(self.leases.try_slot("upstream-hub", CONNECTIONS))


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    opened = Worker(tmp_path / "leases")
    yield opened
    opened.leases.close()


@pytest.fixture
def other_worker(tmp_path: Path) -> Iterator[Worker]:
    opened = Worker(tmp_path / "leases")
    yield opened
    opened.leases.close()


class PassThrough:
    """A pass-through whose client needs `seconds` for 256 KiB. It holds its slot until it is cut off."""

    def __init__(self, worker: Worker, seconds: float = 0.0) -> None:
        self._slots = worker.slots
        self.seconds = seconds
        self.has_slot = asyncio.Event()
        self.is_cut_off = asyncio.Event()

    def slowness(self) -> float:
        return self.seconds

    def cut_off(self) -> None:
        self.is_cut_off.set()

    async def run(self) -> None:
        """Waits for a slot, and holds it until the client is cut off."""
        async with self._slots.pass_through_slot(self, waits_for_client=True, blob_size=MIB):
            self.has_slot.set()
            await self.is_cut_off.wait()


async def test_pass_through_needs_only_one_free_slot(worker: Worker) -> None:
    """While all slots are held, a pass-through of a large blob waits, and gets the first slot that becomes free. It
    does not wait until two more slots are free for other requests: fills take each free slot within milliseconds, so
    three slots are rarely free at the same moment."""
    pass_through = PassThrough(worker)
    async with AsyncExitStack() as fills, asyncio.timeout(60):
        for _ in range(CONNECTIONS - 1):
            await worker.take_slot(fills)
        async with AsyncExitStack() as last_slot:
            await worker.take_slot(last_slot)
            running = asyncio.create_task(pass_through.run())
            await asyncio.sleep(0.01)
            assert not pass_through.has_slot.is_set()
        await pass_through.has_slot.wait()
    await cancel_and_wait([running])


async def test_pass_throughs_of_large_blobs_do_not_take_the_last_two_slots(worker: Worker) -> None:
    """Two slots stay free for other requests, however many large blobs are passed through."""
    async with AsyncExitStack() as others, asyncio.timeout(60):
        running = [asyncio.create_task(PassThrough(worker).run()) for _ in range(CONNECTIONS)]
        await wait_until(worker.slots.has_waiting_request)
        await worker.take_slot(others)
        await worker.take_slot(others)
    await cancel_and_wait(running)


async def test_a_look_for_waiting_requests_is_no_waiting_request(worker: Worker, tmp_path: Path) -> None:
    """Two workers check at the same time whether a request waits for a slot. Neither mistakes the check of the other
    worker for a waiting request."""
    other = Worker(tmp_path / "leases")
    found_by_other: list[bool] = []

    def look() -> None:
        found_by_other.extend(other.slots.has_waiting_request() for _ in range(2000))

    thread = threading.Thread(target=look)
    thread.start()
    found = [worker.slots.has_waiting_request() for _ in range(2000)]
    thread.join()
    other.leases.close()
    assert not any(found)
    assert not any(found_by_other)


async def test_the_limit_begins_to_fall_when_there_is_a_download_that_may_be_cut_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Requests have waited for long, but all downloads have clients that keep up. The allowed time does not fall
    meanwhile. Otherwise the next pass-through would be cut off at its first byte."""
    monkeypatch.setattr(slot_holders, "SLOW_POLL_SECONDS", 0.001)
    checks = 0

    class Attended:
        def slowness(self) -> float:
            nonlocal checks
            checks += 1
            return 0.0

        def cut_off(self) -> None:
            raise AssertionError

    holders = slot_holders.SlotHolders(lambda: True, lambda: True)
    with holders.holding(Attended()):
        await wait_until(lambda: checks >= 4)
        assert holders._lowering_since is None


async def test_the_limit_begins_to_fall_again_after_the_last_download_was_cut_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The only download is cut off after the allowed time has begun to fall, and takes a while to end. The allowed time
    begins to fall again for the next download. Otherwise that one would be cut off at its first byte."""
    monkeypatch.setattr(slot_holders, "SLOW_POLL_SECONDS", 0.001)
    is_cut_off = asyncio.Event()

    class Slow:
        def slowness(self) -> float:
            return 1000.0

        def cut_off(self) -> None:
            is_cut_off.set()

    holders = slot_holders.SlotHolders(lambda: True, lambda: True)
    with holders.holding(Slow()):
        await is_cut_off.wait()
        await wait_until(lambda: holders._timer is None)
    assert holders._lowering_since is None


@pytest.mark.slow
async def test_the_slowest_client_is_cut_off_when_a_request_has_waited_for_long(
    worker: Worker, other_worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients that are just fast enough hold all slots for large blobs. When another request has waited for long, the
    slowest client of all workers is cut off. A client that is faster than the upstream is never cut off."""
    monkeypatch.setattr(slots, "LONG_WAIT_SECONDS", 0.2)
    monkeypatch.setattr(slot_holders, "LOWERING_SECONDS", 30.0)
    monkeypatch.setattr(slot_holders, "SLOW_POLL_SECONDS", 0.02)
    limit = slot_holders.SLOW_SLOT_SECONDS
    slowest = PassThrough(other_worker, limit * 0.99)
    others = [PassThrough(worker, limit * 0.1), *(PassThrough(worker) for _ in range(CONNECTIONS - 4))]
    next_one, last = PassThrough(worker), PassThrough(other_worker)
    async with asyncio.timeout(60):
        running = [asyncio.create_task(holder.run()) for holder in (slowest, *others)]
        for holder in (slowest, *others):
            await holder.has_slot.wait()
        running.append(asyncio.create_task(next_one.run()))
        await next_one.has_slot.wait()
        assert slowest.is_cut_off.is_set()
        assert not any(holder.is_cut_off.is_set() for holder in others)
        monkeypatch.setattr(slot_holders, "LOWERING_SECONDS", 0.2)
        running.append(asyncio.create_task(last.run()))
        await last.has_slot.wait()
        assert [holder.is_cut_off.is_set() for holder in others] == [True] + [False] * (len(others) - 1)
    await cancel_and_wait(running)


@pytest.mark.parametrize("changes", range(6))
@pytest.mark.parametrize("is_free", [False, True])
@pytest.mark.slow
async def test_a_cancelled_wait_for_a_slot_leaves_nothing(worker: Worker, changes: int, is_free: bool) -> None:
    """A fill waits for a slot while its clients leave and come back, and is cancelled after any number of steps of the
    event loop. It leaves no slot, no mark, no place in a queue and no task."""
    tasks_before = asyncio.all_tasks()
    for steps in range(30):
        demand = Demand()
        demand.add_client()
        async with AsyncExitStack() as others:
            for _ in range(CONNECTIONS - is_free):
                await worker.take_slot(others)
            filling = asyncio.create_task(hold_slot(worker, demand))
            for change in range(changes):
                await asyncio.sleep(0)
                demand.remove_client() if change % 2 == 0 else demand.add_client()
            for step in range(steps):
                await asyncio.sleep(0.0005 if step % 10 == 0 else 0)
            await cancel_and_wait([filling])
        async with AsyncExitStack() as all_slots:
            for _ in range(CONNECTIONS):
                await worker.take_slot(all_slots)
        leases = worker.leases
        assert not any((leases._queues._locks, leases._urgent_waits, leases._held_bytes))
        assert not any((worker.slots._unattended, demand._watchers))
        assert asyncio.all_tasks() == tasks_before


async def hold_slot(worker: Worker, demand: Demand) -> None:
    """Takes a slot as a fill with this `demand`, and holds it until it is cancelled."""
    async with worker.slots.first_connection_slot(demand, is_new_connection=True, blob_size=1):
        await asyncio.Event().wait()
