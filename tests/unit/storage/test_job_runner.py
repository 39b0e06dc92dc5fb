"""Jobs, such as garbage collection. A server process runs queued jobs, at most one of each kind at a time. A command
line command runs its own job."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest

from storage.composition import open_registry, prepare_data_dir
from storage.errors import StorageFailed, TooManyRequests
from storage.jobs import (
    JSON,
    MAX_QUEUED_JOBS,
    Job,
    JobProgress,
    JobRunning,
    JobState,
    JobStopped,
    JobUnknown,
    slot_name,
)
from storage.metadata.sqlite.upkeep.sqlite_jobs import JOBS_PER_READ
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.job_runner import JobContext, JobRunner, run_in_command


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[StoredRegistry]:
    prepare_data_dir(tmp_path)
    async with open_registry(tmp_path) as opened:
        yield opened


async def wait_for_end(store: StoredRegistry, job: Job) -> Job:
    for _ in range(1000):
        stored_job = await store.jobs.job(job.id)
        if stored_job.ended is not None:
            return stored_job
        await asyncio.sleep(0.02)
    pytest.fail(f"job {job.id} has not ended")


async def test_a_job_reports_its_steps_progress_and_result(store: StoredRegistry) -> None:
    """The progress of a running job and the result of a finished job are stored. The command gets each step."""
    steps: list[Mapping[str, JSON]] = []

    async def work(context: JobContext) -> object:
        context.step("removed", blob="one")
        await context.report(1, total=2, unit="blobs", message="counting", save_now=True)
        stored = await store.jobs.job(context.job.id)
        assert stored.state is JobState.RUNNING
        assert stored.progress == JobProgress(1, 2, "blobs", "counting")
        return {"counted": 2}

    result = await run_in_command(
        store.jobs, store.leases, "count", {"deep": True}, work, actor="cli:alice", on_step=steps.append
    )

    [job] = (await store.jobs.jobs(None, 10)).items
    assert (result, job.result, job.state) == ({"counted": 2}, {"counted": 2}, JobState.DONE)
    assert (job.kind, job.arguments, job.actor) == ("count", {"deep": True}, "cli:alice")
    assert job.ended is not None
    assert steps == [{"event": "removed", "blob": "one"}]


@pytest.mark.slow
async def test_a_second_command_is_refused_while_a_job_runs(store: StoredRegistry) -> None:
    """While a command runs a job, a second command of the same kind is refused. The error names the first actor."""

    async def work(_: JobContext) -> object:
        with pytest.raises(JobRunning, match="cli:alice is running count already"):
            await run_in_command(store.jobs, store.leases, "count", {}, work, actor="cli:bob")
        return None

    await run_in_command(store.jobs, store.leases, "count", {}, work, actor="cli:alice")


async def test_a_command_waits_for_the_end_of_a_dead_job(store: StoredRegistry) -> None:
    """A server process holds the slot of the kind for a moment, while it ends the job of a process that has died. A
    command that starts at this moment waits for it."""

    async def work(_: JobContext) -> object:
        return "done"

    async with store.leases.try_slot(slot_name("count"), count=1) as has_slot:
        assert has_slot
        command = asyncio.create_task(run_in_command(store.jobs, store.leases, "count", {}, work, actor="cli:bob"))
        await asyncio.sleep(0.05)
        assert not command.done()
    assert await command == "done"


@pytest.mark.slow
async def test_a_server_runs_queued_jobs(store: StoredRegistry) -> None:
    """A server runs all queued jobs of the kinds that it can run. Jobs of other kinds stay in the queue."""

    async def work(context: JobContext) -> object:
        return context.job.arguments["number"]

    runner = asyncio.create_task(JobRunner(store.jobs, store.leases, {"count": work}).run())
    jobs = [await store.jobs.add("count", {"number": number}, actor="alice") for number in range(3)]
    unknown = await store.jobs.add("unknown", {}, actor="alice")

    assert [(await wait_for_end(store, job)).result for job in jobs] == [0, 1, 2]
    assert (await store.jobs.job(unknown.id)).state is JobState.QUEUED
    runner.cancel()


@pytest.mark.slow
async def test_a_job_can_be_stopped(store: StoredRegistry) -> None:
    """A queued job is stopped at once. A running job is stopped when it reports its progress."""
    started = asyncio.Event()

    async def work(context: JobContext) -> object:
        started.set()
        for number in range(10_000):
            await context.report(number, save_now=True)
            await asyncio.sleep(0.01)
        return None

    runner = asyncio.create_task(JobRunner(store.jobs, store.leases, {"count": work}).run())
    running = await store.jobs.add("count", {}, actor="alice")
    queued = await store.jobs.add("count", {}, actor="alice")
    async with asyncio.timeout(20):
        await started.wait()

    assert (await store.jobs.request_stop(queued.id)).state is JobState.STOPPED
    assert (await store.jobs.request_stop(running.id)).is_stopping
    assert (await wait_for_end(store, running)).state is JobState.STOPPED
    runner.cancel()


@pytest.mark.slow
async def test_job_that_reports_nothing_can_be_stopped(store: StoredRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that waits for a long time without a report of its progress is cancelled when a stop is requested. It ends
    as stopped, also if it is resumable."""
    monkeypatch.setattr("storage.upkeep.job_runner.STOP_CHECK_SECONDS", 0.01)
    monkeypatch.setattr("storage.upkeep.job_runner.STOP_GRACE_SECONDS", 0.01)
    started, cleaned_up = asyncio.Event(), asyncio.Event()

    async def work(_: JobContext) -> object:
        started.set()
        try:
            await asyncio.sleep(3600)
        finally:
            cleaned_up.set()
        return None

    runner = asyncio.create_task(JobRunner(store.jobs, store.leases, {"count": work}).run())
    job = await store.jobs.add("count", {}, actor="alice", is_resumable=True)
    async with asyncio.timeout(20):
        await started.wait()
    await store.jobs.request_stop(job.id)
    stopped_job = await wait_for_end(store, job)
    assert (stopped_job.state, stopped_job.progress.message) == (JobState.STOPPED, "the job was stopped")
    assert cleaned_up.is_set()
    runner.cancel()


