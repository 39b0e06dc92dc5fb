"""Runs jobs. In a server process, `JobRunner` runs the queued jobs. In a command, `run_in_command` adds one job and
runs it.

A job's work is a function with a `JobContext` as argument. The work reports its progress to the context, which raises
JobStopped if a stop of the job was requested. Work that does not report soon after such a request, because it waits or
searches, is cancelled. In all processes together, only one job of a kind runs at a time: the process that runs it holds
the slot (a permit) of the kind. If the process dies, its slot becomes free, and a server process continues the job if
it is resumable.
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
"""Seconds that a job has to stop itself after this process sees the request. Then the process cancels it. A job stops
itself at its next report of progress. Most jobs report more often than this, so they are not cancelled."""
RETRY_SECONDS: Final = 30.0
"""Seconds until a server process checks again for queued jobs after an error of the store."""
SLOT_ATTEMPTS: Final = 20
"""Number of times that a command tries to get the slot of its kind of job. A server process holds the slot for a moment
while it ends the job of a process that has died."""
SLOT_PAUSE_SECONDS: Final = 0.1
"""Seconds between two of these attempts."""
log = logging.getLogger("storage.jobs")

OnStep = Callable[[Mapping[str, JSON]], None]
"""Called with each step of a job: an object, which can be written as JSON, about one thing that the job did."""
OnProgress = Callable[[JobProgress], None]
"""Called with each update of a job's progress."""


class JobContext:
    """The object to which the work of a job reports its steps and progress. `job`: the job; its `progress.position` is
    the position at which an earlier run stopped."""

    def __init__(
        self, job: Job, jobs: Jobs, *, on_step: OnStep | None = None, on_progress: OnProgress | None = None
    ) -> None:
        """`on_step` and `on_progress` are called at each step and each progress, for a command that prints them."""
        self.job = job
        self.progress = job.progress
        self._jobs = jobs
        self._on_step = on_step
        self._on_progress = on_progress
        self._saved_at = 0.0

    def step(self, event: str, /, **fields: JSON) -> None:
        """Reports a step to the command that runs the job: one thing that was done, or that a dry run would do.
        `event`: what happened, such as `removed`. The command receives an object with the key `event`, followed by the
        `fields`."""
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
        """Updates the given parts of the progress. Writes them to the store at most once a second, unless `save_now` is
        true. Raises JobStopped if a stop of the job was requested. So the work calls this only where it can be
        interrupted."""
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
"""The function that does the work of a job, and returns the job's result. It may be cancelled at any time, when the
process ends or a stop was requested, and then leaves the store consistent."""


OnJobEnded = Callable[[str, JobState], None]
"""Called with the kind of a job and the state in which it ended. Returns at once and raises nothing."""


def ignore_job_end(_kind: str, _state: JobState) -> None:
    """An `OnJobEnded` that does nothing."""


