"""The routes of `/api/v1/cache` and `/api/v1/quotas`: show how much of the cache and of each quota is used, and evict
images from the cache. The docstrings of the routes are the descriptions in the OpenAPI document."""

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
from registry.upkeep.eviction import EVICTION_KIND, check_upstream, eviction_arguments, read_cache_status

router = management_router()


class EvictionRequest(BodyModel):
    """Which images to evict."""

    to: Annotated[
        int | None,
        Field(
            ge=0,
            le=MAX_NUMBER,
            description="Largest size of the cache after the eviction, in bytes. Default: the limits in the settings "
            "(`max` and `min_free` of `[cache]`, and `cache_max` of each `[[upstream]]`)",
        ),
    ] = None
    upstream: Annotated[str | None, Field(max_length=255, description="Only images of this upstream")] = None
    dry_run: Annotated[bool, Field(description="Evict nothing, only list the images in the job's result")] = False


@router.get("/cache", tags=["cache"])
async def read_cache(caller: AdminCaller) -> list[CachePartResponse]:
    """Returns how much content of each upstream is cached. The last entry is about all upstreams together."""
    parts = await read_cache_status(caller.upkeep.settings, caller.upkeep.store)
    return [CachePartResponse.from_part(part) for part in parts]


@router.post("/cache/evict", tags=["cache"], status_code=202)
async def evict_from_cache(caller: AdminCaller, request: EvictionRequest) -> JobResponse:
    """Starts a job that evicts the least recently pulled images from the cache. The server also evicts images by itself
    when the cache exceeds the limits in the settings."""
    check_upstream(caller.upkeep.settings, request.upstream)
    arguments = eviction_arguments(request.to, request.upstream, dry_run=request.dry_run)
    return await queue_job(caller, EVICTION_KIND, arguments)


@router.get("/quotas", tags=["quotas"])
async def list_quotas(caller: AdminCaller) -> list[QuotaResponse]:
    """Lists the quotas in the settings, and how much of each is used."""
    return [QuotaResponse.from_usage(usage) for usage in await caller.upkeep.store.usage.scopes() if has_quota(usage)]
