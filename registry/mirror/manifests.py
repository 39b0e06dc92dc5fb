"""Manifests of an upstream: what is here as long as it may be trusted, else asked for, once for all who wait."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final, TypeVar

from registry.config import Upstream, format_duration
from registry.memory_budget import ShareScope
from registry.mirror.freshness import Freshness, Verdict
from registry.mirror.upstream_client import UnconfirmedManifestUnknown, UpstreamClient
from registry.request import set_notice
from registry.single_flight import SingleFlight, wait_for_outcome
from storage.content import Actor, Descriptor, Manifest, UpstreamCheck
from storage.errors import (
    Denied,
    ManifestUnknown,
    StorageFailed,
    StorageFull,
    TooManyRequests,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from storage.interface import Leases, Registry, UpstreamRecords
from storage.names import Digest, Reference, RepositoryName, Tag

log = logging.getLogger("registry.mirror")

MIRROR_ACTOR: Final = Actor(name="mirror")
"""Who stores what comes from upstreams."""
STALE_WAIT_SECONDS: Final = 3.0
"""Seconds a client waits for an upstream when there is something older to give it."""
T = TypeVar("T")
LocalLookup = Callable[[RepositoryName, Reference], Awaitable[T]]
ToUpstreamName = Callable[[RepositoryName], RepositoryName]


class MirroredManifests:
    """`far` gives a stored name as the upstream has it. The flights' outcome is a notice for those who waited."""

    def __init__(
        self,
        local: Registry,
        source: UpstreamClient,
        records: UpstreamRecords,
        turns: Leases,
        settings: Upstream,
        freshness: Freshness,
        far: ToUpstreamName,
        patience: float = STALE_WAIT_SECONDS,
    ) -> None:
        self._local = local
        self._source = source
        self._records = records
        self._turns = turns
        self._name = settings.name
        self._freshness = freshness
        self._far = far
        self._patience = patience
        self._flights: SingleFlight[str | None] = SingleFlight()

    async def read(self, look: LocalLookup[T], repo: RepositoryName, reference: Reference) -> T:
        """What `look`, a local look-up, finds once what is here is good enough. Raises ManifestUnknown, and what the
        source raises when there is nothing to serve instead."""
        if isinstance(reference, Digest):
            with suppress(ManifestUnknown):
                return await look(repo, reference)
        verdict = self._freshness.judge(reference, await self._records.check(repo, reference))
        if verdict is Verdict.UNKNOWN:
            raise ManifestUnknown(f"{self._name} has no such manifest; that is remembered for a moment")
        if verdict in (Verdict.FRESH, Verdict.STALE):
            with suppress(ManifestUnknown):
                found = await look(repo, reference)
                if verdict is Verdict.STALE and not self._source.exhausted():
                    with suppress(UpstreamUnavailable):  # stopping
                        self._launch(repo, reference)
                return found
        await self._ask(repo, reference)
        return await look(repo, reference)

    async def renew(self, repo: RepositoryName, tag: Tag, *, force: bool = False) -> str | None:
        """Asks upstream about a tag that is not fresh; `force`: about any, also when few requests are left. What is
        here is what upstream has then; None, or why it may not be. Raises ManifestUnknown, and what the source raises
        when nothing is here."""
        verdict = self._freshness.judge(tag, await self._records.check(repo, tag))
        if verdict is Verdict.FRESH and not force and await self._held(repo, tag) is not None:
            return None
        return await self._flights.join((repo, tag, force), lambda: self._in_turn(repo, tag, force))

    @property
    def busy(self) -> bool:
        """Whether upstream is being asked."""
        return len(self._flights) > 0

    async def aclose(self) -> None:
        await self._flights.aclose()

    def _launch(self, repo: RepositoryName, reference: Reference) -> asyncio.Task[str | None]:
        return self._flights.launch((repo, reference), lambda: self._in_turn(repo, reference))

    async def _ask(self, repo: RepositoryName, reference: Reference) -> None:
        """Upstream is asked; the client is told when what it gets is old."""
        flight = self._launch(repo, reference)
        if await self._held(repo, reference) is not None:
            await asyncio.wait({flight}, timeout=self._patience)
            if not flight.done():
                check = await self._records.check(repo, reference)
                set_notice(self._outdated(repo, reference, check, f"{self._name} is slow to answer"))
                return
        told = await wait_for_outcome(flight)
        if told is not None:
            set_notice(told)

    async def _held(self, repo: RepositoryName, reference: Reference) -> Descriptor | None:
        try:
            return await self._local.resolve_manifest(repo, reference)
        except ManifestUnknown:
            return None

    async def _in_turn(self, repo: RepositoryName, reference: Reference, force: bool = False) -> str | None:
        with ShareScope() as memory:
            return await self._ask_in_turn(repo, reference, force, memory)

    async def _ask_in_turn(
        self, repo: RepositoryName, reference: Reference, force: bool, memory: ShareScope
    ) -> str | None:
        """One process at a time; the next finds what the first one heard, and does not wait as long once more when that
        was nothing: clients give up."""
        asked, since = self._freshness.now(), time.monotonic()
        async with self._turns.take(f"manifest {repo} {reference}"):
            check = await self._records.check(repo, reference)
            held = await self._held(repo, reference)
            verdict = self._freshness.judge(reference, check)
            just = check is not None and check.known and asked < check.at <= self._freshness.now()
            if verdict is Verdict.UNKNOWN and not force:
                raise ManifestUnknown(f"{self._name} has no such manifest")
            good = just or verdict is Verdict.FRESH or isinstance(reference, Digest)
            if held is not None and good and not force:
                return None
            if held is None or isinstance(reference, Digest):
                if time.monotonic() - since > self._patience and not force:
                    raise UpstreamTimeout(f"{self._name} does not answer in time")
                await self._first(repo, reference, memory)
                return None
            return await self._again(repo, reference, held, check, force, memory)

    async def _first(self, repo: RepositoryName, reference: Reference, memory: ShareScope) -> None:
        try:
            manifest = await self._source.get_manifest(self._far(repo), reference, memory)
        except ManifestUnknown:
            await self._note(repo, reference, False)
            raise
        await self._store(repo, reference, manifest)

    async def _again(
        self,
        repo: RepositoryName,
        tag: Tag,
        held: Descriptor,
        check: UpstreamCheck | None,
        force: bool,
        memory: ShareScope,
    ) -> str | None:
        """A tag that is here: HEAD tells whether it still points there. A notice when nobody could say."""
        if self._source.exhausted() and not force:
            return self._outdated(repo, tag, check, f"few requests are left at {self._name}")
        try:
            found = await self._source.resolve_manifest(self._far(repo), tag)
            if found.digest != held.digest:
                await self._store(repo, tag, await self._take(repo, tag, found.digest, memory))
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

    async def _take(self, repo: RepositoryName, tag: Tag, digest: Digest, memory: ShareScope) -> Manifest:
        """The manifest the tag points at now: from here if it is here."""
        with suppress(ManifestUnknown):
            return await self._local.get_manifest(repo, digest)
        try:
            return await self._source.get_manifest(self._far(repo), digest, memory)
        except ManifestUnknown:  # it moved on between the two requests, or another server of theirs lags behind
            return await self._source.get_manifest(self._far(repo), tag, memory)

    async def _store(self, repo: RepositoryName, reference: Reference, manifest: Manifest) -> None:
        tags = [] if isinstance(reference, Digest) else [reference]
        await self._local.put_manifest(repo, manifest, tags, by=MIRROR_ACTOR, sparse=True)
        if tags:
            await self._note(repo, reference, True)

    async def _note(self, repo: RepositoryName, reference: Reference, known: bool) -> None:
        """What cannot be kept is asked for again: no reason to refuse what was found out."""
        try:
            await self._records.note_check(repo, reference, known)
        except (StorageFull, StorageFailed) as error:
            log.warning("what %s said of %s could not be kept: %s", self._name, repo, error.message)

    async def _drop(self, repo: RepositoryName, tag: Tag) -> None:
        """The tag is gone upstream. What it pointed at can still be had by digest."""
        with suppress(ManifestUnknown):
            await self._local.delete_tag(repo, tag, by=MIRROR_ACTOR)
        await self._note(repo, tag, False)

    def _outdated(self, repo: RepositoryName, reference: Reference, check: UpstreamCheck | None, reason: str) -> str:
        age = self._freshness.age(check) if check is not None and check.known else float("inf")
        since = f"as it was {format_duration(max(round(age), 1))} ago" if age < 1e9 else "as it was when last asked for"
        return f"{repo}:{reference} is served {since}, since {reason}"
