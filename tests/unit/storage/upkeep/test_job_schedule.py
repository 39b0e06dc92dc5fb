"""Scheduled jobs are queued at an interval. A restart of the server does not start the interval again."""

from __future__ import annotations

import asyncio

from storage.jobs import Job, JobState
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.job_schedule import queue_jobs
from tests.fakes.upkeep_store import DAY, Clock


async def jobs_after_checks(store: StoredRegistry, clock: Clock) -> list[Job]:
    """Runs the schedules of two processes until they have checked several times whether a job is due. Returns all
    jobs."""
    clock_reads, has_checked = 0, asyncio.Event()

    def counting_clock() -> float:
        nonlocal clock_reads
        clock_reads += 1
        if clock_reads == 10:
            has_checked.set()
        return clock()

    schedules = [
        asyncio.create_task(
            queue_jobs(store.jobs, store.leases, "tidy", DAY, counting_clock, actor="entrepot", check_seconds=0.001)
        )
        for _ in range(2)
    ]
    async with asyncio.timeout(20):
        await has_checked.wait()
    for schedule in schedules:
        schedule.cancel()
    await asyncio.gather(*schedules, return_exceptions=True)
    return list((await store.jobs.jobs(None, 100)).items)


async def test_a_job_is_queued_once_in_the_interval(store: StoredRegistry, clock: Clock) -> None:
    """A job is queued when the interval has passed since the previous job. No job is queued while the previous one has
    not ended."""
    [first] = await jobs_after_checks(store, clock)
    assert (first.kind, first.state, first.actor, first.is_resumable) == ("tidy", JobState.QUEUED, "entrepot", True)
    clock.pass_days(2)
    assert len(await jobs_after_checks(store, clock)) == 1  # the first job has not ended yet
    await store.jobs.end(first.id, JobState.DONE, "")
    assert len(await jobs_after_checks(store, clock)) == 2


async def test_a_restart_does_not_start_the_interval_again(store: StoredRegistry, clock: Clock) -> None:
    """The interval begins when the newest job was queued, even if a user queued the job and even if it failed."""
    started = await store.jobs.add("tidy", {}, actor="alice")
    await store.jobs.end(started.id, JobState.FAILED, "")
    clock.pass_days(0.9)
    assert len(await jobs_after_checks(store, clock)) == 1
    clock.pass_days(0.2)
    assert len(await jobs_after_checks(store, clock)) == 2


async def test_a_job_from_the_future_does_not_stop_the_schedule(store: StoredRegistry, clock: Clock) -> None:
    """If the newest job was added while the clock was ahead, the next job is queued as soon as the clock has been set
    back. From then on the interval applies again."""
    clock.pass_days(365)
    first = await store.jobs.add("tidy", {}, actor="alice")
    await store.jobs.end(first.id, JobState.DONE, "")
    clock.pass_days(-365)
    _, second = sorted(await jobs_after_checks(store, clock), key=lambda job: job.id)
    await store.jobs.end(second.id, JobState.DONE, "")
    clock.pass_days(0.9)
    assert len(await jobs_after_checks(store, clock)) == 2
