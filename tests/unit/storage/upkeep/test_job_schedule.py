"""Jobs are queued at an interval, which does not start again after a restart of the server."""

from __future__ import annotations

import asyncio

from storage.jobs import Job, JobState
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.job_schedule import queue_jobs
from tests.fakes.upkeep_store import DAY, Clock


async def checked(store: StoredRegistry, clock: Clock) -> list[Job]:
    """Returns the jobs after the schedules of two processes have checked many times whether one is due."""
    looks, has_looked = 0, asyncio.Event()

    def counting_clock() -> float:
        nonlocal looks
        looks += 1
        if looks == 10:
            has_looked.set()
        return clock()

    schedules = [
        asyncio.create_task(
            queue_jobs(store.jobs, store.leases, "tidy", DAY, counting_clock, actor="entrepot", check_seconds=0.001)
        )
        for _ in range(2)
    ]
    async with asyncio.timeout(20):
        await has_looked.wait()
    for schedule in schedules:
        schedule.cancel()
    await asyncio.gather(*schedules, return_exceptions=True)
    return list((await store.jobs.jobs(None, 100)).items)


async def test_a_job_is_queued_once_in_the_interval(store: StoredRegistry, clock: Clock) -> None:
    [first] = await checked(store, clock)
    assert (first.kind, first.state, first.actor, first.is_resumable) == ("tidy", JobState.QUEUED, "entrepot", True)
    clock.pass_days(2)
    assert len(await checked(store, clock)) == 1  # it has not ended yet
    await store.jobs.end(first.id, JobState.DONE, "")
    assert len(await checked(store, clock)) == 2


async def test_a_restart_does_not_start_the_interval_again(store: StoredRegistry, clock: Clock) -> None:
    """The interval begins with the newest job, whoever started it and however it ended."""
    started = await store.jobs.add("tidy", {}, actor="alice")
    await store.jobs.end(started.id, JobState.FAILED, "")
    clock.pass_days(0.9)
    assert len(await checked(store, clock)) == 1
    clock.pass_days(0.2)
    assert len(await checked(store, clock)) == 2
