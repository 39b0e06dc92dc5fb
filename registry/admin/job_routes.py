"""The routes of `/api/v1/jobs`. A job is long work, such as a backup, that runs in the background. The docstrings of
the routes are the descriptions in the OpenAPI document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from fastapi import Path, Query

from registry.admin import models
from registry.admin.caller import AdminCaller, Caller
from registry.admin.job_models import JobResponse
from registry.admin.management_route import AfterQuery, LimitQuery
from registry.admin.management_router import management_router
from registry.http.query import MAX_NUMBER, parse_number
from storage.jobs import JSON

router = management_router()
PathJob = Annotated[int, Path(ge=0, le=MAX_NUMBER)]
"""The id of a job in the path of a request."""


async def queue_job(caller: Caller, kind: str, arguments: Mapping[str, JSON]) -> JobResponse:
    """Queues a job for the caller, and returns the job. A process of the server runs the job. If this process ends,
    another process resumes the job. Raises TooManyRequests if too many jobs of the kind are queued."""
    job = await caller.upkeep.store.jobs.add(kind, arguments, actor=caller.actor.name, is_resumable=True)
    return JobResponse.from_stored(job)


@router.get("/jobs", tags=["jobs"])
async def list_jobs(
    caller: AdminCaller,
    kind: Annotated[str | None, Query(max_length=40, examples=["gc"])] = None,
    after: AfterQuery = None,
    limit: LimitQuery = 100,
) -> models.ListPage[JobResponse]:
    """Lists the jobs, newest first. The registry keeps the newest thousand jobs. If the arguments or the result of a
    job are long, the list leaves out their arrays; `GET /jobs/{job}` returns the arrays."""
    page = await caller.upkeep.store.jobs.jobs(_job_id_or_none(after), limit, kind)
    return models.list_page(page, JobResponse.from_stored, lambda job: str(job.id))


@router.get("/jobs/{job}", tags=["jobs"])
async def show_job(caller: AdminCaller, job: PathJob) -> JobResponse:
    """Returns one job with its progress, its arguments and its complete result."""
    return JobResponse.from_stored(await caller.upkeep.store.jobs.job(job))


@router.post("/jobs/{job}/stop", tags=["jobs"], status_code=202)
async def stop_job(caller: AdminCaller, job: PathJob) -> JobResponse:
    """Asks the process that runs the job to stop the job. Changes that the job has made are not undone. If the job has
    ended already, nothing changes."""
    return JobResponse.from_stored(await caller.upkeep.store.jobs.request_stop(job))


def _job_id_or_none(after: str | None) -> int | None:
    """Returns the job id in the query parameter `after`; None if the parameter is missing. Raises RequestInvalid if
    `after` is not a number."""
    return None if after is None else parse_number(after, f"{after!r} is not from the field `next` of an earlier page")
