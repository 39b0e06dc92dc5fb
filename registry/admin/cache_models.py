"""The use of the cache and of quotas, as the management API and the commands `cache`, `quota` and `status` show them.
The docstrings of the models and the descriptions of their fields appear in the OpenAPI document."""

from __future__ import annotations

from datetime import datetime
from typing import Self

from pydantic import BaseModel, Field

from registry.admin import models
from registry.upkeep.eviction import CachePart
from storage.usage import ScopeUsage


class CachePartResponse(BaseModel):
    """The cached content of an upstream, or of all upstreams together (`upstream` is null). Sizes are in bytes."""

    upstream: str | None
    size: int = Field(description="Total size of the blobs. A shared blob counts once")
    max_size: int | None = Field(description="The budget in the settings; null: no limit")
    blobs: int
    tags: int
    images: int = Field(description="Number of images. An index and its manifests count as one image")
    oldest_pull: datetime | None = Field(description="When the least recently pulled image was pulled; null: no images")
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
    """A quota, and how much of it is used. Sizes are in bytes. A limit of null means: no limit."""

    prefix: str
    size: int
    max_size: int | None
    tags: int
    max_tags: int | None
    blobs: int
    complete: bool = Field(description="False while the content is being counted; meanwhile, the quota has no effect")

    @classmethod
    def from_usage(cls, usage: ScopeUsage) -> Self:
        """Converts the usage of a scope that has a quota (`has_quota`)."""
        return cls(
            prefix=usage.definition.prefixes[0],
            size=usage.bytes,
            max_size=usage.definition.max_bytes,
            tags=usage.tags,
            max_tags=usage.definition.max_tags,
            blobs=usage.blobs,
            complete=usage.is_complete,
        )


def has_quota(usage: ScopeUsage) -> bool:
    """Returns whether a scope has a quota. A *scope* is a set of repositories whose use is counted."""
    return usage.definition.max_bytes is not None or usage.definition.max_tags is not None
