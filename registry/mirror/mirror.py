"""A pull-through cache of one upstream registry, with the interface of a registry (`Mirror`).

- A *fill* is the download of one blob. All clients that request the blob share the fill.
- *Prefetching* starts fills for blobs that a client will probably request next.
- A *notice* is a text for the client in the response, for example that cached content may be out of date.
- A *frozen* tag always points at the same digest.
- A tag *moves* when the upstream points it at another digest. During the *cooldown*, a time after the move, the mirror
  serves the tag at its older digest.
- The upstream is *near its rate limit* if it accepts only few more requests.
- *Bad senders* are base URLs of the upstream that sent bytes with a wrong digest.
- The *entitlement* of a repository is its right to serve a blob that was cached for another repository of the upstream.
- A "not found" response is *unconfirmed* if possibly a proxy or firewall sent it instead of the upstream.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Final, TypeVar

from registry.config import Upstream
from registry.memory_budget import MemoryBudget
from registry.mirror.blob_sizes import BlobSizes
from registry.mirror.blobs import START_TIMEOUT_SECONDS, MirroredBlobs
from registry.mirror.entitlement import BlobEntitlement
from registry.mirror.fill.fill import Fill
from registry.mirror.fill.fill_context import FillContext
from registry.mirror.fill.fills import Fills
from registry.mirror.fill.retry import STALL_TIMEOUT_SECONDS, BadSenders
from registry.mirror.fill.slots import ConnectionSlots
from registry.mirror.freshness import Freshness, NegativeCache
from registry.mirror.manifests import STALE_WAIT_SECONDS, MirroredManifests
from registry.mirror.observer import UNOBSERVED, MirrorObserver
from registry.mirror.pass_through import new_pass_through_memory
from registry.mirror.prefetch import Prefetcher, PrefetchQueue
from registry.mirror.served_tags import ServedTags
from registry.mirror.upstream_client import (
    EndpointHealth,
    UnconfirmedManifestUnknown,
    UnconfirmedNameUnknown,
    UpstreamClient,
    UpstreamContentInvalid,
)
from registry.request import set_cache_state, set_notice
from storage.access import Action
from storage.content import Actor, Condition, Descriptor, Manifest, Page, Span
from storage.errors import (
    Denied,
    ManifestUnknown,
    NameUnknown,
    QuotaExceeded,
    RegistryError,
    StorageFailed,
    StorageFull,
    TooManyRequests,
    UpstreamUnavailable,
)
from storage.interface import BlobReader, Registry
from storage.leases import Leases
from storage.names import Digest, Reference, RepositoryName, Tag
from storage.partials import Partials
from storage.patterns import ALL_NAMES, NameSet
from storage.upstream_records import UpstreamRecords
from storage.upstream_tags import UpstreamTagMove, UpstreamTags
from storage.wrappers import Call, RefusingRegistry

T = TypeVar("T")
log = logging.getLogger("registry.mirror")

MAX_UNANSWERED_REPOSITORIES: Final = 3
"""`recheck_young_tags` ends early if the upstream gives no answer about this number of repositories in a row: the
upstream is probably down or wants fewer requests."""
MAX_REFUSED_REPOSITORIES: Final = 50
"""`recheck_young_tags` ends early if the upstream refuses requests for this number of repositories in a row: the
configured login is probably wrong, and an upstream may lock an account after many failed logins. The number is large,
because the upstream also refuses requests for repositories that it has deleted."""
_UNUSABLE_ANSWERS: Final = (UnconfirmedManifestUnknown, Denied, UpstreamContentInvalid)
"""Errors that mean: the upstream has answered, but has refused the request or sent an invalid manifest. Each counts as
a refusal for `MAX_REFUSED_REPOSITORIES`."""
_STORAGE_ERRORS: Final = (StorageFull, StorageFailed, QuotaExceeded)
"""Errors of this registry's store."""


