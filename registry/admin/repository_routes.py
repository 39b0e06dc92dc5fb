"""The routes below `/api/v1/repositories/{name}` that show and change the content of a repository. The docstrings of
the routes are the descriptions in the OpenAPI document.

The name of a repository in the path may contain slashes, and even a segment such as `/tag-list`. The method and the
last segment of the path therefore determine the route. The name may be a short form of the *stored name*, under which
the content is stored: `ubuntu` can stand for `docker.io/library/ubuntu`.

The routes show only content that this registry stores. Only the download of an image sends requests to the upstream of
a mirrored repository.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import Depends, Path, Query, Request, Response
from pydantic import Field

from registry.admin.archive_response import ArchiveResponse, InMemoryResponse
from registry.admin.body_model import BodyModel, FailFastList, max_entries
from registry.admin.caller import AnyCaller
from registry.admin.management_router import management_router
from registry.admin.repository_body_routes import DeleteRoute, LargeDeleteRoute, LargePushRoute
from registry.admin.repository_rights import (
    check_may_download,
    require_deletable,
    require_pushable,
    require_readable,
)
from registry.admin.tag_routes import PathRepository
from registry.browse.models import (
    ComparisonView,
    DescriptionView,
    FileContents,
    ManifestView,
    ReferrersView,
    RemovalPlanView,
    RemovedTags,
    RestoredTags,
    TagRowPage,
)
from registry.browse.tag_rows import MAX_TAG_TEXT_CHARACTERS
from registry.http.query import MAX_NUMBER
from storage.names import Digest, Reference, Tag, as_reference
from storage.tag_listing import MAX_PAGE_TAGS, TagOrder, TagQuery
from storage.tag_removal import MAX_REMOVED_TAGS

router = management_router()
_plan_router = management_router(DeleteRoute)
_removal_router = management_router(LargeDeleteRoute)
_push_router = management_router(LargePushRoute)
"""Routers for requests with a body. They check a right before the body is received: `_plan_router` and
`_removal_router` the right to delete, `_push_router` the right to push. `_removal_router` and `_push_router` accept
large bodies."""


async def path_reference(reference: Annotated[str, Path(examples=["v1"], max_length=200)]) -> Reference:
    """Returns the tag or digest in the path. Raises TagInvalid, DigestInvalid."""
    return as_reference(reference)


PathReference = Annotated[Reference, Depends(path_reference)]


@router.get("/repositories/{name:path}/tag-list", tags=["repositories"])
async def list_tags(
    caller: AnyCaller,
    name: PathRepository,
    text: Annotated[
        str, Query(description="Only tags whose name contains this text", max_length=MAX_TAG_TEXT_CHARACTERS)
    ] = "",
    order: Annotated[
        TagOrder,
        Query(description="`version`: `1.9` comes before `1.10`. `size`: if more than 2000 tags match, order by name"),
    ] = TagOrder.NAME,
    descending: Annotated[bool, Query(description="Reverses the order")] = False,
    referrer_tags: Annotated[
        bool,
        Query(
            description="Also lists tags such as `sha256-….sig`, which belong to the image with the digest in the tag"
        ),
    ] = False,
    after: Annotated[str | None, Query(description="The field `next` of the previous page", max_length=200)] = None,
    limit: Annotated[int, Query(description="Maximum number of tags", ge=1, le=MAX_PAGE_TAGS)] = 50,
) -> TagRowPage:
    """Lists the tags of a repository, and the manifests at which they point. Needs `pull` on the repository."""
    stored_name = await require_readable(caller, name)
    query = TagQuery(text, order, descending, referrer_tags)
    return await caller.repository_browser.tag_page(caller.context_for(stored_name), stored_name, query, after, limit)


@router.get("/repositories/{name:path}/manifests/{reference}/details", tags=["repositories"])
async def read_manifest(
    caller: AnyCaller,
    name: PathRepository,
    reference: PathReference,
    platform: Annotated[
        str | None, Query(description="For an index: the platform or the digest of the image to show", max_length=200)
    ] = None,
) -> ManifestView:
    """Shows a manifest in detail: the platforms of an index, and the layers and the config of an image. Needs `pull` on
    the repository."""
    stored_name = await require_readable(caller, name)
    return await caller.repository_browser.manifest(caller.context_for(stored_name), stored_name, reference, platform)


@router.get("/repositories/{name:path}/manifests/{reference}/raw", tags=["repositories"], response_class=Response)
async def read_raw_manifest(caller: AnyCaller, name: PathRepository, reference: PathReference) -> Response:
    """Returns the bytes of a manifest as they were pushed. Needs `pull` on the repository."""
    stored_name = await require_readable(caller, name)
    manifest = await caller.repository_browser.raw_manifest(caller.context_for(stored_name), stored_name, reference)
    headers = {"Docker-Content-Digest": manifest.digest}
    return InMemoryResponse(manifest.body, caller.repository_browser.answer_memory_limit, caller.visitor_key, headers)


@router.get("/repositories/{name:path}/manifests/{reference}/config", tags=["repositories"], response_class=Response)
async def read_raw_config(caller: AnyCaller, name: PathRepository, reference: PathReference) -> Response:
    """Returns the bytes of an image's config as they were pushed. The image must be for one platform. Needs `pull` on
    the repository."""
    stored_name = await require_readable(caller, name)
    data = await caller.repository_browser.raw_config(caller.context_for(stored_name), stored_name, reference)
    return InMemoryResponse(data, caller.repository_browser.answer_memory_limit, caller.visitor_key)


@router.get("/repositories/{name:path}/manifests/{reference}/referrers", tags=["repositories"])
async def list_referrers(caller: AnyCaller, name: PathRepository, reference: PathReference) -> ReferrersView:
    """Lists the signatures, SBOMs, attestations and other artifacts that refer to a manifest, in groups by artifact
    type. Also lists artifacts under cosign's old tags, and attestations that BuildKit puts into an index. Needs `pull`
    on the repository."""
    stored_name = await require_readable(caller, name)
    return await caller.repository_browser.referrers(caller.context_for(stored_name), stored_name, reference)


@router.get("/repositories/{name:path}/manifests/{reference}/files", tags=["repositories"])
async def read_files(caller: AnyCaller, name: PathRepository, reference: PathReference) -> FileContents:
    """Shows the files of an artifact, such as an SBOM, with the text of small files. Needs `pull` on the repository."""
    stored_name = await require_readable(caller, name)
    return await caller.repository_browser.files(caller.context_for(stored_name), stored_name, reference)


@router.get("/repositories/{name:path}/comparison", tags=["repositories"])
async def compare_manifests(
    caller: AnyCaller,
    name: PathRepository,
    base: Annotated[str, Query(description="A tag or digest", max_length=200, examples=["v1"])],
    other: Annotated[str, Query(description="A tag or digest", max_length=200, examples=["v2"])],
    platform: Annotated[
        str | None,
        Query(description="For indexes: the platform to compare. Default: a platform of both indexes", max_length=200),
    ] = None,
) -> ComparisonView:
    """Compares two images of a repository: which layers they share, and how their configs differ. Needs `pull` on the
    repository."""
    stored_name = await require_readable(caller, name)
    context = caller.context_for(stored_name)
    return await caller.repository_browser.compare(
        context, stored_name, as_reference(base), as_reference(other), platform
    )


class TagsToRemove(BodyModel):
    """Tags of a repository."""

    tags: FailFastList[str] = Field(min_length=1, max_length=MAX_REMOVED_TAGS, examples=[["v1", "v2"]])


class ExpectedTagsToRemove(TagsToRemove):
    """Tags of a repository, and what they are expected to point at."""

    digests: Annotated[dict[str, str], max_entries(MAX_REMOVED_TAGS)] = Field(
        default_factory=dict,
        max_length=MAX_REMOVED_TAGS,
        description="For some or all of the tags: the digest that the plan has shown. A tag that now points at another "
        "digest is not removed",
        examples=[{"v1": "sha256:" + 64 * "0"}],
    )


class TagToRestore(BodyModel):
    """A removed tag, and the digest at which it pointed."""

    tag: str = Field(examples=["v1"])
    digest: str


class TagsToRestore(BodyModel):
    """The field `removed` of the response to a removal."""

    # To undo a removal, a client sends the list in the field `removed` back as `tags`.
    # A removal deletes up to MAX_REMOVED_TAGS requested tags. It then deletes referrer tags (such as `sha256-….sig`) in
    # three rounds of up to MAX_REMOVED_TAGS.
    tags: FailFastList[TagToRestore] = Field(min_length=1, max_length=4 * MAX_REMOVED_TAGS)


@_plan_router.post("/repositories/{name:path}/tag-removal-plan", tags=["repositories"])
async def plan_tag_removal(caller: AnyCaller, name: PathRepository, body: TagsToRemove) -> RemovalPlanView:
    """Shows what a removal of these tags would remove. Changes nothing. Needs `delete` and `pull` on the repository."""
    stored_name = await require_deletable(caller, name)
    return await caller.repository_browser.plan_removal(
        caller.context_for(stored_name), stored_name, [Tag(tag) for tag in body.tags]
    )


@_removal_router.post("/repositories/{name:path}/tag-removal", tags=["repositories"])
async def remove_tags(caller: AnyCaller, name: PathRepository, body: ExpectedTagsToRemove) -> RemovedTags:
    """Removes these tags, and the images that are then unused. Immutable tags stay. Until garbage collection deletes
    the images, a request to `tag-restoration` can restore tags and images. Needs `delete` and `pull` on the
    repository."""
    stored_name = await require_deletable(caller, name)
    tags = [Tag(tag) for tag in body.tags]
    expected = {Tag(tag): Digest(digest) for tag, digest in body.digests.items()}
    return await caller.repository_browser.remove_tags(
        caller.context_for(stored_name), stored_name, tags, caller.actor, expected
    )


@_push_router.post("/repositories/{name:path}/tag-restoration", tags=["repositories"])
async def restore_tags(caller: AnyCaller, name: PathRepository, body: TagsToRestore) -> RestoredTags:
    """Undoes a removal of tags: restores the removed images, and points each tag at its digest. Does not change a tag
    that exists again. Needs `push` and `pull` on the repository."""
    stored_name = await require_pushable(caller, name)
    tags = [(Tag(entry.tag), Digest(entry.digest)) for entry in body.tags]
    return await caller.repository_browser.restore_tags(stored_name, tags, caller.actor)


@router.get("/repositories/{name:path}/manifests/{reference}/archive", tags=["repositories"], response_class=Response)
async def download_image(
    request: Request,
    caller: AnyCaller,
    name: PathRepository,
    reference: PathReference,
    platform: Annotated[
        str | None, Query(description="For an index: the platform or the digest of the image", max_length=200)
    ] = None,
) -> Response:
    """Downloads an image of one platform as a tar archive for `docker load`, which is also an OCI image layout. A
    client can fetch the rest of an interrupted download with Range and If-Range. Needs `pull` on the repository. The
    setting `downloads.allow` says who may download."""
    stored_name = await require_readable(caller, name)
    check_may_download(caller)
    context = caller.context_for(stored_name)
    open_archive = partial(caller.repository_browser.archive, context, stored_name, reference, platform, name)
    return ArchiveResponse(open_archive, context, request.headers, caller.downloads)


class NewDescription(BodyModel):
    """The description of a repository."""

    text: str = Field(
        description="Markdown, up to 256 KiB. An empty text removes the description", examples=["# Our app"]
    )
    revision: int | None = Field(
        default=None,
        ge=0,
        le=MAX_NUMBER,
        description="The revision of the description that you have edited. If the revision is now another one, the "
        "response is 412. Null: the revision is not checked",
    )


@router.get("/repositories/{name:path}/description", tags=["repositories"])
async def read_description(caller: AnyCaller, name: PathRepository) -> DescriptionView:
    """Shows the description of a repository. Needs `pull` on the repository."""
    stored_name = await require_readable(caller, name)
    return await caller.repository_browser.rendered_description(caller.context_for(stored_name), stored_name)


@_push_router.put("/repositories/{name:path}/description", tags=["repositories"])
async def put_description(caller: AnyCaller, name: PathRepository, body: NewDescription) -> DescriptionView:
    """Replaces the description of a repository. Needs `push` and `pull` on the repository."""
    stored_name = await require_pushable(caller, name)
    return await caller.repository_browser.put_description(
        caller.context_for(stored_name), stored_name, body.text, body.revision, caller.actor
    )


router.routes.extend((*_plan_router.routes, *_removal_router.routes, *_push_router.routes))
