"""Runs jobs. In a server process, `JobRunner` runs the queued jobs. In a command, `run_in_command` adds one job and
runs it.

The *kind* of a job names its work, such as `scrub`. The work is a function with a `JobContext` as argument. The work
reports its progress to the context. If somebody has requested to stop the job, the report raises JobStopped. If the
work does not end soon after the request, the process cancels the work.

In all processes together, only one job of a kind runs at a time. The process that runs the job holds the *slot* of the
kind, a lock that becomes free if the process dies. A *resumable* job can continue in another process: if the process of
a resumable job dies, a server process continues the job.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Final

from storage.background_rounds import log_round_error
from storage.errors import RegistryError
from storage.jobs import JSON, Job, JobProgress, JobRunning, Jobs, JobState, JobStopped, slot_name
from storage.leases import Leases

POLL_SECONDS: Final = 1.0
"""Interval, in seconds, at which a server process checks whether jobs are queued."""
SAVE_SECONDS: Final = 1.0
"""Shortest time between two writes of a job's progress."""
STOP_CHECK_SECONDS: Final = 1.0
"""Interval, in seconds, at which the process that runs a job checks whether a stop of the job was requested."""
STOP_GRACE_SECONDS: Final = 5.0
"""After the process of a job has seen a request to stop the job, it waits this long for the work to end, and then
cancels the work. Most jobs report progress within this time, and stop at the report."""
RETRY_SECONDS: Final = 30.0
"""Seconds until a server process checks again for queued jobs after an error of the store."""
SLOT_ATTEMPTS: Final = 20
"""Number of times that a command tries to get the slot. A single attempt can fail because a server process briefly
holds the slot, to mark the job of a dead process as failed."""
SLOT_PAUSE_SECONDS: Final = 0.1
"""Seconds between two attempts of a command to get the slot."""
log = logging.getLogger("storage.jobs")

OnStep = Callable[[Mapping[str, JSON]], None]
"""Called for each step of a job (one thing that the job did), with an object that can be written as JSON."""
OnProgress = Callable[[JobProgress], None]
"""Called for each update of a job's progress, with the new progress."""


class JobContext:
    """The object to which the work of a job reports its steps and progress. `job`: the job as it was when this run
    began. If an earlier run was interrupted, the work continues at `job.progress.position`."""

    def __init__(
        self, job: Job, jobs: Jobs, *, on_step: OnStep | None = None, on_progress: OnProgress | None = None
    ) -> None:
        """`on_step`: called for each step. `on_progress`: called for each update of the progress."""
        self.job = job
        self.progress = job.progress
        self._jobs = jobs
        self._on_step = on_step
        self._on_progress = on_progress
        self._saved_at = 0.0

    def step(self, event: str, /, **fields: JSON) -> None:
        """Reports a step: one thing that the job did, or that a dry run would do. `event`: what happened, such as
        `removed`. Calls `on_step` with an object that has the key `event` and the keys of `fields`."""
        if self._on_step is not None:
            self._on_step({"event": event, **fields})

    async def report(
        self,
        done: int | None = None,
        *,
        total: int | None = None,
        unit: str | None = None,
        message: str | None = None,
        position: JSON | None = None,
        save_now: bool = False,
    ) -> None:
        """Updates the fields of the progress whose arguments are not None. Writes the progress to the store if the last
        write was at least `SAVE_SECONDS` ago, or if `save_now` is true. Raises JobStopped after a
        write if somebody has requested to stop the job. Call this method only where the work can be interrupted."""
        changes: dict[str, Any] = {"done": done, "total": total, "unit": unit, "message": message, "position": position}
        self.progress = replace(self.progress, **{name: value for name, value in changes.items() if value is not None})
        if self._on_progress is not None:
            self._on_progress(self.progress)
        now = asyncio.get_running_loop().time()
        if save_now or now - self._saved_at >= SAVE_SECONDS:
            self._saved_at = now
            if await self._jobs.save_progress(self.job.id, self.progress):
                raise JobStopped


