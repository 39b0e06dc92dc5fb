"""The routes of `/api/v1/cache` and `/api/v1/quotas`: how much space the mirrored content and the repositories with a
quota use, and the eviction of mirrored images. The docstrings of the routes are the descriptions in the OpenAPI
document."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from registry.admin.body_model import BodyModel
from registry.admin.cache_models import CachePartResponse, QuotaResponse, has_quota
from registry.admin.caller import AdminCaller
from registry.admin.job_models import JobResponse
from registry.admin.job_routes import queue_job
from registry.admin.management_router import management_router
from registry.http.query import MAX_NUMBER
from registry.upkeep.eviction import EVICTION_KIND, check_upstream, eviction_arguments
from registry.upkeep.eviction import read_cache_status as read_parts

router = management_router()


class EvictionRequest(BodyModel):
    """What to evict."""

    to: Annotated[
        int | None,
        Field(
            ge=0,
            le=MAX_NUMBER,
            description="Bytes that the cache may have afterwards. Default: the limits in the settings, `max` and "
            "`min_free` of `[cache]` and `cache_max` of each `[[upstream]]`",
        ),
    ] = None
    upstream: Annotated[str | None, Field(max_length=255, description="Only images of this upstream")] = None
    dry_run: Annotated[bool, Field(description="Only list in the job's result what would be evicted")] = False


@router.get("/cache", tags=["cache"])
async def read_cache(caller: AdminCaller) -> list[CachePartResponse]:
    """Returns the cached content of each upstream, and then the content of all upstreams together."""
    parts = await read_parts(caller.upkeep.settings, caller.upkeep.store)
    return [CachePartResponse.from_part(part) for part in parts]


@router.post("/cache/evict", tags=["cache"], status_code=202)
async def evict_from_cache(caller: AdminCaller, request: EvictionRequest) -> JobResponse:
    """Starts a job that evicts the images that were not pulled for the longest time. The server does so by itself when
    the cache exceeds the limits in the settings."""
    check_upstream(caller.upkeep.settings, request.upstream)
    arguments = eviction_arguments(request.to, request.upstream, dry_run=request.dry_run)
    return await queue_job(caller, EVICTION_KIND, arguments)


@router.get("/quotas", tags=["quotas"])
async def list_quotas(caller: AdminCaller) -> list[QuotaResponse]:
    """Lists the quotas in the settings, and how much of each is used."""
    return [QuotaResponse.from_usage(usage) for usage in await caller.upkeep.store.usage.scopes() if has_quota(usage)]
