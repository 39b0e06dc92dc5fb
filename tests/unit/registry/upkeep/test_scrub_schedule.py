"""The schedule of scrubs. A scrub reads all content and checks its digests. One pass over all content is a round."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from registry.config.upkeep_settings import ScrubSettings
from registry.naming import NamingRules
from registry.router import Router
from registry.upkeep import scrub_job
from registry.upkeep.scrub_job import CONTINUE_SECONDS, is_due, queue_scrub_if_due, scrub_on_schedule, scrub_work
from storage.composition import open_registry, prepare_data_dir
from storage.jobs import Job, JobState
from storage.names import RepositoryName
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.job_runner import JobRunner
from storage.upkeep.schedule import cancel_all
from storage.upkeep.scrubber import SCRUB_KIND
from tests.fakes.registry_content import push_blob

APP = RepositoryName("team/app")
DAY = 86400.0


class Clock:
    """A clock that stands still until a test moves it."""

    now = 1_000_000_000.0

    def __call__(self) -> float:
        return self.now


async def wait_for_state(store: StoredRegistry, job: Job, state: JobState) -> Job:
    """Waits until the job has this state, and returns the job."""
    for _ in range(2000):
        stored_job = await store.jobs.job(job.id)
        if stored_job.state is state:
            return stored_job
        await asyncio.sleep(0.01)
    pytest.fail(f"job {job.id} is {stored_job.state}, not {state}")


def router_of(store: StoredRegistry) -> Router:
    return Router(store, {}, store.is_known_repository, NamingRules())


async def test_rounds_start_on_schedule(tmp_path: Path) -> None:
    """The first round starts when the oldest blob is one interval old. Each further round starts one interval after the
    end of the previous round."""
    prepare_data_dir(tmp_path)
    clock, settings = Clock(), ScrubSettings(every=30 * DAY)
    async with open_registry(tmp_path, clock=clock) as store:
        assert await queue_scrub_if_due(settings, store, clock) is None
        clock.now += 100 * DAY
        assert await queue_scrub_if_due(settings, store, clock) is None  # the store has no content
        await push_blob(store, APP, b"first")
        clock.now += 30 * DAY - 1
        assert await queue_scrub_if_due(settings, store, clock) is None
        clock.now += 1
        job = await queue_scrub_if_due(settings, store, clock)
        assert job is not None
        assert (job.kind, job.actor, job.state, job.is_resumable) == (SCRUB_KIND, "schedule", JobState.QUEUED, True)
        assert await queue_scrub_if_due(settings, store, clock) is None
        work_by_kind = {SCRUB_KIND: scrub_work(settings, store, router_of(store))}
        runner = asyncio.create_task(JobRunner(store.jobs, store.leases, work_by_kind).run())
        assert ((await wait_for_state(store, job, JobState.DONE)).result or {})["blobs"] == 1
        runner.cancel()
        [done] = await store.damage.rounds(5)
        assert (done.ended, done.blobs) == (clock.now, 1)
        clock.now += 30 * DAY - 1
        assert await queue_scrub_if_due(settings, store, clock) is None
        clock.now += 1
        assert await queue_scrub_if_due(settings, store, clock) is not None


async def test_one_of_several_processes_starts_a_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If several processes check the schedule at the same time, only one starts a round."""
    monkeypatch.setattr(scrub_job, "CHECK_SECONDS", 0.001)
    prepare_data_dir(tmp_path)
    clock, settings = Clock(), ScrubSettings(every=30 * DAY)
    async with open_registry(tmp_path, clock=clock) as store:
        await push_blob(store, APP, b"first")
        clock.now += 30 * DAY
        schedules = [asyncio.create_task(scrub_on_schedule(settings, store, clock)) for _ in range(4)]
        async with asyncio.timeout(20):
            while not await store.jobs.active(SCRUB_KIND):  # noqa: ASYNC110 - a job has no event for its start
                await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)  # each process checks the schedule several times
        await cancel_all(schedules)
        assert len((await store.jobs.jobs(None, 10, SCRUB_KIND)).items) == 1


async def test_a_stopped_round_continues_after_a_day(tmp_path: Path) -> None:
    """A stopped round continues a day later, or one interval later if the interval is shorter than a day."""
    prepare_data_dir(tmp_path)
    clock = Clock()
    async with open_registry(tmp_path, clock=clock) as store:
        await push_blob(store, APP, b"first")
        await store.damage.save_round(await store.damage.start_round())
        assert not await is_due(store.damage, 30 * DAY, clock.now + CONTINUE_SECONDS - 1)
        assert await is_due(store.damage, 30 * DAY, clock.now + CONTINUE_SECONDS)
        assert await is_due(store.damage, 3600.0, clock.now + 3600)


@pytest.mark.parametrize("state", ["no round yet", "interrupted", "ended"])
async def test_times_in_the_future_do_not_stop_the_schedule(tmp_path: Path, state: str) -> None:
    """If content was stored or a round ran while the clock was ahead, a round is due as soon as the clock has been set
    back."""
    prepare_data_dir(tmp_path)
    clock = Clock()
    async with open_registry(tmp_path, clock=clock) as store:
        clock.now += 365 * DAY
        await push_blob(store, APP, b"first")
        if state == "interrupted":
            await store.damage.save_round(await store.damage.start_round())
        elif state == "ended":
            await store.damage.end_round(await store.damage.start_round())
        assert not await is_due(store.damage, 30 * DAY, clock.now)
        clock.now -= 365 * DAY
        assert await is_due(store.damage, 30 * DAY, clock.now)


async def test_a_server_continues_after_a_restart(tmp_path: Path) -> None:
    """If a process ends in the middle of a round, the next process continues the same job and the same round."""
    prepare_data_dir(tmp_path)
    settings = ScrubSettings(every=30 * DAY, rate=1)  # type: ignore[arg-type]  # slow enough to be interrupted
    async with open_registry(tmp_path) as store:
        for number in range(3):
            await push_blob(store, APP, b"%d" % number)
        job = await store.jobs.add(SCRUB_KIND, {}, actor="alice", is_resumable=True)
        work_by_kind = {SCRUB_KIND: scrub_work(settings, store, router_of(store))}
        runner = asyncio.create_task(JobRunner(store.jobs, store.leases, work_by_kind).run())
        await wait_for_state(store, job, JobState.RUNNING)
        runner.cancel()
        await asyncio.gather(runner, return_exceptions=True)
        assert (await store.jobs.job(job.id)).ended is None
    async with open_registry(tmp_path) as store:
        work_by_kind = {SCRUB_KIND: scrub_work(ScrubSettings(), store, router_of(store))}
        runner = asyncio.create_task(JobRunner(store.jobs, store.leases, work_by_kind).run())
        assert ((await wait_for_state(store, job, JobState.DONE)).result or {})["blobs"] == 3
        runner.cancel()
        assert len(await store.damage.rounds(5)) == 1