Work = Callable[[JobContext], Awaitable[JSON]]
"""A function that does the work of a job, and returns the job's result. The process may cancel the function at any
time. A cancelled function must leave the store consistent."""


OnJobEnded = Callable[[str, JobState], None]
"""Called with the kind of a job and the state in which it ended. Returns at once and raises nothing."""


def ignore_job_end(_kind: str, _state: JobState) -> None:
    """An `OnJobEnded` that does nothing."""


class JobRunner:
    """Runs queued jobs in a server process. Each server process has a `JobRunner`."""

    def __init__(
        self,
        jobs: Jobs,
        leases: Leases,
        work_by_kind: Mapping[str, Work],
        on_ended: OnJobEnded = ignore_job_end,
    ) -> None:
        """`work_by_kind` maps each kind of job to the function that does its work."""
        self._jobs = jobs
        self._leases = leases
        self._work_by_kind = work_by_kind
        self._holder = f"server process {os.getpid()}"
        self._tasks: dict[str, asyncio.Task[None]] = {}  # the running tasks, by the kind of their jobs
        self._may_start_jobs = True
        self._on_ended = on_ended

    def stop_starting_jobs(self) -> None:
        """Makes this runner start no more jobs. Its running jobs continue."""
        self._may_start_jobs = False

    async def wait_until_idle(self) -> None:
        """Waits until the running jobs of this runner have ended, with or without an error. Call `stop_starting_jobs`
        first."""
        while tasks := list(self._tasks.values()):
            await asyncio.wait(tasks)

    async def run(self) -> None:
        """Starts queued jobs until this call is cancelled. The cancellation also cancels the jobs that this process
        runs. A server process continues resumable jobs later."""
        try:
            while True:
                pause = POLL_SECONDS
                try:
                    if self._may_start_jobs:
                        await self._start_jobs()
                except Exception as error:
                    log_round_error(log, "cannot read the queued jobs", error)
                    pause = RETRY_SECONDS
                await asyncio.sleep(pause)
        finally:
            tasks = list(self._tasks.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _start_jobs(self) -> None:
        """For each kind of which this process runs no job, starts a task for the oldest job. The task runs the job
        unless another process runs a job of the same kind."""
        free_kinds = self._work_by_kind.keys() - self._tasks.keys()
        for kind, job_id in (await self._jobs.oldest_active_ids(free_kinds)).items():
            if self._may_start_jobs:
                task = asyncio.create_task(self._run_if_slot_is_free(kind, job_id))
                self._tasks[kind] = task
                task.add_done_callback(partial(self._forget_task, kind))

    def _forget_task(self, kind: str, _task: asyncio.Task[None]) -> None:
        del self._tasks[kind]

    async def _run_if_slot_is_free(self, kind: str, job_id: int) -> None:
        """Runs the job if this process gets the slot of the job's kind."""
        try:
            async with self._leases.try_slot(slot_name(kind), count=1) as has_slot:
                if not has_slot:
                    return
                job = await self._jobs.job(job_id)
                if job.state is JobState.RUNNING and not job.is_resumable:
                    # The process that ran the job has died: otherwise it would hold the slot, which this process has.
                    await self._jobs.end(job.id, JobState.FAILED, "the process that ran it has ended")
                elif job.state in (JobState.QUEUED, JobState.RUNNING):
                    job = await self._jobs.start(job.id, self._holder)
                    await run_job(JobContext(job, self._jobs), self._jobs, self._work_by_kind[kind])
                    self._on_ended(kind, JobState.DONE)
        except JobStopped:
            self._on_ended(kind, JobState.STOPPED)
            log.info("job %d (%s) was stopped", job_id, kind)
        except RegistryError as error:
            self._on_ended(kind, JobState.FAILED)
            log.warning("job %d (%s) ended with an error: %s", job_id, kind, error, exc_info=error.__cause__)
        except Exception:
            self._on_ended(kind, JobState.FAILED)
            log.exception("job %d (%s) ended with an unexpected error", job_id, kind)


async def run_job(context: JobContext, jobs: Jobs, work: Work) -> JSON:
    """Runs the work of a job, stores the state in which the job ended, and returns the result of the work. Raises the
    errors of the work. Raises JobStopped if the job was stopped.

    If this call is cancelled, a resumable job keeps its state, so that a server process continues the job. Other jobs
    get the state STOPPED."""
    job_id = context.job.id
    try:
        result = await _run_until_stopped(context, jobs, work)
    except asyncio.CancelledError:
        if not context.job.is_resumable:
            await jobs.end(job_id, JobState.STOPPED, "it was interrupted")
        raise
    except JobStopped as error:
        await jobs.end(job_id, JobState.STOPPED, error.message)
        raise
    except RegistryError as error:
        await jobs.end(job_id, JobState.FAILED, error.message_for_operators())
        raise
    except Exception as error:
        await jobs.end(job_id, JobState.FAILED, f"unexpected error: {type(error).__name__}: {error}")
        raise
    await jobs.end(job_id, JobState.DONE, "", result)
    return result


async def _run_until_stopped(context: JobContext, jobs: Jobs, work: Work) -> JSON:
    """Runs the work and returns its result. If somebody has requested to stop the job and the work does not end within
    `STOP_GRACE_SECONDS`, cancels the work and raises JobStopped. A cancellation of this call cancels the work."""
    work_task = asyncio.ensure_future(work(context))
    try:
        while not work_task.done():
            await asyncio.wait([work_task], timeout=STOP_CHECK_SECONDS)
            if not work_task.done() and await _is_stopping(jobs, context.job.id):
                await asyncio.wait([work_task], timeout=STOP_GRACE_SECONDS)
                break
        if not work_task.done():
            work_task.cancel()
            await asyncio.wait([work_task])
            if work_task.cancelled():
                raise JobStopped
        return work_task.result()
    finally:
        work_task.cancel()
        await asyncio.gather(work_task, return_exceptions=True)


async def _is_stopping(jobs: Jobs, job_id: int) -> bool:
    """Returns whether somebody has requested to stop the job. Returns False if the store cannot be read."""
    try:
        return (await jobs.job(job_id)).is_stopping
    except Exception:  # the job goes on, and the next check may succeed
        return False


async def run_in_command(
    jobs: Jobs,
    leases: Leases,
    kind: str,
    arguments: Mapping[str, JSON],
    work: Work,
    *,
    actor: str,
    on_step: OnStep | None = None,
    on_progress: OnProgress | None = None,
) -> JSON:
    """Runs a job in this process, which is not a server process, and returns the job's result. Raises JobRunning, whose
    message says who runs a job of the kind, if all `SLOT_ATTEMPTS` attempts to get the slot fail. Raises the errors of
    the work, and JobStopped if the job was stopped."""
    for attempt in range(SLOT_ATTEMPTS):
        async with leases.try_slot(slot_name(kind), count=1) as has_slot:
            running_jobs = [job for job in await jobs.active(kind) if job.state is JobState.RUNNING]
            if has_slot:
                for job in running_jobs:
                    if not job.is_resumable:  # the process that ran the job has died: otherwise it would hold the slot
                        await jobs.end(job.id, JobState.FAILED, "the process that ran it has ended")
                job = await jobs.add(kind, arguments, actor=actor, holder=f"command, process {os.getpid()}")
                return await run_job(JobContext(job, jobs, on_step=on_step, on_progress=on_progress), jobs, work)
        if attempt < SLOT_ATTEMPTS - 1:
            await asyncio.sleep(SLOT_PAUSE_SECONDS)
    raise JobRunning(_job_running_message(kind, running_jobs))


def _job_running_message(kind: str, running_jobs: list[Job]) -> str:
    """Returns the message of JobRunning. It says who runs a job of this kind."""
    if not running_jobs:
        return f"another process has just started a job of the kind {kind}; run `entrepot jobs list`"
    job = running_jobs[-1]
    return (
        f"{job.actor} is running {kind} already (job {job.id}, {job.holder}); to watch it, run "
        f"`entrepot jobs show {job.id}`, to stop it, `entrepot jobs stop {job.id}`"
    )
