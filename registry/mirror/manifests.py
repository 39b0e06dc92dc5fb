"""Serves manifests of an upstream registry (`MirroredManifests`).

The manifests are cached in the local registry. If a manifest is not cached, or the cached copy may be out of date, the
upstream is asked.

- A *flight* is a task that asks the upstream about one manifest. Clients of this process that need the same manifest at
  the same time share a flight.
- After an answer of the upstream, a tag is *fresh* for its time to live, then *stale* for the same time, and then
  expired (`Freshness`).
- The upstream is *near its rate limit* if it accepts only few more requests.
- A *notice* tells the client why the manifest in the response may be out of date.
- A *frozen* tag is always served at the same digest.
- A *cooldown* delays moves of a tag: the mirror serves the tag at an older digest until the tag has pointed at the new
  digest for some time.
- A *lease* is a lock across all processes.
- A `ShareScope` counts large manifests from the upstream in the memory budget until its `with` block ends.
- `UnconfirmedManifestUnknown`: a response says that the manifest does not exist, but the manifest may exist.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Final, TypeVar

from registry.config import Upstream, format_duration
from registry.memory_budget import ShareScope
from registry.mirror.freshness import Freshness, Verdict
from registry.mirror.served_tags import ServedTags, frozen_notice
from registry.mirror.upstream_client import UnconfirmedManifestUnknown, UpstreamClient
from registry.request import set_cache_state, set_notice
from registry.single_flight import SingleFlight, wait_for_outcome
from storage.content import MIRROR_ACTOR, Descriptor, Manifest, UpstreamCheck
from storage.errors import (
    Denied,
    ManifestUnknown,
    RegistryError,
    StorageFailed,
    StorageFull,
    TooManyRequests,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from storage.interface import Registry
from storage.leases import Leases
from storage.names import Digest, Reference, RepositoryName, Tag
from storage.upstream_records import UpstreamRecords

log = logging.getLogger("registry.mirror")

STALE_WAIT_SECONDS: Final = 3.0
"""If the manifest is cached, a client waits at most this long for the upstream, and then gets the cached copy."""
_FALLBACK_ERRORS: Final = (
    *(UnconfirmedManifestUnknown, Denied, UpstreamUnavailable, TooManyRequests),
    *(StorageFull, StorageFailed),
)
"""Errors after which a cached copy is served: the upstream gave no usable answer, or the answer cannot be stored."""
T = TypeVar("T")
LocalLookup = Callable[[RepositoryName, Reference], Awaitable[T]]
"""A method of the local registry that looks up a manifest, and raises ManifestUnknown if the manifest is not stored."""
ToUpstreamName = Callable[[RepositoryName], RepositoryName]
"""Returns the name that a repository has at the upstream."""


class MirroredManifests:
    """Implements the manifest reads of `Mirror` for one upstream."""

    def __init__(
        self,
        local: Registry,
        upstream: UpstreamClient,
        records: UpstreamRecords,
        leases: Leases,
        settings: Upstream,
        freshness: Freshness,
        served_tags: ServedTags,
        to_upstream_name: ToUpstreamName,
        stale_wait: float = STALE_WAIT_SECONDS,
    ) -> None:
        """`local`: the registry in which the mirror stores manifests. `records`: the recorded answers of the upstream.
        `served_tags`: decides at which digest a frozen tag or a tag with a cooldown is served. `stale_wait`: see
        `STALE_WAIT_SECONDS`."""
        self._local = local
        self._upstream = upstream
        self._records = records
        self._leases = leases
        self._name = settings.name
        self._freshness = freshness
        self._served_tags = served_tags
        self._to_upstream_name = to_upstream_name
        self._stale_wait = stale_wait
        self._flights: SingleFlight[str | None] = SingleFlight()
        """The running flights. A flight returns a notice, or None if the manifest in the local registry is current."""

    async def read(self, look_up: LocalLookup[T], repo: RepositoryName, reference: Reference) -> T:
        """Returns the result of `look_up` for the manifest. `Freshness` decides whether this method asks the upstream
        before it returns, in the background, or not at all. If the tag is frozen, or a cooldown holds it back at an
        older digest, the client gets a notice. Raises ManifestUnknown, and Denied if the cooldown does not allow any
        digest of the tag yet. If the manifest is not cached, also raises the errors of the upstream client."""
        if isinstance(reference, Digest):
            with suppress(ManifestUnknown):
                result = await look_up(repo, reference)
                set_cache_state("hit", self._name)
                return result
        elif (frozen := await self._served_tags.find_frozen_tag(repo, reference)) is not None:
            result = await self.read(look_up, repo, frozen.digest)
            set_notice(frozen_notice(frozen))
            return result
        verdict = self._freshness.judge(reference, await self._records.last_check(repo, reference))
        set_cache_state("stale" if verdict is Verdict.STALE else "hit", self._name)
        if verdict is Verdict.MISSING:
            raise ManifestUnknown(f"{self._name} does not have this manifest; this answer is cached for a short time")
        if verdict in (Verdict.FRESH, Verdict.STALE):
            with suppress(ManifestUnknown):
                result = await self._look_up(look_up, repo, reference)
                if verdict is Verdict.STALE and not self._upstream.is_near_rate_limit():
                    with suppress(UpstreamUnavailable):  # raised only when the server is stopping
                        self._start_flight(repo, reference)
                return result
        set_cache_state("miss", self._name)
        try:
            notice = await self._ask(repo, reference)
        except _FALLBACK_ERRORS as error:
            if isinstance(reference, Digest) or not self._served_tags.cooldown(repo, reference):
                raise
            # The tag is not cached, but an older manifest that the cooldown allows may be cached.
            with suppress(RegistryError):
                notice = f"asking {self._name} failed: {error.message}"
                return await self._look_up(look_up, repo, reference, notice)
            raise
        try:
            return await self._look_up(look_up, repo, reference, notice)
        except ManifestUnknown:
            # The cached copy may have been evicted while the upstream was asked. If so, fetches the manifest again.
            if await self._find_cached(repo, reference) is None:
                notice = await self._ask(repo, reference)
        return await self._look_up(look_up, repo, reference, notice)

    async def _look_up(
        self, look_up: LocalLookup[T], repo: RepositoryName, reference: Reference, notice: str | None = None
    ) -> T:
        """Returns the result of `look_up` for the manifest. For a tag with a cooldown, looks up the digest at which the
        tag is served. The client gets `notice`, and a sentence about the cooldown if the cooldown holds the tag back.
        Raises the errors of `read`."""
        # `choice.candidates` are the digests that the cooldown allows, newest first. `choice` is None if the tag has no
        # cooldown, or if the mirror has no record of the tag.
        if isinstance(reference, Digest):
            result = await look_up(repo, reference)
        else:
            choice = await self._served_tags.choose(repo, reference, self._find_cached)
            if choice is None:
                result = await look_up(repo, reference)
            elif not choice.candidates:
                raise self._served_tags.cooldown_refusal(repo, reference, choice)
            else:
                result, fallback_notice = await self._look_up_first(look_up, repo, choice.candidates)
                cooldown_notice = self._served_tags.cooldown_notice(repo, reference, choice)
                notice = "; ".join(filter(None, (cooldown_notice, fallback_notice, notice))) or None
        if notice is not None:
            set_notice(notice)
        return result

    async def _look_up_first(
        self, look_up: LocalLookup[T], repo: RepositoryName, digests: Sequence[Digest]
    ) -> tuple[T, str | None]:
        """Returns the result of `look_up` for a digest, and a notice or None.

        - If the manifest of the first digest is cached or can be fetched: the result for the first digest, and None.
        - If the fetch fails: the result for the next digest whose manifest is cached, and a notice about the failure.
          Raises the error of the fetch if none of the manifests is cached."""
        try:
            return await self.read(look_up, repo, digests[0]), None
        except RegistryError as error:
            for digest in digests[1:]:
                with suppress(ManifestUnknown):
                    return await look_up(repo, digest), f"{digests[0]} cannot be fetched: {error.message}"
            raise

    async def revalidate(self, repo: RepositoryName, tag: Tag, *, force: bool = False) -> str | None:
        """For a frozen tag, returns None and does not ask the upstream. Otherwise asks the upstream about the tag,
        unless the tag is fresh and cached. With `force`, asks even if the tag is fresh or the upstream is near its
        rate limit. Returns None if the cached copy is now current, or a notice if the copy may be out of date. Raises
        ManifestUnknown. If the tag is not cached, also raises the errors of the upstream client."""
        if await self._served_tags.find_frozen_tag(repo, tag) is not None:
            return None
        verdict = self._freshness.judge(tag, await self._records.last_check(repo, tag))
        if verdict is Verdict.FRESH and not force and await self._find_cached(repo, tag) is not None:
            return None
        # `force` is part of the key, because a flight without `force` may end without asking the upstream.
        return await self._flights.run((repo, tag, force), lambda: self._ask_under_lease(repo, tag, force=force))

    async def recheck(self, repo: RepositoryName, tag: Tag) -> None:
        """Asks the upstream about a tag, even if the tag is fresh. Records the digest at which the tag points, because
        the cooldown needs this record. Fetches the manifest if the tag has moved or is not cached. Does nothing for a
        frozen tag. Raises ManifestUnknown and the errors of the upstream client, even if the tag is cached.

        While the upstream is near its rate limit, sends only a HEAD request, which Docker Hub does not count, and
        fetches no manifest. Sends no request if the tag is not cached and the last recorded answer was that the
        upstream does not have the tag."""
        if await self._served_tags.find_frozen_tag(repo, tag) is None:
            await self._flights.run((repo, tag, "recheck"), lambda: self._recheck_under_lease(repo, tag))

    @property
    def is_busy(self) -> bool:
        """Whether a flight is running."""
        return len(self._flights) > 0

    async def aclose(self) -> None:
        """Cancels the running flights."""
        await self._flights.aclose()

    def _start_flight(self, repo: RepositoryName, reference: Reference) -> asyncio.Task[str | None]:
        """Returns the running flight for the manifest, or starts one. The flight continues even if no client waits for
        its result."""
        return self._flights.start((repo, reference), lambda: self._ask_under_lease(repo, reference))

    async def _ask(self, repo: RepositoryName, reference: Reference) -> str | None:
        """Joins or starts a flight and waits until the flight ends. If the manifest is cached, waits for at most
        `stale_wait` seconds, after which the flight continues in the background. Returns a notice if the cached copy
        may be out of date, otherwise None. Sets the cache state of the request (`set_cache_state`). Raises the error of
        the flight."""
        flight = self._flights.join((repo, reference), lambda: self._ask_under_lease(repo, reference))
        try:
            cached = await self._find_cached(repo, reference)
            if cached is not None:
                await asyncio.wait({flight}, timeout=self._stale_wait)
                if not flight.done():
                    # Without this call, the flight could be cancelled when no client waits for it.
                    self._start_flight(repo, reference)
                    set_cache_state("stale", self._name)
                    check = await self._records.last_check(repo, reference)
                    return self._outdated_notice(repo, reference, check, f"{self._name} is slow to answer")
            notice = await wait_for_outcome(flight)
        finally:
            self._flights.leave(flight)
            # The traceback of the flight's error refers to this frame. A reference from this frame to the flight would
            # make a cycle, which stays in memory until Python's garbage collector runs.
            del flight
        if notice is not None:
            set_cache_state("stale", self._name)
        elif cached is not None and await self._find_cached(repo, reference) == cached:
            set_cache_state("revalidated", self._name)
        return notice

    async def _find_cached(self, repo: RepositoryName, reference: Reference) -> Descriptor | None:
        """Returns the descriptor of the cached manifest, or None if the manifest is not cached."""
        try:
            return await self._local.resolve_manifest(repo, reference)
        except ManifestUnknown:
            return None

    async def _ask_under_lease(self, repo: RepositoryName, reference: Reference, *, force: bool = False) -> str | None:
        """Asks the upstream about the manifest and updates the cached copy. Returns None if the cached copy is now
        current, otherwise a notice.

        A lease lets one process at a time ask about the manifest. After a wait for the lease, the previous holder may
        have updated the records and the cache. Sends no request in these cases, unless `force` is true:

        - The manifest is cached, and `reference` is a digest.
        - The manifest is cached, and the last recorded answer is fresh or was recorded since this call began.
        - The recorded answer is that the upstream does not have the manifest: raises ManifestUnknown.
        - This process waited for the lease longer than `stale_wait`, and the manifest is still not cached: raises
          UpstreamTimeout, because its clients have already waited for the request of the other process."""
        called_at, wait_started_at = self._freshness.now(), time.monotonic()
        async with self._leases.take(f"manifest {repo} {reference}") as has_waited:
            # `has_waited` is False if the time passed only because this process is slow. It may then ask the upstream.
            has_waited_long = has_waited and time.monotonic() - wait_started_at > self._stale_wait
            check = await self._records.last_check(repo, reference)
            cached = await self._find_cached(repo, reference)
            verdict = self._freshness.judge(reference, check)
            checked_meanwhile = check is not None and check.found and called_at < check.at <= self._freshness.now()
            if verdict is Verdict.MISSING and not force:
                raise ManifestUnknown(f"{self._name} does not have this manifest")
            is_current = checked_meanwhile or verdict is Verdict.FRESH or isinstance(reference, Digest)
            if cached is not None and is_current and not force:
                return None
            if cached is None or isinstance(reference, Digest):
                if has_waited_long and not force:
                    raise UpstreamTimeout(f"{self._name} does not answer in time")
                await self._fetch_new(repo, reference)
                return None
            return await self._revalidate_tag(repo, reference, cached, check, force=force)

    async def _recheck_under_lease(self, repo: RepositoryName, tag: Tag) -> None:
        """Does the work of `recheck`, in one process at a time."""
        async with self._leases.take(f"manifest {repo} {tag}"):
            cached = await self._find_cached(repo, tag)
            may_fetch = not self._upstream.is_near_rate_limit()
            if cached is None and may_fetch:
                await self._fetch_new(repo, tag)
                return
            if cached is None:
                check = await self._records.last_check(repo, tag)
                if check is not None and not check.found:
                    # After a 404 to HEAD, `self._upstream` would send a GET request, which the rate limit counts.
                    return
            try:
                await self._ask_about_tag(repo, tag, cached, may_fetch=may_fetch)
            except UnconfirmedManifestUnknown:
                raise
            except ManifestUnknown:
                await self._delete_tag(repo, tag)
                raise

    async def _fetch_new(self, repo: RepositoryName, reference: Reference) -> None:
        """Fetches and stores a manifest that is not cached."""
        with ShareScope() as memory:
            try:
                manifest = await self._upstream.get_manifest(self._to_upstream_name(repo), reference, memory)
            except UnconfirmedManifestUnknown:  # not recorded, because the answer may come from a proxy
                raise
            except ManifestUnknown:
                await self._record_check(repo, reference, found=False)
                raise
            await self._store(repo, reference, manifest)

    async def _revalidate_tag(
        self, repo: RepositoryName, tag: Tag, cached: Descriptor, check: UpstreamCheck | None, *, force: bool
    ) -> str | None:
        """Asks the upstream at which digest the tag points, and fetches the manifest if the tag has moved. Returns None
        if the cached copy is now current. Returns a notice if the upstream is near its rate limit (unless `force`
        is true), if the upstream gave no usable answer, or if the manifest cannot be stored. Raises ManifestUnknown if
        the upstream has deleted the tag. `cached`: the manifest at which the cached tag points. `check`: the last
        recorded answer of the upstream."""
        if self._upstream.is_near_rate_limit() and not force:
            return self._outdated_notice(repo, tag, check, f"few requests are left at {self._name}")
        try:
            await self._ask_about_tag(repo, tag, cached)
        except _FALLBACK_ERRORS as error:
            notice = self._outdated_notice(repo, tag, check, f"asking {self._name} failed: {error.message}")
            log.warning("%s", notice)
            return notice
        except ManifestUnknown:
            await self._delete_tag(repo, tag)
            raise
        return None

    async def _ask_about_tag(
        self, repo: RepositoryName, tag: Tag, cached: Descriptor | None, *, may_fetch: bool = True
    ) -> None:
        """Asks the upstream with a HEAD request at which digest the tag points, and records the digest for the
        cooldown. If `cached` has another digest, and `may_fetch` is True, fetches and stores the manifest. Raises the
        errors of the upstream client and of the local registry."""
        at_upstream = await self._upstream.resolve_manifest(self._to_upstream_name(repo), tag)
        await self._served_tags.record_sighting(repo, tag, at_upstream.digest, cached)
        if cached is not None and at_upstream.digest == cached.digest:
            await self._record_check(repo, tag, found=True)
        elif may_fetch:
            with ShareScope() as memory:
                await self._store(repo, tag, await self._fetch_moved(repo, tag, at_upstream.digest, memory), cached)

    async def _fetch_moved(self, repo: RepositoryName, tag: Tag, digest: Digest, memory: ShareScope) -> Manifest:
        """Returns the manifest `digest`, at which the tag points at the upstream, from the local registry or from the
        upstream. If neither has this manifest, fetches the tag, which may have moved again, and returns its manifest.
        `memory`: counts a manifest from the upstream in the memory budget (`UpstreamClient.get_manifest`)."""
        with suppress(ManifestUnknown):
            return await self._local.get_manifest(repo, digest)
        try:
            return await self._upstream.get_manifest(self._to_upstream_name(repo), digest, memory)
        except ManifestUnknown:  # the tag has moved again, or a replica of the upstream does not have the manifest yet
            return await self._upstream.get_manifest(self._to_upstream_name(repo), tag, memory)

    async def _store(
        self, repo: RepositoryName, reference: Reference, manifest: Manifest, cached: Descriptor | None = None
    ) -> None:
        """Stores a manifest, whose blobs need not be stored yet (`sparse`), in the local registry. If `reference` is a
        tag, makes the tag point at the manifest, and records the upstream's answer. `cached`: the manifest at which the
        cached tag pointed before; None if the tag was not cached."""
        tags = [] if isinstance(reference, Digest) else [reference]
        for tag in tags:
            await self._served_tags.record_sighting(repo, tag, manifest.digest, cached)
        await self._local.put_manifest(repo, manifest, tags, by=MIRROR_ACTOR, sparse=True)
        if tags:
            await self._record_check(repo, reference, found=True)

    async def _record_check(self, repo: RepositoryName, reference: Reference, *, found: bool) -> None:
        """Records whether the upstream has the manifest (`found`). If the store cannot record the answer, only logs a
        warning: the next request then asks the upstream again."""
        try:
            await self._records.save_check(repo, reference, found)
        except (StorageFull, StorageFailed) as error:
            log.warning("cannot record the answer of %s about %s: %s", self._name, repo, error.message)

    async def _delete_tag(self, repo: RepositoryName, tag: Tag) -> None:
        """Deletes a cached tag that the upstream has deleted. Clients can still pull the manifest by digest."""
        with suppress(ManifestUnknown):
            await self._local.delete_tag(repo, tag, by=MIRROR_ACTOR)
        await self._record_check(repo, tag, found=False)

    def _outdated_notice(
        self, repo: RepositoryName, reference: Reference, check: UpstreamCheck | None, reason: str
    ) -> str:
        """Returns the notice for a cached copy that may be out of date. `check`: the last recorded answer of the
        upstream. `reason`: why the upstream has not confirmed the copy."""
        age = self._freshness.age(check) if check is not None and check.found else float("inf")  # infinity: unknown
        when = f"as it was {format_duration(max(round(age), 1))} ago" if age < 1e9 else "as it was at an unknown time"
        return f"{repo}:{reference} is served {when}, because {reason}"
