"""The routes of `/api/v1/status`, the current status of the server, and of `/api/v1/activity`, the numbers of pulls,
pushes and requests to mirrors in each hour and day. The docstrings of the routes are the descriptions in the OpenAPI
document."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, astuple
from datetime import datetime
from typing import Annotated, Final, Self

from fastapi import Request
from pydantic import BaseModel, Field

from registry.admin.caller import AdminCaller, Caller
from registry.admin.management_router import management_router
from registry.admin.models import to_datetime
from registry.admin.server_status import ServerStatus, read_server_status
from storage.activity import DAY_SECONDS, HOUR_SECONDS, Activity, ActivityBucket, ActivityLog

router = management_router()
SHOWN_HOURS: Final = 24
SHOWN_DAYS: Final = 30
"""The numbers of hours and days in the response, including the current hour and the current day."""


class ActivityNumbers(BaseModel):
    """The numbers of pulls, pushes, and requests for mirrored content in one period."""

    pulls: int = Field(description="Manifests that clients have pulled")
    pushes: int = Field(description="Manifests that clients have pushed")
    hits: int = Field(description="Requests for mirrored content that was stored here")
    misses: int = Field(description="Requests for mirrored content that had to be fetched")
    fetched_bytes: int = Field(description="Bytes of content that came from upstreams")
    saved_bytes: int = Field(description="Bytes of mirrored content that did not have to be fetched")

    @property
    def hit_ratio(self) -> float | None:
        """The share of hits in all requests for mirrored content, from 0 to 1; None if there were no such requests."""
        requests = self.hits + self.misses
        return self.hits / requests if requests else None


class ActivityBucketResponse(ActivityNumbers):
    """What happened in the hour or day that begins at `start`."""

    start: datetime


class ActivityPeriod(BaseModel):
    """The activity in consecutive hours or days, oldest first. The last hour or day is not over yet."""

    bucket_seconds: int
    total: ActivityNumbers
    buckets: Annotated[list[ActivityBucketResponse], Field(min_length=1)]

    @classmethod
    def from_stored(
        cls, buckets: Sequence[ActivityBucket], unstored: Activity, now: float, bucket_seconds: int, count: int
    ) -> Self:
        """Returns the last `count` buckets up to the time `now`, in seconds since 1970. A *bucket* has the activity of
        one hour or day; `bucket_seconds` is its length. `buckets`: the stored buckets. An hour or day
        without a stored bucket gets an empty bucket. `unstored`: activity in the current bucket that is not stored
        yet."""
        current_start = int(now) // bucket_seconds * bucket_seconds
        starts = range(current_start - (count - 1) * bucket_seconds, current_start + 1, bucket_seconds)
        by_start = {bucket.start: bucket.activity for bucket in buckets}
        by_start[current_start] = _sum([by_start.get(current_start, Activity()), unstored])
        shown_buckets = [ActivityBucket(start, by_start.get(start, Activity())) for start in starts]
        return cls(
            bucket_seconds=bucket_seconds,
            total=ActivityNumbers(**asdict(_sum([bucket.activity for bucket in shown_buckets]))),
            buckets=[
                ActivityBucketResponse(start=to_datetime(bucket.start), **asdict(bucket.activity))
                for bucket in shown_buckets
            ],
        )


class ActivityResponse(BaseModel):
    """The last 24 hours by hour and the last 30 days by day, in UTC, including the current hour and day."""

    day: ActivityPeriod
    month: ActivityPeriod


@router.get("/status", tags=["status"])
async def read_status(caller: AdminCaller) -> ServerStatus:
    """Returns what the server does now: its processes, the disk, incomplete uploads and downloads, jobs, the use of the
    cache and of the quotas, and how its upstreams respond. The numbers of the worker processes are up to a second
    old."""
    return await read_server_status(caller.upkeep)


@router.get("/activity", tags=["status"])
async def read_activity(request: Request, caller: AdminCaller) -> ActivityResponse:
    """Returns how much was pulled and pushed, how many requests the mirrors answered from the cache, and how many bytes
    they fetched and saved. A pull is a GET or HEAD of a manifest. The counts of an hour are deleted after 32 days."""
    return await read_activity_for(request, caller)


async def read_activity_for(request: Request, caller: Caller) -> ActivityResponse:
    """Returns the activity until now. `caller` must be an admin; this function does not check that. A `Caller` also has
    the objects that routes use, such as the store (`caller.upkeep.store`). Raises the errors of the store."""
    unstored = await asyncio.to_thread(request.app.telemetry.metrics.activity.compute_unstored)
    return await _read_activity_until(caller.upkeep.store.activity, unstored, request.app.factory.clock())


async def _read_activity_until(activity_log: ActivityLog, unstored: Activity, now: float) -> ActivityResponse:
    """Returns the activity until the time `now`, which is in seconds since 1970. `unstored`: activity that is not in
    the store yet."""

    async def read_period(bucket_seconds: int, count: int) -> ActivityPeriod:
        buckets = await activity_log.buckets(now - (count - 1) * bucket_seconds, bucket_seconds)
        return ActivityPeriod.from_stored(buckets, unstored, now, bucket_seconds, count)

    return ActivityResponse(
        day=await read_period(HOUR_SECONDS, SHOWN_HOURS), month=await read_period(DAY_SECONDS, SHOWN_DAYS)
    )


def _sum(activities: Sequence[Activity]) -> Activity:
    """Adds up the activities, field by field."""
    return Activity(*map(sum, zip(*map(astuple, activities), strict=True)))