class JobRunner:
    """Runs the queued jobs of the given kinds in a server process. Each server process has a `JobRunner`."""

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
        self._running: dict[str, asyncio.Task[None]] = {}  # by kind of the job that the task runs
        self._takes_jobs = True
        self._on_ended = on_ended

    def stop_starting_jobs(self) -> None:
        """Makes this runner start no more jobs. Its running jobs continue."""
        self._takes_jobs = False

    async def wait_until_idle(self) -> None:
        """Waits until the running jobs of this runner have ended, with or without an error. Call `stop_starting_jobs`
        first."""
        while running := list(self._running.values()):
            await asyncio.wait(running)

    async def run(self) -> None:
        """Starts queued jobs until the task is cancelled. The cancellation also cancels the jobs that this process
        runs. A server continues the resumable jobs after its next start."""
        try:
            while True:
                pause = POLL_SECONDS
                try:
                    if self._takes_jobs:
                        await self._start_jobs()
                except Exception as error:
                    log_round_error(log, "cannot read the queued jobs", error)
                    pause = RETRY_SECONDS
                await asyncio.sleep(pause)
        finally:
            running = list(self._running.values())
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _start_jobs(self) -> None:
        """For each kind of which this process runs no job, starts a task with the oldest job of that kind. The task
        runs the job unless another process runs a job of the kind."""
        free_kinds = self._work_by_kind.keys() - self._running.keys()
        for kind, job_id in (await self._jobs.oldest_active_ids(free_kinds)).items():
            if self._takes_jobs:
                task = asyncio.create_task(self._run_if_free(kind, job_id))
                self._running[kind] = task
                task.add_done_callback(partial(self._forget, kind))

    def _forget(self, kind: str, _task: asyncio.Task[None]) -> None:
        del self._running[kind]

    async def _run_if_free(self, kind: str, job_id: int) -> None:
        """Runs the job if this process gets the slot of its kind."""
        try:
            async with self._leases.try_slot(slot_name(kind), count=1) as has_slot:
                if not has_slot:
                    return
                job = await self._jobs.job(job_id)
                if job.state is JobState.RUNNING and not job.is_resumable:
                    # The process that ran the job held the slot until it died.
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
    """Runs the work of a job, stores the state in which it ended, and returns its result. Raises the errors of the
    work, and JobStopped if it had to be cancelled because a stop was requested. If the task is cancelled, a resumable
    job stays as it is, so that a server continues it. A job that is not resumable gets the state STOPPED."""
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
        await jobs.end(job_id, JobState.FAILED, error.for_operators())
        raise
    except Exception as error:
        await jobs.end(job_id, JobState.FAILED, f"unexpected error: {type(error).__name__}: {error}")
        raise
    await jobs.end(job_id, JobState.DONE, "", result)
    return result


async def _run_until_stopped(context: JobContext, jobs: Jobs, work: Work) -> JSON:
    """Runs the work and returns its result. If a stop was requested and the work does not end within
    `STOP_GRACE_SECONDS`, cancels the work and raises JobStopped. A cancellation of this call cancels the work."""
    running = asyncio.ensure_future(work(context))
    try:
        while not running.done():
            await asyncio.wait([running], timeout=STOP_CHECK_SECONDS)
            if not running.done() and await _is_stopping(jobs, context.job.id):
                await asyncio.wait([running], timeout=STOP_GRACE_SECONDS)
                break
        if not running.done():
            running.cancel()
            await asyncio.wait([running])
            if running.cancelled():
                raise JobStopped
        return running.result()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def _is_stopping(jobs: Jobs, job_id: int) -> bool:
    """Returns whether a stop of the job was requested; False if the store cannot be read now."""
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
    """Runs a job in this process, which is not a server, and returns its result. If another process still runs a job of
    the same kind after `SLOT_ATTEMPTS`, raises JobRunning with a sentence that names the process that runs it. Also
    raises the errors of the work."""
    for attempt in range(SLOT_ATTEMPTS):
        async with leases.try_slot(slot_name(kind), count=1) as has_slot:
            running = [job for job in await jobs.active(kind) if job.state is JobState.RUNNING]
            if has_slot:
                for job in running:
                    if not job.is_resumable:  # the process that ran the job has died, because this process has the slot
                        await jobs.end(job.id, JobState.FAILED, "the process that ran it has ended")
                job = await jobs.add(kind, arguments, actor=actor, holder=f"command, process {os.getpid()}")
                return await run_job(JobContext(job, jobs, on_step=on_step, on_progress=on_progress), jobs, work)
        if attempt < SLOT_ATTEMPTS - 1:
            await asyncio.sleep(SLOT_PAUSE_SECONDS)
    raise JobRunning(_who_runs_it(kind, running))


def _who_runs_it(kind: str, running: list[Job]) -> str:
    """Returns the message of JobRunning: who runs the job of this kind."""
    if not running:
        return f"another process has just started a job of the kind {kind}; run `entrepot jobs list`"
    job = running[-1]
    return (
        f"{job.actor} is running {kind} already (job {job.id}, {job.holder}); to watch it, run "
        f"`entrepot jobs show {job.id}`, to stop it, `entrepot jobs stop {job.id}`"
    )