async def test_job_stops_at_its_next_report_if_that_comes_soon(
    store: StoredRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a stop was requested, a job is not cancelled at once: it ends at its next report, and completes the step
    before that."""
    monkeypatch.setattr("storage.upkeep.job_runner.STOP_CHECK_SECONDS", 0.01)
    monkeypatch.setattr("storage.upkeep.job_runner.STOP_GRACE_SECONDS", 60.0)
    steps = list[str]()

    async def work(context: JobContext) -> object:
        await store.jobs.request_stop(context.job.id)
        await asyncio.sleep(0.2)
        steps.append("complete")
        await context.report(save_now=True)
        return None

    with pytest.raises(JobStopped):
        await run_in_command(store.jobs, store.leases, "count", {}, work, actor="cli:alice")
    assert steps == ["complete"]


async def test_a_resumable_job_continues_after_a_restart(store: StoredRegistry) -> None:
    """If a server ends while it runs a resumable job, the next server continues the job at its stored position."""
    started = asyncio.Event()

    async def work(context: JobContext) -> object:
        if context.job.progress.position == "half":
            return "continued"
        await context.report(position="half", save_now=True)
        started.set()
        await asyncio.sleep(3600)
        return None

    async def run_until_started(job: Job) -> None:
        runner = asyncio.create_task(JobRunner(store.jobs, store.leases, {"count": work}).run())
        async with asyncio.timeout(20):
            await started.wait()
        runner.cancel()
        await asyncio.gather(runner, return_exceptions=True)
        started.clear()
        assert (await store.jobs.job(job.id)).progress.position == "half"

    job = await store.jobs.add("count", {}, actor="alice", is_resumable=True)
    await run_until_started(job)
    assert (await store.jobs.job(job.id)).state is JobState.RUNNING

    runner = asyncio.create_task(JobRunner(store.jobs, store.leases, {"count": work}).run())
    assert (await wait_for_end(store, job)).result == "continued"
    runner.cancel()


async def test_a_job_of_a_dead_command_is_marked_as_failed(store: StoredRegistry) -> None:
    """If a command was killed while it ran a job, the next job of the same kind marks the killed one as failed."""
    dead_job = await store.jobs.add("count", {}, actor="cli:alice", holder="command, process 1")

    async def work(_: JobContext) -> object:
        return None

    await run_in_command(store.jobs, store.leases, "count", {}, work, actor="cli:bob")

    stored_job = await store.jobs.job(dead_job.id)
    assert (stored_job.state, stored_job.progress.message) == (JobState.FAILED, "the process that ran it has ended")


@pytest.mark.parametrize(
    ("error", "state", "message"),
    [
        (StorageFailed("the disk is broken"), JobState.FAILED, "the disk is broken"),
        (ZeroDivisionError("by zero"), JobState.FAILED, "unexpected error: ZeroDivisionError: by zero"),
        (JobStopped(), JobState.STOPPED, "the job was stopped"),
    ],
)
async def test_a_failed_job_states_the_reason(
    store: StoredRegistry, error: Exception, state: JobState, message: str
) -> None:
    """If a job raises an error, its state and its message say what happened."""

    async def work(_: JobContext) -> object:
        raise error

    with pytest.raises(type(error)):
        await run_in_command(store.jobs, store.leases, "count", {}, work, actor="cli:alice")

    [job] = (await store.jobs.jobs(None, 10)).items
    assert (job.state, job.progress.message) == (state, message)


async def test_lists_of_jobs(store: StoredRegistry) -> None:
    """Jobs of all kinds, or of one kind, are listed in pages, the newest first. An unknown job raises an error. Each
    kind has a slot of its own (the permit to run one job of the kind), so two kinds can run at the same time."""
    jobs = [await store.jobs.add("count" if number % 2 else "sort", {}, actor="alice") for number in range(5)]

    page = await store.jobs.jobs(None, 3)
    second_page = await store.jobs.jobs(page.items[-1].id, 3)
    count_jobs = await store.jobs.jobs(None, 10, "count")

    assert [job.id for job in [*page.items, *second_page.items]] == [job.id for job in reversed(jobs)]
    assert (page.more, second_page.more) == (True, False)
    assert [job.id for job in count_jobs.items] == [jobs[3].id, jobs[1].id]
    with pytest.raises(JobUnknown, match="there is no job 999"):
        await store.jobs.job(999)
    with pytest.raises(JobUnknown):
        await store.jobs.request_stop(999)
    assert slot_name("count") != slot_name("sort")


async def add_ended_job(store: StoredRegistry, result: JSON, arguments: Mapping[str, JSON] | None = None) -> Job:
    """Adds a job that a command has run, and returns it as `Jobs.job` does."""
    job = await store.jobs.add("count", arguments or {}, actor="cli:alice", holder="command, process 1")
    await store.jobs.end(job.id, JobState.DONE, "", result)
    return await store.jobs.job(job.id)


async def test_lists_of_jobs_leave_out_long_lists(store: StoredRegistry) -> None:
    """A list of jobs leaves out the lists in long arguments and long results, and keeps their other fields. A single
    job has all fields, and so does a job in a list whose result is short."""
    totals = {"blobs": {"count": 1000, "bytes": 7.5}, "text": '"x"'}
    result = {"dry_run": True, "more": False, "none": None, "bytes": 7, "totals": totals, "reason": 'é"['}
    arguments = {"references": [f"docker.io/library/image{number}" for number in range(100)], "platform": "all"}
    long_jobs = [
        await add_ended_job(store, result | {"records": [{"item": "x" * 200}] * 1000}, arguments),
        await add_ended_job(store, ["x" * 50] * 100),
        await add_ended_job(store, {"text": "x" * 100_000}),
    ]
    assert [len(json.dumps(job.result)) > 1000 for job in long_jobs] == [True] * 3
    assert long_jobs[0].arguments == arguments
    short_job = await add_ended_job(store, result | {"records": ["one"]})

    listed = {job.id: job for job in (await store.jobs.jobs(None, 10)).items}
    assert [listed[job.id].result for job in long_jobs] == [result, {}, {}]
    assert listed[long_jobs[0].id].arguments == {"platform": "all"}
    assert listed[short_job.id] == short_job


async def test_a_list_of_jobs_does_not_block_the_event_loop(store: StoredRegistry) -> None:
    """Jobs are read outside of the event loop. A long list of jobs is read in several portions, and is complete."""
    jobs = [await add_ended_job(store, number) for number in range(2 * JOBS_PER_READ + 5)]
    expected = [job.id for job in reversed(jobs)]
    for limit in (JOBS_PER_READ - 1, JOBS_PER_READ, JOBS_PER_READ + 1, len(jobs), 1000):
        reading = asyncio.create_task(store.jobs.jobs(None, limit))
        await asyncio.sleep(0)
        assert not reading.done()
        page = await reading
        assert ([job.id for job in page.items], page.more) == (expected[:limit], limit < len(jobs))


async def test_the_number_of_queued_jobs_of_a_kind_is_limited(store: StoredRegistry) -> None:
    """If many jobs of a kind are queued, a further job of this kind is refused. A command still runs its own job, and
    other kinds are not affected. After a queued job was stopped, another one is accepted."""
    jobs = [await store.jobs.add("count", {}, actor="alice") for _ in range(MAX_QUEUED_JOBS)]
    with pytest.raises(TooManyRequests, match="100 jobs of the kind count are queued already") as refused:
        await store.jobs.add("count", {}, actor="alice")
    assert refused.value.retry_after > 0
    other = await store.jobs.add("other", {}, actor="alice")
    command = await store.jobs.add("count", {}, actor="cli:alice", holder="command, process 1")
    assert await store.jobs.oldest_active_ids(["count", "other", "none"]) == {"count": jobs[0].id, "other": other.id}
    active = await store.jobs.active()
    assert [job.id for job in active] == [*(job.id for job in jobs), other.id, command.id]
    assert list(await store.jobs.active("count", limit=3)) == jobs[:3]
    await store.jobs.request_stop(jobs[0].id)
    await store.jobs.add("count", {}, actor="alice")
    assert await store.jobs.oldest_active_ids(["count"]) == {"count": jobs[1].id}


@pytest.mark.slow
async def test_a_runner_that_stops_completes_its_job(store: StoredRegistry) -> None:
    """After `stop_starting_jobs`, a runner completes its running job, and leaves later jobs to other processes."""
    has_begun, may_end = asyncio.Event(), asyncio.Event()

    async def work(_: JobContext) -> object:
        has_begun.set()
        await may_end.wait()
        return None

    runner = JobRunner(store.jobs, store.leases, {"count": work, "other": work})
    task = asyncio.create_task(runner.run())
    job = await store.jobs.add("count", {}, actor="alice")
    await has_begun.wait()
    runner.stop_starting_jobs()
    later = await store.jobs.add("other", {}, actor="alice")
    may_end.set()
    await runner.wait_until_idle()
    assert (await store.jobs.job(job.id)).state is JobState.DONE
    assert (await store.jobs.job(later.id)).state is JobState.QUEUED
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
