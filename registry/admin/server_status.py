"""The status of a running server (`ServerStatus`), as the management API, the pages and `entrepot status` show it. The
docstrings of the models and the descriptions of their fields appear in the OpenAPI document.

Each worker process writes its own state to a file (`registry.status.worker_report`). Everything else comes from the
store and the file system, which all processes share. So any process on the server's machine can read the whole status.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Final, Literal, Self

from pydantic import BaseModel, Field

from registry.admin.cache_models import CachePartResponse, QuotaResponse, has_quota
from registry.admin.models import to_datetime, to_datetime_or_none
from registry.config import Settings, Upstream
from registry.status.worker_report import LATE_SECONDS, EndpointReport, WorkerReport, read_worker_reports
from registry.upkeep.budgets import min_free_space
from registry.upkeep.components import UpkeepComponents
from registry.upkeep.eviction import read_cache_status
from storage.composition import list_partials, open_inventory
from storage.errors import RegistryError
from storage.jobs import Job
from storage.store.stored_registry import StoredRegistry

MAX_SHOWN_JOBS: Final = 100
"""Largest number of jobs in the status. The status leaves out further jobs."""
_BREAKER_RANKS: Final = {"closed": 0, "half-open": 1, "open": 2}
"""Ranks the states of a circuit breaker. A higher number is worse."""


class WorkerStatus(BaseModel):
    """A worker process."""

    pid: int
    started: datetime
    memory: int = Field(description="Memory that the worker occupies, in bytes")
    connections: int
    max_connections: int | None = Field(description="How many connections the worker accepts at a time")
    requests: int = Field(description="Requests in progress")
    answered: int = Field(description="Responses since the start of the worker")
    loop_delay: float = Field(description="By how many seconds the event loop was late when the worker last reported")
    reported: datetime = Field(description="When the worker last reported")
    hangs: bool = Field(description="No report for a long time: the worker hangs, or cannot write its report")
    read_only: bool = Field(
        description="The store is open read-only: the disk was too full to open the store for writing"
    )

    @classmethod
    def from_report(cls, report: WorkerReport, now: float) -> Self:
        """Converts a report. `now`: in seconds since 1970."""
        return cls(
            pid=report.pid,
            started=to_datetime(report.started),
            memory=report.memory,
            connections=report.connections,
            max_connections=report.max_connections,
            requests=report.requests,
            answered=report.answered,
            loop_delay=report.loop_delay,
            reported=to_datetime(report.written),
            hangs=now - report.written > LATE_SECONDS,
            read_only=report.read_only,
        )


class TrafficStatus(BaseModel):
    """The traffic of all running workers together."""

    connections: int
    requests: int = Field(description="Requests in progress")
    answered: int = Field(description="Responses since the starts of these workers")


class DiskStatus(BaseModel):
    """The file system of the data directory. Sizes are in bytes."""

    path: str
    size: int
    free: int
    free_inodes: int | None = Field(description="null: the file system does not count them")
    min_free: int | None = Field(description="Pushes are refused if less would stay free; null: no minimum is set")
    problem: str | None = Field(description="Why nothing new can be stored; null: new content can be stored")


class UploadStatus(BaseModel):
    """The open upload sessions: pushes of blobs that have begun and not ended."""

    open: int
    size: int = Field(description="Bytes that the open uploads have received and recorded")
    oldest: datetime | None = Field(
        description="When the upload that has been idle longest last made progress; null: no upload is open"
    )


class FillStatus(BaseModel):
    """A fill: an unfinished download of a blob from an upstream into the cache. Sizes are in bytes."""

    digest: str
    size: int
    received: int
    running: bool = Field(description="False: the download has stopped; it continues when the blob is requested again")


class JobStatus(BaseModel):
    """A job that runs or waits."""

    id: int
    kind: str
    state: str
    holder: str
    created: datetime
    done: int
    total: int | None
    unit: str
    message: str

    @classmethod
    def from_stored(cls, job: Job) -> Self:
        """Converts a stored job."""
        progress = job.progress
        return cls(
            id=job.id,
            kind=job.kind,
            state=job.state,
            holder=job.holder,
            created=to_datetime(job.created),
            done=progress.done,
            total=progress.total,
            unit=progress.unit,
            message=progress.message,
        )


class EndpointStatus(BaseModel):
    """An endpoint of an upstream. `breaker` is the worst state of the circuit breaker that a worker has reported."""

    url: str
    breaker: Literal["closed", "open", "half-open", "unknown"] = Field(
        description="`closed`: requests are sent to the endpoint. `open`: no requests are sent, because the endpoint "
        "failed several times. `half-open`: one request tests the endpoint. `unknown`: no worker has reported"
    )
    failing_in: int = Field(description="Number of workers whose last requests to the endpoint failed")
    retry_in: float | None = Field(description="Seconds until the endpoint is tried again")
    last_error: str | None
    last_error_at: datetime | None


class UpstreamStatus(BaseModel):
    """An upstream: its endpoints, and how many requests it allows."""

    name: str
    endpoints: list[EndpointStatus]
    remaining: int | None = Field(
        description="How many more requests the upstream allows, according to its last response that stated a number"
    )
    limit: int | None
    remaining_at: datetime | None = Field(description="Time of the response that stated `remaining`")
    paused_until: datetime | None = Field(
        description="Until this time, no manifests are requested, because the upstream answered 429"
    )


class ServerStatus(BaseModel):
    """The current state of the server. If no worker reports, `running` is false, and the values that only the workers
    know are null, empty, 0 or `unknown`. If the store could not be read, `store_problem` says why, and the values from
    the store are empty or incomplete."""

    running: bool
    version: str | None
    started: datetime | None
    uptime: float | None = Field(description="Seconds since the start of the server")
    now: datetime
    store_problem: str | None
    workers: list[WorkerStatus]
    traffic: TrafficStatus
    disk: DiskStatus
    uploads: UploadStatus | None
    fills: list[FillStatus]
    jobs: list[JobStatus] = Field(description=f"Jobs that run or wait, oldest first, at most {MAX_SHOWN_JOBS}")
    cache: list[CachePartResponse]
    quotas: list[QuotaResponse]
    upstreams: list[UpstreamStatus]


async def read_server_status(
    upkeep: UpkeepComponents, clock: Callable[[], float] = time.time, *, with_cache: bool = True
) -> ServerStatus:
    """Returns the status of the server. `clock` returns seconds since 1970. `with_cache`: whether to add
    `ServerStatus.cache`, for which all cached images have to be counted. Raises OSError if the data directory cannot be
    read. An error of the store becomes `ServerStatus.store_problem`, and the fields not yet read stay empty."""
    settings, store = upkeep.settings, upkeep.store
    problem = store.storage_problem() or store.push_refusal_reason()
    status = await asyncio.to_thread(_status_of_reports, settings, clock(), problem)
    if store.is_read_only:
        # `_add_from_store` then adds no `uploads`, and `store_problem` says why.
        status.store_problem = problem
    try:
        await _add_from_store(status, upkeep, clock, with_cache=with_cache)
    except RegistryError as error:
        status.store_problem = error.message
    except OSError as error:
        status.store_problem = error.strerror or str(error)
    return status


async def read_upstreams(upkeep: UpkeepComponents, clock: Callable[[], float] = time.time) -> list[UpstreamStatus]:
    """Returns the status of all upstreams: the state of their endpoints, as the workers have reported it, and how many
    requests they still allow. `clock` returns seconds since 1970. Raises OSError, StorageFailed."""
    settings = upkeep.settings
    reports = await asyncio.to_thread(read_worker_reports, settings.data)
    upstreams = [_upstream_status(upstream, reports) for upstream in settings.upstream]
    for status, configured in zip(upstreams, settings.upstream, strict=True):
        await _add_allowance(status, configured, upkeep.store, clock())
    return upstreams


async def read_fills(settings: Settings) -> list[FillStatus]:
    """Returns the fills: the unfinished downloads of blobs from upstreams. Raises OSError."""
    return await asyncio.to_thread(_fills, settings)


async def _add_from_store(
    status: ServerStatus, upkeep: UpkeepComponents, clock: Callable[[], float], *, with_cache: bool
) -> None:
    """Adds the parts of the status that come from the store. Raises RegistryError and OSError."""
    settings, store = upkeep.settings, upkeep.store
    for upstream, configured in zip(status.upstreams, settings.upstream, strict=True):
        await _add_allowance(upstream, configured, store, clock())
    status.fills = await read_fills(settings)
    status.jobs = [JobStatus.from_stored(job) for job in await store.jobs.active(limit=MAX_SHOWN_JOBS)]
    if with_cache:
        status.cache = [CachePartResponse.from_part(part) for part in await read_cache_status(settings, store)]
    scope_usages = await store.usage.scopes()  # a scope is a set of repositories; some scopes belong to a quota
    status.quotas = [QuotaResponse.from_usage(scope_usage) for scope_usage in scope_usages if has_quota(scope_usage)]
    # If the store is read-only, the disk is full. `_upload_status` opens a database, which needs space on the disk.
    if not store.is_read_only:
        status.uploads = await asyncio.to_thread(_upload_status, settings)


def status_without_store(settings: Settings, problem: str, clock: Callable[[], float] = time.time) -> ServerStatus:
    """Returns the status of the server without the parts that come from the store, for a process that cannot open the
    store. `problem`: why it cannot open the store. Blocks. Raises OSError if the data directory cannot be read."""
    status = _status_of_reports(settings, clock(), None)
    status.store_problem = problem
    return status


def _status_of_reports(settings: Settings, now: float, disk_problem: str | None) -> ServerStatus:
    """Returns the part of the status that needs no store. Blocks."""
    reports = read_worker_reports(settings.data)
    started = min((report.server_started for report in reports), default=None)
    return ServerStatus(
        running=bool(reports),
        version=reports[-1].version if reports else None,
        started=to_datetime_or_none(started),
        uptime=None if started is None else max(0.0, now - started),
        now=to_datetime(now),
        store_problem=None,
        workers=[WorkerStatus.from_report(report, now) for report in reports],
        traffic=TrafficStatus(
            connections=sum(report.connections for report in reports),
            requests=sum(report.requests for report in reports),
            answered=sum(report.answered for report in reports),
        ),
        disk=_disk_status(settings, disk_problem),
        uploads=None,
        fills=[],
        jobs=[],
        cache=[],
        quotas=[],
        upstreams=[_upstream_status(upstream, reports) for upstream in settings.upstream],
    )


def _disk_status(settings: Settings, problem: str | None) -> DiskStatus:
    file_system = os.statvfs(settings.data)
    size = file_system.f_blocks * file_system.f_frsize
    min_free = min_free_space(settings)
    return DiskStatus(
        path=str(settings.data.absolute()),
        size=size,
        free=file_system.f_bavail * file_system.f_frsize,
        free_inodes=file_system.f_favail if file_system.f_files else None,
        min_free=None if min_free is None else min_free.required_bytes(size),
        problem=problem,
    )


def _upload_status(settings: Settings) -> UploadStatus:
    with open_inventory(settings.data) as inventory:
        uploads = inventory.count_uploads()
    return UploadStatus(open=uploads.count, size=uploads.received, oldest=to_datetime_or_none(uploads.idle_since))


def _fills(settings: Settings) -> list[FillStatus]:
    return [
        FillStatus(digest=partial.digest, size=partial.size, received=partial.received, running=partial.is_downloading)
        for partial in list_partials(settings.data)
    ]


def _upstream_status(upstream: Upstream, reports: Sequence[WorkerReport]) -> UpstreamStatus:
    """Returns the status of an upstream from the reports of the workers, without the values of its rate limit."""
    endpoint_reports = [
        endpoint for report in reports for endpoint in report.endpoints if endpoint.upstream == upstream.name
    ]
    return UpstreamStatus(
        name=upstream.name,
        endpoints=[
            _endpoint_status(url, [report for report in endpoint_reports if report.url == url])
            for url in upstream.endpoints
        ],
        remaining=None,
        limit=None,
        remaining_at=None,
        paused_until=None,
    )


async def _add_allowance(status: UpstreamStatus, upstream: Upstream, store: StoredRegistry, now: float) -> None:
    """Adds the stored values of the upstream's rate limit: how many requests the upstream still allows, and until when
    no manifests are requested."""
    from registry.upstream.rate_limits import manifests_limited_until

    allowance = await store.records.allowance(upstream.name)
    if allowance is not None and allowance.remaining is not None:
        status.remaining, status.limit = allowance.remaining, allowance.limit
        status.remaining_at = to_datetime(allowance.at)
    paused_until = await manifests_limited_until(store.records, upstream.name, upstream.endpoints, now)
    status.paused_until = to_datetime_or_none(paused_until)


def _endpoint_status(url: str, reports: Sequence[EndpointReport]) -> EndpointStatus:
    """Combines the reports of the workers about an endpoint: takes the worst state of the breaker, and the newest
    error."""
    worst = max(reports, key=lambda report: _BREAKER_RANKS[report.breaker], default=None)
    newest = max(reports, key=lambda report: report.last_error_at or 0.0, default=None)
    waits = [report.retry_in_seconds for report in reports if report.retry_in_seconds is not None]
    return EndpointStatus(
        url=url,
        breaker=worst.breaker if worst else "unknown",
        failing_in=sum(report.failures > 0 for report in reports),
        retry_in=max(waits, default=None),
        last_error=newest.last_error if newest else None,
        last_error_at=to_datetime_or_none(newest.last_error_at if newest else None),
    )
