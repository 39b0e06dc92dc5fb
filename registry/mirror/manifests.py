"""Manifests of an upstream: served from the store while they are fresh, otherwise requested once for all clients."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final, TypeVar

from registry.config import Upstream, format_duration
from registry.memory_budget import ShareScope
from registry.mirror.entitlement import MIRROR_ACTOR
from registry.mirror.freshness import Freshness, Verdict
from registry.mirror.upstream_client import UnconfirmedManifestUnknown, UpstreamClient
from registry.request import set_notice
from registry.single_flight import SingleFlight, wait_for_outcome
from storage.content import Descriptor, Manifest, UpstreamCheck
from storage.errors import (
    Denied,
    ManifestUnknown,
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
"""Time a client waits for the upstream when a stale copy can be served instead."""
T = TypeVar("T")
LocalLookup = Callable[[RepositoryName, Reference], Awaitable[T]]
ToUpstreamName = Callable[[RepositoryName], RepositoryName]


class MirroredManifests:
    """The manifest reads of `Mirror`. `upstream_name` returns a repository's name at the upstream. Each flight returns
    a notice for the clients that wait for it, or None."""

    def __init__(
        self,
        local: Registry,
        upstream: UpstreamClient,
        records: UpstreamRecords,
        leases: Leases,
        settings: Upstream,
        freshness: Freshness,
        upstream_name: ToUpstreamName,
        stale_wait: float = STALE_WAIT_SECONDS,
    ) -> None:
        self._local = local
        self._upstream = upstream
        self._records = records
        self._leases = leases
        self._name = settings.name
        self._freshness = freshness
        self._upstream_name = upstream_name
        self._stale_wait = stale_wait
        self._flights: SingleFlight[str | None] = SingleFlight()

    async def read(self, look_up: LocalLookup[T], repo: RepositoryName, reference: Reference) -> T:
        """Returns what `look_up`, a local look-up, finds once the local copy is fresh enough. Raises ManifestUnknown,
        and what the upstream raises when there is no local copy."""
        if isinstance(reference, Digest):
            with suppress(ManifestUnknown):
                return await look_up(repo, reference)
        verdict = self._freshness.judge(reference, await self._records.last_check(repo, reference))
        if verdict is Verdict.UNKNOWN:
            raise ManifestUnknown(f"{self._name} has no such manifest; that is remembered for a moment")
        if verdict in (Verdict.FRESH, Verdict.STALE):
            with suppress(ManifestUnknown):
                found = await look_up(repo, reference)
                if verdict is Verdict.STALE and not self._upstream.is_exhausted():
                    with suppress(UpstreamUnavailable):  # stopping
                        self._start(repo, reference)
                return found
        await self._ask(repo, reference)
        return await look_up(repo, reference)

    async def revalidate(self, repo: RepositoryName, tag: Tag, *, force: bool = False) -> str | None:
        """Asks the upstream about a tag that is not fresh. With `force`, also about a fresh tag, and when few requests
        are left. Returns None when the cached copy is current, otherwise the reason why it may not be. Raises
        ManifestUnknown; when nothing is cached, what the upstream raises."""
        verdict = self._freshness.judge(tag, await self._records.last_check(repo, tag))
        if verdict is Verdict.FRESH and not force and await self._held(repo, tag) is not None:
            return None
        return await self._flights.run((repo, tag, force), lambda: self._ask_under_lease(repo, tag, force))

    @property
    def busy(self) -> bool:
        """Whether a request to the upstream runs."""
        return len(self._flights) > 0

    async def aclose(self) -> None:
        await self._flights.aclose()

    def _start(self, repo: RepositoryName, reference: Reference) -> asyncio.Task[str | None]:
        return self._flights.start((repo, reference), lambda: self._ask_under_lease(repo, reference))

    async def _ask(self, repo: RepositoryName, reference: Reference) -> None:
        """Asks the upstream, and sets a notice for the client if it will get a stale copy."""
        flight = self._start(repo, reference)
        if await self._held(repo, reference) is not None:
            await asyncio.wait({flight}, timeout=self._stale_wait)
            if not flight.done():
                check = await self._records.last_check(repo, reference)
                set_notice(self._outdated(repo, reference, check, f"{self._name} is slow to answer"))
                return
        notice = await wait_for_outcome(flight)
        if notice is not None:
            set_notice(notice)

    async def _held(self, repo: RepositoryName, reference: Reference) -> Descriptor | None:
        """Returns the descriptor of the cached manifest; None: nothing is cached."""
        try:
            return await self._local.resolve_manifest(repo, reference)
        except ManifestUnknown:
            return None

    async def _ask_under_lease(self, repo: RepositoryName, reference: Reference, force: bool = False) -> str | None:
        """Asks the upstream, in one process at a time. A process that waited for the lease uses the answer that the
        previous holder recorded. If there is none, it fails when the wait took longer than `stale_wait`, since its
        clients would time out."""
        asked, since = self._freshness.now(), time.monotonic()
        async with self._leases.take(f"manifest {repo} {reference}"):
            check = await self._records.last_check(repo, reference)
            held = await self._held(repo, reference)
            verdict = self._freshness.judge(reference, check)
            checked_meanwhile = check is not None and check.found and asked < check.at <= self._freshness.now()
            if verdict is Verdict.UNKNOWN and not force:
                raise ManifestUnknown(f"{self._name} has no such manifest")
            is_current = checked_meanwhile or verdict is Verdict.FRESH or isinstance(reference, Digest)
            if held is not None and is_current and not force:
                return None
            if held is None or isinstance(reference, Digest):
                if time.monotonic() - since > self._stale_wait and not force:
                    raise UpstreamTimeout(f"{self._name} does not answer in time")
                await self._fetch_new(repo, reference)
                return None
            return await self._revalidate_tag(repo, reference, held, check, force)

    async def _fetch_new(self, repo: RepositoryName, reference: Reference) -> None:
        """Fetches and stores a manifest of which nothing is cached."""
        with ShareScope() as memory:
            try:
                manifest = await self._upstream.get_manifest(self._upstream_name(repo), reference, memory)
            except UnconfirmedManifestUnknown:  # may not be the upstream's own word, so it is not cached
                raise
            except ManifestUnknown:
                await self._note(repo, reference, False)
                raise
            await self._store(repo, reference, manifest)

    async def _revalidate_tag(
        self, repo: RepositoryName, tag: Tag, held: Descriptor, check: UpstreamCheck | None, force: bool
    ) -> str | None:
        """Checks a cached tag with a HEAD request and fetches the manifest if the tag has moved. Returns a notice when
        the upstream gave no usable answer."""
        if self._upstream.is_exhausted() and not force:
            return self._outdated(repo, tag, check, f"few requests are left at {self._name}")
        try:
            found = await self._upstream.resolve_manifest(self._upstream_name(repo), tag)
            if found.digest != held.digest:
                with ShareScope() as memory:
                    await self._store(repo, tag, await self._fetch_moved(repo, tag, found.digest, memory))
            else:
                await self._note(repo, tag, True)
        except (
            UnconfirmedManifestUnknown,
            Denied,
            UpstreamUnavailable,
            TooManyRequests,
            StorageFull,
            StorageFailed,
        ) as error:
            text = self._outdated(repo, tag, check, f"{self._name}: {error.message}")
            log.warning("%s", text)
            return text
        except ManifestUnknown:
            await self._drop(repo, tag)
            raise
        return None

    async def _fetch_moved(self, repo: RepositoryName, tag: Tag, digest: Digest, memory: ShareScope) -> Manifest:
        """Returns the manifest that the tag refers to now, from the store if possible."""
        with suppress(ManifestUnknown):
            return await self._local.get_manifest(repo, digest)
        try:
            return await self._upstream.get_manifest(self._upstream_name(repo), digest, memory)
        except ManifestUnknown:  # the tag moved between the two requests, or an upstream replica is behind
            return await self._upstream.get_manifest(self._upstream_name(repo), tag, memory)

    async def _store(self, repo: RepositoryName, reference: Reference, manifest: Manifest) -> None:
        tags = [] if isinstance(reference, Digest) else [reference]
        await self._local.put_manifest(repo, manifest, tags, by=MIRROR_ACTOR, sparse=True)
        if tags:
            await self._note(repo, reference, True)

    async def _note(self, repo: RepositoryName, reference: Reference, known: bool) -> None:
        """Records the upstream's answer. A failure to record is logged only: the upstream is then asked again."""
        try:
            await self._records.save_check(repo, reference, known)
        except (StorageFull, StorageFailed) as error:
            log.warning("cannot record the answer of %s about %s: %s", self._name, repo, error.message)

    async def _drop(self, repo: RepositoryName, tag: Tag) -> None:
        """Drops a tag that the upstream has deleted. The manifest can still be pulled by digest."""
        with suppress(ManifestUnknown):
            await self._local.delete_tag(repo, tag, by=MIRROR_ACTOR)
        await self._note(repo, tag, False)

    def _outdated(self, repo: RepositoryName, reference: Reference, check: UpstreamCheck | None, reason: str) -> str:
        """Returns the notice for a stale copy."""
        age = self._freshness.age(check) if check is not None and check.found else float("inf")
        since = f"as it was {format_duration(max(round(age), 1))} ago" if age < 1e9 else "as it was when last asked for"
        return f"{repo}:{reference} is served {since}, since {reason}"
