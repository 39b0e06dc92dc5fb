"""The routes of `/api/v1/mirror` for upstreams and cached images: show, refresh, delete, fetch. The routes for frozen
tags are in `registry.admin.frozen_tag_routes`.

The OpenAPI document shows the docstrings of the routes to clients. In these docstrings, "you" is the account that sends
the request. A *fill* is the download of a blob from an upstream into the cache."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Annotated, Final, Self

from fastapi import Query
from pydantic import BaseModel, Field

from registry.admin import models
from registry.admin.body_model import BodyModel, FailFastList
from registry.admin.cache_models import CachePartResponse
from registry.admin.caller import AdminCaller, LoggedInCaller
from registry.admin.frozen_tag_routes import MAX_REFERENCE_CHARACTERS, check_may_manage
from registry.admin.job_models import JobResponse
from registry.admin.job_routes import queue_job
from registry.admin.management_router import management_router
from registry.admin.server_status import FillStatus, UpstreamStatus, read_fills, read_upstreams
from registry.upkeep.cached_content import RefreshOutcome, RefreshResult, purge_image, refresh_image
from registry.upkeep.eviction import check_upstream, read_cache_status
from registry.upkeep.warm_work import MAX_WARMED_IMAGES, WARM_KIND, check_warm_arguments
from storage.cached_images import MAX_LISTED_IMAGES, CachedImage, ImageOrder
from storage.names import RepositoryName, parse_reference

MAX_IMAGE_TEXT_CHARACTERS: Final = 255
"""Maximum length of the query parameter `text` of `/mirror/images`."""
MAX_IMAGES_ON_A_PAGE: Final = 100
ReferenceText = Annotated[str, Field(max_length=MAX_REFERENCE_CHARACTERS, examples=["ubuntu:24.04"])]

router = management_router()


class MirrorStatus(BaseModel):
    """The state of the upstreams and of the cache.

    - `cache`: the cached content of each upstream. The last entry is for all upstreams together.
    - `fills`: the unfinished downloads from upstreams."""

    upstreams: list[UpstreamStatus]
    cache: list[CachePartResponse]
    fills: list[FillStatus]


class CachedImageResponse(BaseModel):
    """A cached image. An index and its manifests count as one image. `repository` begins with the name of the
    upstream."""

    repository: str = Field(examples=["docker.io/library/ubuntu"])
    digest: str
    tags: list[str]
    frozen_tags: list[str] = Field(description="The frozen tags among `tags`")
    manifests: int = Field(description="Number of cached manifests of the image")
    last_pulled: datetime = Field(description="When the image was last pulled or stored")
    size: int = Field(description="Total bytes of the image's cached blobs. Other images may share these blobs")

    @classmethod
    def from_stored(cls, image: CachedImage, frozen_tags: set[str]) -> Self:
        """Converts a stored image. `frozen_tags`: the frozen tags of its repository."""
        return cls(
            repository=image.repository,
            digest=image.digest,
            tags=list(image.tags),
            frozen_tags=[tag for tag in image.tags if tag in frozen_tags],
            manifests=image.manifests,
            last_pulled=models.to_datetime(image.last_pulled),
            size=image.bytes,
        )


class CachedImageList(BaseModel):
    """One part of a list of images. To get the next part, send `next` as the query parameter `after`."""

    items: list[CachedImageResponse]
    next: int | None = Field(description="null: this is the last part")
    total: int = Field(description="Number of images in the whole list")
    complete: bool = Field(
        description=f"False: more than {MAX_LISTED_IMAGES} images match, so the list does not have all of them"
    )


class ImageToRefresh(BodyModel):
    """An image to refresh."""

    reference: ReferenceText


class RefreshResponse(BaseModel):
    """The result of a refresh. Values of `outcome`:

    - `new`: the image was not cached before.
    - `unchanged`: the tag still points at its earlier digest.
    - `changed`: the tag points at a new digest.
    - `frozen`: the upstream was not asked, because the tag is frozen.
    - `cached`: the upstream was not asked, because the reference is the digest of a cached manifest.
    - `fetched-later`: the reference is the digest of a blob, and the next pull fetches the blob."""

    outcome: RefreshOutcome
    digest: str
    before: str | None = Field(description="The earlier digest if `outcome` is `changed`; otherwise null")
    held_back_until: datetime | None = Field(
        description="The time from which pulls of the tag get `digest`, unless the tag moves again: the tag has "
        "pointed at it for less than the cooldown in the settings. Pulls by digest are not delayed. null: no cooldown "
        "delays it"
    )
    served: str | None = Field(
        description="If `held_back_until` is a time: the digest that pulls of the tag get until then, or null if these "
        "pulls fail. Otherwise null"
    )
    unblocked_blobs: int = Field(
        description="Number of the image's blobs that this refresh has unblocked. A blob is blocked at an endpoint of "
        "the upstream after the endpoint has sent corrupt bytes for it"
    )

    @classmethod
    def from_result(cls, result: RefreshResult) -> Self:
        """Converts the result of a refresh."""
        return cls(
            outcome=result.outcome,
            digest=result.digest,
            before=result.before,
            held_back_until=models.to_datetime_or_none(result.held_back_until),
            served=result.served,
            unblocked_blobs=result.unblocked_blobs,
        )


class ContentToPurge(BodyModel):
    """An image whose cached content is to be deleted."""

    reference: ReferenceText
    everything: bool = Field(
        default=False, description="Delete the whole repository, and ignore the tag or digest of the reference"
    )
    force: bool = Field(default=False, description="Delete also what a frozen tag needs. The tag stays frozen")


class PurgeResponse(BaseModel):
    """The numbers of deleted tags and manifests. `size`: total bytes of the blobs that only the deleted manifests
    used."""

    tags: int
    manifests: int
    size: int
    freed_after: datetime = Field(
        description="The earliest time at which garbage collection may delete the unused blobs"
    )


class ImagesToWarm(BodyModel):
    """Images to fetch before anyone pulls them."""

    references: FailFastList[ReferenceText] = Field(min_length=1, max_length=MAX_WARMED_IMAGES)
    platforms: FailFastList[Annotated[str, Field(max_length=100)]] = Field(
        default=[],
        max_length=20,
        description="Platforms such as `linux/amd64`; `all` means every platform. Default: the platforms in the "
        "settings. If the settings name none: the platform of the registry's machine",
    )


@router.get("/mirror", tags=["mirror"])
async def read_mirror(caller: AdminCaller) -> MirrorStatus:
    """Returns the state of each upstream, the size of the cached content, and the unfinished downloads. The state of an
    upstream includes its health and the number of requests that it still accepts. This request asks no upstream."""
    upkeep = caller.upkeep
    parts = await read_cache_status(upkeep.settings, upkeep.store)
    return MirrorStatus(
        upstreams=await read_upstreams(upkeep),
        cache=[CachePartResponse.from_part(part) for part in parts],
        fills=await read_fills(upkeep.settings),
    )


@router.get("/mirror/downloads", tags=["mirror"])
async def list_downloads(caller: AdminCaller) -> list[FillStatus]:
    """Lists the unfinished downloads from upstreams."""
    return await read_fills(caller.upkeep.settings)


@router.get("/mirror/images", tags=["mirror"])
async def list_cached_images(
    caller: AdminCaller,
    upstream: Annotated[str | None, Query(description="Only images of this upstream", max_length=255)] = None,
    text: Annotated[
        str,
        Query(
            description="Only images whose repository has this text in its name", max_length=MAX_IMAGE_TEXT_CHARACTERS
        ),
    ] = "",
    order: ImageOrder = ImageOrder.SIZE,
    after: Annotated[int, Query(description="The field `next` of the previous part", ge=0, le=MAX_LISTED_IMAGES)] = 0,
    limit: Annotated[int, Query(description="Maximum number of images", ge=1, le=MAX_IMAGES_ON_A_PAGE)] = 25,
) -> CachedImageList:
    """Lists the cached images of the upstreams, by size or by last pull."""
    settings, store = caller.upkeep.settings, caller.upkeep.store
    if upstream is not None:
        check_upstream(settings, upstream)
    upstream_names = [mirrored.name for mirrored in settings.upstream if upstream in (None, mirrored.name)]
    page = await store.cached_images.images(upstream_names, text.lower(), order, after, limit)
    frozen_tags_by_repository: dict[RepositoryName, set[str]] = {}
    for image in page.images:
        if image.repository not in frozen_tags_by_repository:
            frozen_tags = await store.upstream_tags.frozen_tags_in(image.repository)
            frozen_tags_by_repository[image.repository] = {frozen.tag for frozen in frozen_tags}
    end = after + len(page.images)
    return CachedImageList(
        items=[
            CachedImageResponse.from_stored(image, frozen_tags_by_repository[image.repository]) for image in page.images
        ],
        next=end if end < page.total and page.images else None,
        total=page.total,
        complete=page.is_complete,
    )


@router.post("/mirror/refresh", tags=["mirror"])
async def refresh(caller: LoggedInCaller, body: ImageToRefresh) -> RefreshResponse:
    """Asks the upstream what a tag points at, even if the cached answer is fresh. For a digest, fetches the manifest if
    it is not cached. You have to be an admin, or have the action `admin` on the repository."""
    image = parse_reference(body.reference)
    await check_may_manage(caller, image.repository)
    return RefreshResponse.from_result(await refresh_image(caller.upkeep.router, caller.upkeep.store, image))


@router.post("/mirror/purge", tags=["mirror"])
async def purge(caller: LoggedInCaller, body: ContentToPurge) -> PurgeResponse:
    """Deletes a tag, a digest or a repository from the cache. Sends nothing to the upstream. The next pull fetches the
    content again. You have to be an admin, or have the action `admin` on the repository."""
    image, upkeep = parse_reference(body.reference), caller.upkeep
    await check_may_manage(caller, image.repository)
    result = await purge_image(
        *(upkeep.router, upkeep.store, image),
        data=upkeep.settings.data,
        by=caller.actor,
        everything=body.everything,
        force=body.force,
    )
    return PurgeResponse(
        tags=result.tags,
        manifests=result.manifests,
        size=result.size,
        freed_after=models.to_datetime(time.time() + upkeep.settings.gc.grace),
    )


@router.post("/mirror/warm", tags=["mirror"], status_code=202)
async def warm(caller: AdminCaller, body: ImagesToWarm) -> JobResponse:
    """Starts a job that fetches images from upstreams before anyone pulls them. Content that is cached already is not
    fetched again."""
    platforms = body.platforms or caller.upkeep.settings.warm.platforms
    return await queue_job(caller, WARM_KIND, check_warm_arguments(body.references, platforms))
