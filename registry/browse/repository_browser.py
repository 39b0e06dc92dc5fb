"""`RepositoryBrowser`: reads and changes the tags, images and description of a repository for the routes of `/api/v1`
and the web pages."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Final, Protocol

from registry.browse.answer_memory_limit import AnswerMemoryLimit
from registry.browse.comparison import common_platform, compare_images
from registry.browse.content_reader import ContentReader
from registry.browse.descriptions import DescriptionPages
from registry.browse.image_archive import ImageArchive, open_archive
from registry.browse.image_overview import OverviewReader
from registry.browse.manifest_details import ManifestDetails
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
from registry.browse.referrer_groups import ReferrerGroups
from registry.browse.tag_removal import TagRemover
from registry.browse.tag_rows import TagRows
from registry.client_addresses import visitor_key
from registry.memory_budget import MIB
from registry.request import RequestContext, enter_request, leave_request
from registry.visitor_limits import Limits, VisitorLimits
from storage.content import MAX_IMAGE_CONFIG_BYTES, Actor, Manifest
from storage.descriptions import Description, Descriptions
from storage.errors import BlobUnknown
from storage.interface import Registry
from storage.names import Digest, Reference, RepositoryName, Tag
from storage.retention import Retention
from storage.tag_history import TagHistory
from storage.tag_listing import TagListing, TagQuery
from storage.tag_removal import TagRemovalPlanner
from storage.tag_rules import ImmutableTags
from storage.upstream_tags import UpstreamTags

if TYPE_CHECKING:
    from registry.browse.markdown_rendering import RenderedText

_READ_LIMITS: Final = Limits(max_running=4, max_running_per_visitor=2, max_pending=200, max_pending_per_visitor=20)
"""Limits for the reads that a process runs at a time."""
_LIST_LIMITS: Final = Limits(max_running=4, max_running_per_visitor=1, max_pending=200, max_pending_per_visitor=20)
"""Limits for the lists of tags that a process reads at a time. One thread reads all lists; a list that waits for the
thread counts as running. A visitor may have only one running list, so that nobody waits for several lists of another
visitor."""
_MAX_ANSWER_BYTES: Final = 32 * MIB
"""Largest total size, in bytes of memory, of the manifests and configs that are being sent in responses."""


class ContentStore(Protocol):
    """The parts of the store that read and change the metadata database, such as the list of tags and the descriptions.
    `storage.store.stored_registry.StoredRegistry` implements this."""

    @property
    def tag_listing(self) -> TagListing: ...

    @property
    def tag_removals(self) -> TagRemovalPlanner: ...

    @property
    def tag_history(self) -> TagHistory: ...

    @property
    def descriptions(self) -> Descriptions: ...

    @property
    def retention(self) -> Retention: ...

    @property
    def upstream_tags(self) -> UpstreamTags: ...

    @property
    def immutable_tags(self) -> ImmutableTags: ...


class RepositoryBrowser:
    """Reads stored content for the principal of a request, and sends no requests to upstreams (except for `archive`).

    The parameter `request` is the context of the request that a method answers. `repo` is the stored name of a
    repository (`registry.router.Router.stored_name`). A repository is *hosted* if it is not mirrored. If the principal
    may not pull from the repository, a method raises the same errors as a read of `/v2`: Unauthorized, NameUnknown or
    ManifestUnknown.

    A process runs a limited number of reads at a time, in total and for each visitor (`visitor_of`). Further reads
    wait. If too many wait, a read raises TooManyRequests. Rendering has a limit of its own
    (`registry.ui.page_route.page_slot`).

    `answer_memory_limit`: limits the memory of the results of `raw_manifest` and `raw_config`. A route that sends such
    a result calls `AnswerMemoryLimit.hold`, which counts the bytes of the result until the client has received them."""

    def __init__(
        self,
        registry: Registry,
        live: Registry,
        store: ContentStore,
    ) -> None:
        """Both registries check the rights of the current request. `registry` reads only stored content
        (`registry.browse.stored_content`). `live` is the registry that clients use, with mirrors."""
        self._registry = registry
        self._live = live
        # The second argument is a word for the error text of TooManyRequests.
        self._reads = VisitorLimits(_READ_LIMITS, "answers")
        self._lists = VisitorLimits(_LIST_LIMITS, "lists")
        self.answer_memory_limit = AnswerMemoryLimit(_MAX_ANSWER_BYTES)
        listing, upstream_tags = store.tag_listing, store.upstream_tags
        self._reader = ContentReader(registry)
        overviews = OverviewReader(self._reader, listing)
        self._rows = TagRows(listing, overviews, upstream_tags, store.immutable_tags)
        self._details = ManifestDetails(registry, self._reader, listing, overviews, upstream_tags)
        self._referrers = ReferrerGroups(registry, self._reader, listing)
        self._descriptions = DescriptionPages(store.descriptions)
        self._immutable_tags = store.immutable_tags
        self._remover = TagRemover(live, store.tag_removals, store.retention, store.tag_history, store.immutable_tags)

    async def tag_page(
        self, request: RequestContext, repo: RepositoryName, query: TagQuery, after: str | None, limit: int
    ) -> TagRowPage:
        """Returns a page of the repository's tags. `after`: the field `next` of the page before; None: the first page.
        Raises RequestInvalid for an invalid `after`."""
        async with self._reading(request, is_list=True):
            await self._registry.tags(repo, None, 1)  # checks the right, and that the repository exists
            return await self._rows.page(repo, query, after, limit)

    async def manifest(
        self, request: RequestContext, repo: RepositoryName, reference: Reference, platform: str | None = None
    ) -> ManifestView:
        """Returns a manifest in detail. `platform`: which image of an index to show, named by its platform, such as
        `linux/arm64`, or by its digest; None: the image of a default platform. Raises ManifestUnknown, also if the
        index lists no such image."""
        async with self._reading(request):
            return await self._details.read(repo, reference, platform)

    def is_immutable(self, repo: RepositoryName, tag: Tag) -> bool:
        """Returns whether the settings forbid clients to move or delete the tag. The tag need not exist."""
        return self._immutable_tags.in_repository(repo)(tag)

    async def raw_manifest(self, request: RequestContext, repo: RepositoryName, reference: Reference) -> Manifest:
        """Returns a manifest, with its bytes as they were pushed. Raises ManifestUnknown."""
        async with self._reading(request):
            return await self._get_manifest(repo, reference)

    async def raw_config(self, request: RequestContext, repo: RepositoryName, reference: Reference) -> bytes:
        """Returns the config of an image. Raises ManifestUnknown. Raises BlobUnknown if the manifest has no config, or
        if the config is not stored or is too large to show."""
        async with self._reading(request):
            manifest = await self._get_manifest(repo, reference)
            # Parses the manifest, in a thread if it is large. The properties that are read below are then ready.
            await self._reader.summarize(manifest)
            config = manifest.config if manifest.is_readable else None
            data = None if config is None else await self._reader.read_blob(repo, config.digest, MAX_IMAGE_CONFIG_BYTES)
            if data is None:
                raise BlobUnknown(f"the config of {reference} in {repo} does not exist or cannot be shown")
            return data

    async def referrers(self, request: RequestContext, repo: RepositoryName, reference: Reference) -> ReferrersView:
        """Returns the artifacts that refer to a manifest: signatures, SBOMs, attestations and others. Raises
        ManifestUnknown."""
        async with self._reading(request):
            return await self._referrers.read_groups(repo, await self._get_manifest(repo, reference))

    async def files(self, request: RequestContext, repo: RepositoryName, reference: Reference) -> FileContents:
        """Returns the files of an artifact. The result includes the content of small text files that are stored. Raises
        ManifestUnknown."""
        async with self._reading(request):
            return await self._referrers.read_files(repo, await self._get_manifest(repo, reference))

    async def compare(
        self,
        request: RequestContext,
        repo: RepositoryName,
        base: Reference,
        other: Reference,
        platform: str | None = None,
    ) -> ComparisonView:
        """Compares two images of a repository. `platform`: for an index, the platform whose image is compared; None: a
        platform that both have. Raises ManifestUnknown in three cases:

        - A manifest does not exist.
        - A manifest has no image that is stored here.
        - `platform` is None, one manifest is an index, and the two have no platform in common."""
        async with self._reading(request):
            views = [await self._details.read(repo, reference, platform) for reference in (base, other)]
            if platform is None and (common := common_platform(*views)) is not None:
                views = [
                    await self._details.read(repo, reference, common) if view.kind == "index" else view
                    for reference, view in zip((base, other), views, strict=True)
                ]
            return compare_images(*views)

    async def archive(
        self,
        request: RequestContext,
        repo: RepositoryName,
        reference: Reference,
        platform: str | None,
        name: str,
    ) -> ImageArchive:
        """Returns an image as a tar archive for `docker load`. The caller has to read the archive while `request` is
        the current request (`as_current_request`). A mirror fetches content that is not cached. The parameters and the
        errors are those of `registry.browse.image_archive.open_archive`."""
        with as_current_request(request):
            return await open_archive(self._live, repo, reference, platform, name)

    async def stored_description(self, request: RequestContext, repo: RepositoryName) -> Description | None:
        """Returns the description of a repository, without HTML; None if nobody has written one."""
        async with self._reading(request):
            await self._registry.tags(repo, None, 1)  # checks the right, and that the repository exists
            return await self._descriptions.read(repo)

    async def rendered_description(
        self, request: RequestContext, repo: RepositoryName, top_heading: int = 1
    ) -> DescriptionView:
        """Returns the description of a repository, as text and as HTML. `top_heading`: the level of the highest
        headings in the HTML."""
        description = await self.stored_description(request, repo)
        return await self._descriptions.view(repo, description, visitor_of(request), top_heading)

    async def put_description(
        self,
        request: RequestContext,
        repo: RepositoryName,
        text: str,
        revision: int | None,
        by: Actor,
        top_heading: int = 1,
    ) -> DescriptionView:
        """Replaces the description of a repository; an empty text removes it. `revision`: the revision that the visitor
        has edited; None: the revision is not checked. `top_heading`: as for `rendered_description`. The repository has
        to be hosted, and the caller has checked the rights to push to it and to pull from it. Raises RequestInvalid if
        the text is too long or is not UTF-8, and PreconditionFailed if the description has another revision than
        `revision`."""
        return await self._descriptions.put(repo, text, revision, by, visitor_of(request), top_heading)

    async def preview_description(self, request: RequestContext, text: str, top_heading: int = 1) -> RenderedText:
        """Renders `text` as `rendered_description` renders a stored description. Raises RequestInvalid if the text is
        too long or is not UTF-8."""
        return await self._descriptions.preview(text, visitor_of(request), top_heading)

    async def plan_removal(self, request: RequestContext, repo: RepositoryName, tags: Sequence[Tag]) -> RemovalPlanView:
        """Returns what a removal of these tags, at most `storage.tag_removal.MAX_REMOVED_TAGS`, would remove. `repo`
        has to be hosted."""
        async with self._reading(request, is_list=True):
            await self._registry.tags(repo, None, 1)  # checks the right, and that the repository exists
            return await self._remover.plan(repo, tags)

    async def remove_tags(
        self,
        request: RequestContext,
        repo: RepositoryName,
        tags: Sequence[Tag],
        by: Actor,
        expected: Mapping[Tag, Digest] | None = None,
    ) -> RemovedTags:
        """Removes tags, at most MAX_REMOVED_TAGS, and the manifests that are unused afterwards. `expected`: the
        expected digests, by tag; a tag that points at another digest is not removed. `repo` has to be hosted. The
        principal needs the rights to delete and to pull. The result also lists the tags that could not be removed.
        Raises Unauthorized, NameUnknown. After a cancellation, some of the tags may be removed."""
        with as_current_request(request):
            await self._registry.tags(repo, None, 1)  # checks the right to pull
            return await self._remover.remove(repo, tags, expected or {}, by)

    async def restore_tags(self, repo: RepositoryName, tags: Sequence[tuple[Tag, Digest]], by: Actor) -> RestoredTags:
        """Restores removed tags, so that they point at these digests again. `repo` has to be hosted, and the caller has
        checked the rights to push to it and to pull from it."""
        return await self._remover.restore(repo, tags, by)

    @asynccontextmanager
    async def _reading(self, request: RequestContext, *, is_list: bool = False) -> AsyncIterator[None]:
        """Waits for a slot to read for the visitor, and holds the slot. Inside the `async with` block, `request` is the
        current request. `is_list`: the block reads a list of tags. Raises TooManyRequests."""
        visitor = visitor_of(request)
        async with AsyncExitStack() as slots:
            if is_list:
                await slots.enter_async_context(self._lists.slot(visitor))
            await slots.enter_async_context(self._reads.slot(visitor))
            with as_current_request(request):
                yield

    async def _get_manifest(self, repo: RepositoryName, reference: Reference) -> Manifest:
        """Returns the stored manifest that a pull of `reference` would get. A *frozen* tag stays at one digest in this
        registry, even if it moves at the upstream, so a pull of a frozen tag gets the manifest with that digest."""
        return await self._registry.get_manifest(
            repo, await self._details.find_frozen_digest(repo, reference) or reference
        )


@contextmanager
def as_current_request(request: RequestContext) -> Iterator[None]:
    """Makes `request` the current request inside the `with` block, so that the registry checks the rights of its
    principal."""
    token = enter_request(request)
    try:
        yield
    finally:
        leave_request(token)


def visitor_of(request: RequestContext) -> str:
    """Returns the text that identifies a visitor in limits: the name of the account, or the network of an anonymous
    client."""
    principal = request.principal
    return visitor_key(None if principal.is_anonymous else principal.name, request.address)
