"""`Mirror`: an upstream's repositories, as if they were here (pull-through)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from registry.config import Upstream
from registry.mirror.blobs import START_TIMEOUT_SECONDS, MirroredBlobs
from registry.mirror.fill.fill import Fill, FillContext, Fills
from registry.mirror.fill.retry import STALL_TIMEOUT_SECONDS, BadSenders
from registry.mirror.fill.slots import ConnectionSlots
from registry.mirror.freshness import Freshness, NegativeCache
from registry.mirror.manifests import STALE_WAIT_SECONDS, MirroredManifests
from registry.mirror.prefetch import Prefetcher, PrefetchQueue
from registry.mirror.upstream_client import UnconfirmedNameUnknown, UpstreamClient
from registry.request import set_notice
from storage.access import Action
from storage.content import Actor, Descriptor, Manifest, Page, Span
from storage.errors import Denied, NameUnknown, TooManyRequests, UpstreamUnavailable
from storage.interface import BlobReader, Leases, Partials, Registry, UpstreamRecords
from storage.names import Digest, Reference, RepositoryName, Tag
from storage.patterns import ALL_NAMES, NameSet
from storage.wrappers import Call, RefusingRegistry

T = TypeVar("T")


class Mirror(RefusingRegistry):
    """The repositories of one upstream, by their stored names (`docker.io/library/ubuntu`), in `local` as far as they
    have come. Nothing can be pushed to them; a delete drops what is here.

    `clock` gives seconds since 1970; `steady` seconds of a clock that is never set. `patience` is for how many seconds
    a client waits for the upstream when there is something older to give it, `beginning` for how many until a blob
    begins to come, `persistence` for how many a blob that somebody reads may bring nothing. `aclose` ends it with its
    source.
    """

    def __init__(
        self,
        local: Registry,
        source: UpstreamClient,
        partials: Partials,
        records: UpstreamRecords,
        turns: Leases,
        settings: Upstream,
        clock: Callable[[], float] = time.time,
        steady: Callable[[], float] = time.monotonic,
        patience: float = STALE_WAIT_SECONDS,
        beginning: float = START_TIMEOUT_SECONDS,
        persistence: float = STALL_TIMEOUT_SECONDS,
    ) -> None:
        self._local = local
        self._source = source
        self._records = records
        self._name = settings.name
        freshness = Freshness(settings, clock)
        self._misses = NegativeCache(records, freshness)
        slots, suspicions = ConnectionSlots(turns, source), BadSenders(records, source, clock)
        tools = FillContext(
            *(local, source, partials, turns, slots, self._misses, suspicions, records, self.far),
            persistence=persistence,
            private=settings.private,
        )
        self._manifests = MirroredManifests(local, source, records, turns, settings, freshness, self.far, patience)
        self._fills = Fills(tools)
        ahead = PrefetchQueue(lambda *what: self._blobs.should_prefetch(*what), slots.room, self._fills.begin)
        self._prefetch = Prefetcher(settings.prefetch, ahead, lambda: not source.exhausted(), steady)
        self._blobs = MirroredBlobs(tools, records, self._fills, self._prefetch, beginning)

    def far(self, repo: RepositoryName) -> RepositoryName:
        """The name the upstream has for it. Raises NameUnknown for one that is not the upstream's."""
        own = repo.removeprefix(f"{self._name}/")
        if own == repo:
            raise NameUnknown(f"{repo} is not of {self._name}")
        return RepositoryName(own)

    async def renew(self, repo: RepositoryName, tag: Tag, *, force: bool = False) -> str | None:
        """Asks upstream about a tag that is not fresh; `force`: about any. None: what is here is what upstream has now;
        else why it may not be. Raises ManifestUnknown, and what the upstream's trouble is when nothing is here."""
        return await self._manifests.renew(repo, tag, force=force)

    @property
    def filling(self) -> Sequence[Fill]:
        """Blobs on their way in through this process."""
        return self._fills.running()

    @property
    def busy(self) -> bool:
        """Whether upstream is asked for anything, or about to be, whoever waits for it."""
        return bool(self._fills.running()) or self._prefetch.busy or self._manifests.busy

    async def aclose(self) -> None:
        """Ends what runs, in order: what nobody waits for, then the rest, then the connections. What came of blobs
        stays for the next time."""
        await self._prefetch.aclose()
        await self._fills.aclose()
        await self._blobs.aclose()
        await self._manifests.aclose()
        await self._source.aclose()

    async def resolve_manifest(self, repo: RepositoryName, reference: Reference) -> Descriptor:
        return await self._manifests.read(self._local.resolve_manifest, repo, reference)

    async def get_manifest(self, repo: RepositoryName, reference: Reference) -> Manifest:
        manifest = await self._manifests.read(self._local.get_manifest, repo, reference)
        self._prefetch.on_manifest(repo, manifest)
        return manifest

    async def resolve_blob(self, repo: RepositoryName, digest: Digest) -> Descriptor:
        return await self._blobs.resolve(repo, digest)

    async def open_blob(self, repo: RepositoryName, digest: Digest, span: Span | None = None) -> BlobReader:
        return await self._blobs.open(repo, digest, span)

    async def repositories(self, after: str | None, limit: int, within: NameSet = ALL_NAMES) -> Page[RepositoryName]:
        """Those something was pulled from."""
        prefix = f"{self._name}/"
        page = await self._local.repositories(max(after or "", prefix), limit, within)
        own = [repo for repo in page.items if repo.startswith(prefix)]
        more = page.more and len(own) == len(page.items) and (page.place or prefix).startswith(prefix)
        return Page(own, more, page.place if more else None)

    async def tags(self, repo: RepositoryName, after: str | None, limit: int) -> Page[Tag]:
        try:
            return await self._source.tags(self.far(repo), after, limit)
        except (UpstreamUnavailable, TooManyRequests, Denied, UnconfirmedNameUnknown) as error:
            try:
                page = await self._local.tags(repo, after, limit)
            except NameUnknown:
                raise error from None
            set_notice(
                f"only the tags of {repo} that were pulled before are listed, since {self._name}: {error.message}"
            )
            return page

    async def referrers(
        self, repo: RepositoryName, subject: Digest, artifact_type: str | None, after: str | None, limit: int
    ) -> Page[Descriptor]:
        try:
            return await self._source.referrers(self.far(repo), subject, artifact_type, after, limit)
        except (UpstreamUnavailable, TooManyRequests, Denied, UnconfirmedNameUnknown) as error:
            page = await self._local.referrers(repo, subject, artifact_type, after, limit)
            set_notice(f"only referrers that were pulled before are listed, since {self._name}: {error.message}")
            return page

    async def delete_blob(
        self, repo: RepositoryName, digest: Digest, *, by: Actor, even_if_referenced: bool = False
    ) -> None:
        """Also one that manifests here refer to: it is fetched again when somebody pulls it."""
        try:
            await self._local.delete_blob(repo, digest, by=by, even_if_referenced=True)
        finally:
            await self._misses.forget(repo, digest)

    async def delete_manifest(self, repo: RepositoryName, digest: Digest, *, by: Actor) -> None:
        try:
            await self._local.delete_manifest(repo, digest, by=by)
        finally:
            await self._records.forget_checks(repo)

    async def delete_tag(self, repo: RepositoryName, tag: Tag, *, by: Actor) -> None:
        try:
            await self._local.delete_tag(repo, tag, by=by)
        finally:
            await self._records.forget_checks(repo, tag)

    async def handle(self, call: Call[T]) -> T:
        """Refuses what has no method of its own here: pushes."""
        if call.action is Action.PUSH:
            raise Denied(f"{call.repo} is mirrored from {self._name}; push under another name")
        return await super().handle(call)
