"""The routes of `/api/v1/cache` and `/api/v1/quotas`: how much space the mirrored content and the repositories with a
quota use, and the eviction of mirrored images. The docstrings of the routes are the descriptions in the OpenAPI
document."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Self

from pydantic import BaseModel, Field

from registry.admin import models
from registry.admin.body_limits import BodyModel
from registry.admin.caller import AdminCaller
from registry.admin.job_routes import JobResponse, queue_job
from registry.admin.management_router import management_router
from registry.http.query import MAX_NUMBER
from registry.upkeep.eviction import EVICTION_KIND, CachePart, check_upstream, eviction_arguments
from registry.upkeep.eviction import read_cache_status as read_parts
from storage.usage import ScopeUse

router = management_router()


class CachePartResponse(BaseModel):
    """The cached content of an upstream, or of all upstreams together (`upstream` is null). Sizes are in bytes."""

    upstream: str | None
    size: int = Field(description="Size of the blobs, each counted once")
    max_size: int | None = Field(description="The budget in the settings; null: no limit")
    blobs: int
    tags: int
    images: int = Field(description="Number of images. The manifests of an index count as one image")
    oldest_pull: datetime | None = Field(description="Time of the last pull of the least recently pulled image")
    complete: bool = Field(description="False while the content is still being counted")

    @classmethod
    def from_part(cls, part: CachePart) -> Self:
        """Converts a part of the cache."""
        return cls(
            upstream=part.upstream,
            size=part.size,
            max_size=part.max_size,
            blobs=part.blobs,
            tags=part.tags,
            images=part.images,
            oldest_pull=models.to_datetime_or_none(part.oldest_pull),
            complete=part.is_complete,
        )


class QuotaResponse(BaseModel):
    """A quota, and how much of it is used. Sizes are in bytes; null: no limit."""

    prefix: str
    size: int
    max_size: int | None
    tags: int
    max_tags: int | None
    blobs: int
    complete: bool = Field(description="False while the content is still being counted; the quota has no effect then")

    @classmethod
    def from_use(cls, use: ScopeUse) -> Self:
        """Converts the use of the repositories to which a quota applies."""
        return cls(
            prefix=use.definition.prefixes[0],
            size=use.bytes,
            max_size=use.definition.max_bytes,
            tags=use.tags,
            max_tags=use.definition.max_tags,
            blobs=use.blobs,
            complete=use.is_complete,
        )


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
    return [QuotaResponse.from_use(use) for use in await caller.upkeep.store.usage.scopes() if is_quota(use)]


def is_quota(use: ScopeUse) -> bool:
    """Returns whether a scope belongs to a quota. A scope is a set of repositories whose use is counted."""
    return use.definition.max_bytes is not None or use.definition.max_tags is not None