class Mirror(RefusingRegistry):
    """The repositories of one upstream. Their names begin with the name of the upstream (`docker.io/library/ubuntu`).
    The mirror caches pulled content in the registry `local`, refuses pushes, and deletes only cached copies."""

    def __init__(
        self,
        local: Registry,
        upstream: UpstreamClient,
        partials: Partials,
        records: UpstreamRecords,
        leases: Leases,
        settings: Upstream,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        stale_wait: float = STALE_WAIT_SECONDS,
        start_timeout: float = START_TIMEOUT_SECONDS,
        stall_timeout: float = STALL_TIMEOUT_SECONDS,
        *,
        tags: UpstreamTags,
        observer: MirrorObserver = UNOBSERVED,
        pass_through_memory: MemoryBudget | None = None,
        random_number: Callable[[], float] = random.random,
    ) -> None:
        """`partials`: the store of unfinished downloads. `records`: the stored answers of the upstream, such as which
        manifests it has. `tags`: the digests at which the upstream's tags have pointed, and the frozen tags. `leases`:
        locks across processes. `observer`: receives reports about the fills. `clock`: returns seconds since 1970.
        `monotonic`: returns seconds of a monotonic clock. `stale_wait`: seconds that a client waits for the upstream
        before it gets a cached manifest. `start_timeout`: seconds that a client waits for the first byte of a blob.
        `stall_timeout`: seconds without new bytes after which the download of a blob fails. `pass_through_memory`: the
        worker's memory budget for blobs that are sent to clients without being stored; None: this mirror gets a budget
        of its own. `random_number`: returns a random number from 0 to 1."""
        self._local = local
        self._upstream = upstream
        self._records = records
        self._name = settings.name
        self.served_tags = ServedTags(tags, settings, clock, random_number)
        freshness = Freshness(settings, clock)
        self._negative_cache = NegativeCache(records, freshness)
        self._entitlement = BlobEntitlement(
            *(local, settings.name, records, self._negative_cache),
            BlobSizes(upstream, leases, self._negative_cache, self.upstream_name, monotonic),
            is_private=settings.has_private_repositories,
        )
        slots = ConnectionSlots(leases, upstream)
        context = FillContext(
            upstream=upstream,
            partials=partials,
            slots=slots,
            entitlement=self._entitlement,
            negative_cache=self._negative_cache,
            bad_senders=BadSenders(records, upstream, clock),
            to_upstream_name=self.upstream_name,
            pass_through_memory=pass_through_memory or new_pass_through_memory(),
            stall_timeout=stall_timeout,
            observer=observer,
        )
        self._manifests = MirroredManifests(
            *(local, upstream, records, leases, settings, freshness),
            self.served_tags,
            *(self.upstream_name, stale_wait),
        )
        self._fills = Fills(context)
        # A lambda, because `_blobs` does not exist yet: it needs the queue.
        queue = PrefetchQueue(
            lambda repo, blob: self._blobs.should_prefetch(repo, blob),
            slots.wait_for_prefetch_slot,
            self._fills.start_prefetch,
        )
        self._prefetch = Prefetcher(settings.prefetch, queue, lambda: not upstream.is_near_rate_limit(), monotonic)
        self._blobs = MirroredBlobs(local, self._entitlement, self._fills, self._prefetch, settings.name, start_timeout)
        self._recheck_after: UpstreamTagMove | None = None
        """The tag at which the last call of `recheck_young_tags` ended early. The next call continues after this tag.
        None: the last call did not end early, or there was no call yet."""

    def upstream_name(self, repo: RepositoryName) -> RepositoryName:
        """Returns the name that a repository has at the upstream: `library/ubuntu` for `docker.io/library/ubuntu`.
        Raises NameUnknown if `repo` does not begin with the name of this upstream."""
        upstream_name = repo.removeprefix(f"{self._name}/")
        if upstream_name == repo:
            raise NameUnknown(f"{repo} is not a repository of {self._name}")
        return RepositoryName(upstream_name)

    async def revalidate(self, repo: RepositoryName, tag: Tag, *, force: bool = False) -> str | None:
        """Asks the upstream whether the cached copy of a tag is current, and fetches the manifest if the tag has moved.
        Without `force`, does not ask about a *fresh* tag, whose time to live has not passed. Returns None if the cached
        copy is now current, otherwise a notice that says why the copy may be out of date. Raises ManifestUnknown. If
        there is no cached copy, also raises the errors of the upstream client."""
        return await self._manifests.revalidate(repo, tag, force=force)

    async def recheck_young_tags(self) -> None:
        """Asks the upstream about each *young* tag (which moved less than its cooldown ago), even if the tag is fresh.
        The mirror thus learns when the upstream moves a young tag away from a bad digest. Otherwise it could serve the
        bad digest after the cooldown.

        - Near the upstream's rate limit, does not fetch the manifests of moved tags.
        - After an error about one tag, continues with the next tag.
        - If the upstream denies access to a tag, skips the other tags of its repository, because each request can count
          as a failed login.
        - Ends early, and raises the last error, if the upstream gives no answer about `MAX_UNANSWERED_REPOSITORIES` in
          a row, or refuses requests for `MAX_REFUSED_REPOSITORIES` in a row.

        If the last call ended early, continues after the tag at which it ended. Otherwise starts at a random tag.
        With a fixed start, a process that is restarted often could end each time at the same repositories with
        errors, and would never ask about the other repositories."""
        unanswered: set[RepositoryName] = set()
        refused: set[RepositoryName] = set()
        skipped: set[RepositoryName] = set()
        logged: set[RepositoryName] = set()
        start = self._recheck_after or await self.served_tags.pick_random_move()
        async with aclosing(self.served_tags.moves_of_young_tags(start)) as moves:
            async for move in moves:
                self._recheck_after = move
                if move.repository in skipped:
                    continue
                error = await self._recheck(move.repository, move.tag)
                if error is None:
                    unanswered.clear()
                    refused.clear()
                    continue
                if move.repository not in logged:
                    logged.add(move.repository)
                    is_storage_error = isinstance(error, _STORAGE_ERRORS)
                    attempt = f"store the answer of {self._name}" if is_storage_error else f"ask {self._name}"
                    log.info("cannot %s about %s:%s: %s", attempt, move.repository, move.tag, error.message)
                if isinstance(error, Denied) and not isinstance(error, QuotaExceeded):
                    skipped.add(move.repository)
                if isinstance(error, _UNUSABLE_ANSWERS):
                    unanswered.clear()
                    refused.add(move.repository)
                else:
                    unanswered.add(move.repository)
                if len(unanswered) >= MAX_UNANSWERED_REPOSITORIES or len(refused) >= MAX_REFUSED_REPOSITORIES:
                    raise error
        self._recheck_after = None

    async def _recheck(self, repo: RepositoryName, tag: Tag) -> RegistryError | None:
        """Asks the upstream about a tag, and stores the answer. Returns the error; None if there is none, or if the
        upstream has deleted the tag."""
        try:
            await self._manifests.recheck(repo, tag)
        except RegistryError as error:
            is_deleted = isinstance(error, ManifestUnknown) and not isinstance(error, UnconfirmedManifestUnknown)
            return None if is_deleted else error
        return None

    @property
    def endpoint_health(self) -> list[EndpointHealth]:
        """The health of each endpoint (base URL) of the upstream, as this process has observed it."""
        return self._upstream.endpoint_health()

    @property
    def running_fills(self) -> Sequence[Fill]:
        """The fills that are running in this process."""
        return self._fills.list_running()

    @property
    def is_busy(self) -> bool:
        """Whether this process runs fills or requests for manifests, or has blobs queued for prefetching."""
        return bool(self._fills.list_running()) or self._prefetch.is_busy or self._manifests.is_busy

    async def aclose(self) -> None:
        """Cancels prefetching, the fills and the other requests to the upstream, and closes the upstream client. Keeps
        the stored bytes of unfinished blobs for the next start of the server."""
        await self._prefetch.aclose()
        await self._fills.aclose()
        await self._entitlement.aclose()
        await self._manifests.aclose()
        await self._upstream.aclose()

    async def resolve_manifest(self, repo: RepositoryName, reference: Reference) -> Descriptor:
        return await self._manifests.read(self._local.resolve_manifest, repo, reference)

    async def get_manifest(self, repo: RepositoryName, reference: Reference) -> Manifest:
        """Returns the manifest, from the cache or from the upstream, and queues the image's config for prefetching."""
        manifest = await self._manifests.read(self._local.get_manifest, repo, reference)
        self._prefetch.on_manifest(repo, manifest)
        return manifest

    async def resolve_blob(self, repo: RepositoryName, digest: Digest) -> Descriptor:
        return await self._blobs.resolve(repo, digest)

    async def open_blob(self, repo: RepositoryName, digest: Digest, span: Span | None = None) -> BlobReader:
        return await self._blobs.open(repo, digest, span)

    async def repositories(self, after: str | None, limit: int, within: NameSet = ALL_NAMES) -> Page[RepositoryName]:
        """Returns a page of the repositories with cached content: at most `limit` names of this upstream that sort
        after `after` and are in the set `within`."""
        prefix = f"{self._name}/"
        page = await self._local.repositories(max(after or "", prefix), limit, within)
        # If the page of `local` also has names with other prefixes, it is the last page of this upstream.
        repos = [repo for repo in page.items if repo.startswith(prefix)]
        has_more = page.more and len(repos) == len(page.items) and (page.next_after or prefix).startswith(prefix)
        return Page(repos, has_more, page.next_after if has_more else None)

    async def tags(self, repo: RepositoryName, after: str | None, limit: int) -> Page[Tag]:
        """Returns a page of the tags that the upstream has. If the upstream gives no usable answer, returns the cached
        tags and sets a notice for the client. Raises NameUnknown. If the repository is not cached, also raises the
        error of the upstream client."""
        set_cache_state("miss", self._name)
        try:
            return await self._upstream.tags(self.upstream_name(repo), after, limit)
        except (UpstreamUnavailable, TooManyRequests, Denied, UnconfirmedNameUnknown) as error:
            try:
                page = await self._local.tags(repo, after, limit)
            except NameUnknown:
                raise error from None
            set_cache_state("stale", self._name)
            set_notice(
                f"only the tags of {repo} that were pulled before are listed, because {self._name} gave no usable "
                f"answer: {error.message}"
            )
            return page

    async def referrers(
        self, repo: RepositoryName, subject: Digest, artifact_type: str | None, after: str | None, limit: int
    ) -> Page[Descriptor]:
        """Returns a page of the referrers that the upstream has: the manifests that refer to `subject`. If the upstream
        gives no usable answer, returns the cached referrers and sets a notice for the client."""
        set_cache_state("miss", self._name)
        try:
            return await self._upstream.referrers(self.upstream_name(repo), subject, artifact_type, after, limit)
        except (UpstreamUnavailable, TooManyRequests, Denied, UnconfirmedNameUnknown) as error:
            page = await self._local.referrers(repo, subject, artifact_type, after, limit)
            set_cache_state("stale", self._name)
            set_notice(
                f"only referrers that were pulled before are listed, because {self._name} gave no usable answer: "
                f"{error.message}"
            )
            return page

    async def delete_blob(
        self, repo: RepositoryName, digest: Digest, *, by: Actor, even_if_referenced: bool = False
    ) -> None:
        """Deletes the cached blob, and the upstream's cached "not found" answer about the blob. Deletes the blob even
        if cached manifests refer to it, because the next pull fetches it again: `even_if_referenced` has no effect.
        `by`: the actor that the audit log names. Raises TagFrozen if a frozen tag needs the blob."""
        await self.served_tags.check_not_frozen(repo, digest)
        try:
            await self._local.delete_blob(repo, digest, by=by, even_if_referenced=True)
        finally:
            await self._negative_cache.forget(repo, digest)

    async def delete_manifest(
        self, repo: RepositoryName, digest: Digest, *, by: Actor, restorable: bool = True
    ) -> None:
        """Deletes the cached manifest, and the recorded answers of the upstream about the repository. The manifest
        cannot be restored, because the next pull fetches it again: `restorable` has no effect. `by`: the actor that
        the audit log names. Raises TagFrozen if a frozen tag needs the manifest."""
        await self.served_tags.check_not_frozen(repo, digest)
        try:
            await self._local.delete_manifest(repo, digest, by=by, restorable=False)
        finally:
            await self._records.forget_checks(repo)

    async def delete_tag(
        self, repo: RepositoryName, tag: Tag, *, by: Actor, condition: Condition | None = None
    ) -> None:
        """Deletes the cached tag, and the recorded answer of the upstream about the tag. `by`: the actor that the audit
        log names. Raises TagFrozen if the tag is frozen, PreconditionFailed if `condition` does not hold."""
        await self.served_tags.check_not_frozen(repo, tag)
        try:
            await self._local.delete_tag(repo, tag, by=by, condition=condition)
        finally:
            await self._records.forget_checks(repo, tag)

    async def handle(self, call: Call[T]) -> T:
        """Receives the calls for which this class has no method of its own. Raises Denied for pushes, Unsupported for
        other calls."""
        if call.action is Action.PUSH:
            raise Denied(f"{call.repo} is mirrored from {self._name}; push under another name")
        return await super().handle(call)
