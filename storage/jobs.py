"""The interface of the store of jobs (`Jobs`). A *job* is long work, such as a garbage collection or a backup. A server
runs the job in the background, or a command runs it in its own process.

Every job has a row in the store, so that every process can show the job's progress, stop the job, and read its result
later. The *kind* of a job says which work it does. Only one job of each kind runs at a time: the process that runs it
holds the slot `slot_name(kind)`, a permit that only one process can hold (`storage.leases.Leases`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Protocol

from storage.content import Page
from storage.errors import RegistryError

MAX_QUEUED_JOBS: Final = 100
"""Largest number of queued jobs of one kind."""
JSON = Any
"""A value that can be written as JSON."""


class JobUnknown(RegistryError):
    """There is no job with this id."""

    code = "JOB_UNKNOWN"
    default = "there is no such job"


class JobRunning(RegistryError):
    """Another job of the same kind is running."""

    code = "JOB_RUNNING"
    default = "another job of this kind is running"


class JobStopped(RegistryError):
    """A person has stopped the job."""

    code = "JOB_STOPPED"
    default = "the job was stopped"


class JobState(StrEnum):
    """The state of a job. A job starts as `QUEUED` or `RUNNING`, and ends as `DONE`, `FAILED` or `STOPPED`."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class JobProgress:
    """The progress of a job.

    - `done`: number of units that are done. `total`: number of all units; None if the number is unknown.
    - `unit`: what is counted, in the plural, such as "blobs" or "bytes".
    - `message`: what the job does now, for people.
    - `position`: where the work continues after a restart, in a form that only the job's own code understands."""

    done: int = 0
    total: int | None = None
    unit: str = ""
    message: str = ""
    position: JSON | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """One job. `Jobs.jobs` and `Jobs.active` return jobs without `progress.position`, and may shorten `arguments` and
    `result`.

    - `arguments`: the arguments that jobs of this kind need.
    - `actor`: the name of the account or command that started the job.
    - `holder`: the name of the process that runs or ran the job, such as "server process 4711". Empty if no process has
      started the job yet.
    - `is_resumable`: whether a server continues the job after a restart.
    - `is_stopping`: whether a stop of the job was requested.
    - `created`, `updated`, `ended`: times in seconds since 1970. `ended` is None if the job has not ended.
    - `progress`: after a failure, `progress.message` is the reason.
    - `result`: the value that the job returned; None if the job has not ended, was stopped or failed."""

    id: int
    kind: str
    arguments: Mapping[str, JSON]
    state: JobState
    actor: str
    holder: str
    is_resumable: bool
    is_stopping: bool
    created: float
    updated: float
    ended: float | None
    progress: JobProgress
    result: JSON | None


def slot_name(kind: str) -> str:
    """Returns the name of the slot for jobs of this kind. A process holds the slot while it runs such a job."""
    return f"job {kind}"


class Jobs(Protocol):
    """The store of jobs, which all processes share. All methods may raise StorageFailed. Methods that change something
    may also raise StorageFull. A power cut may lose the newest changes of `save_progress`."""

    async def add(
        self, kind: str, arguments: Mapping[str, JSON], *, actor: str, holder: str = "", is_resumable: bool = False
    ) -> Job:
        """Adds a job and returns it. If very many jobs have ended, deletes the oldest ended jobs.

        - If `holder` is the name of a process, the state of the job is `RUNNING`, and the caller runs the job.
        - If `holder` is empty, the state is `QUEUED`. Raises TooManyRequests if `MAX_QUEUED_JOBS` jobs of the kind are
          queued already."""
        ...

    async def job(self, job_id: int) -> Job:
        """Returns a job. Raises JobUnknown."""
        ...

    async def jobs(self, before: int | None, limit: int, kind: str | None = None) -> Page[Job]:
        """Returns a page of at most `limit` jobs, newest first. If `before` is not None, the page has only jobs with
        lower ids; if `kind` is not None, only jobs of this kind.

        If the JSON text of a job's arguments is long, leaves out the arguments that are arrays. If the text without
        them is still long, leaves out all arguments. Does the same with the fields of the result.

        `job` returns all fields. The limits are in `storage.metadata.sqlite.upkeep.sqlite_jobs`."""
        ...

    async def active(self, kind: str | None = None, limit: int = 1000) -> Sequence[Job]:
        """Returns at most `limit` jobs that are queued or running, oldest first. If `kind` is not None, returns only
        jobs of this kind. Leaves out the same fields as `jobs`."""
        ...

    async def oldest_active_ids(self, kinds: Collection[str]) -> Mapping[str, int]:
        """Returns a mapping from each of `kinds` to the id of the oldest job of this kind that is queued or running.
        Leaves out kinds without such a job."""
        ...

    async def start(self, job_id: int, holder: str) -> Job:
        """Marks a job as running in the process `holder`, and returns it. Raises JobUnknown."""
        ...

    async def save_progress(self, job_id: int, progress: JobProgress) -> bool:
        """Stores the progress of a running job. Returns True if the job has to stop, because a stop was requested."""
        ...

    async def end(self, job_id: int, state: JobState, message: str, result: JSON | None = None) -> None:
        """Marks a job as ended. `state`: `DONE`, `FAILED` or `STOPPED`. `message`: the outcome, for people."""
        ...

    async def request_stop(self, job_id: int) -> Job:
        """Asks the process that runs the job to stop the job, and returns the job. A queued job ends at once. Does not
        change a job that has ended. Raises JobUnknown."""
        ...
