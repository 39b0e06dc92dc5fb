"""Brings images into the cache before anybody asks for them.

It reads through the registry as a client would, and waits until each blob is there: the mirror's own fills fetch the
bytes, so nothing is fetched twice that somebody else fetches just now, and none of it passes through here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from registry.mirror.mirror import Mirror
from registry.mirror.warm.targets import Platform, choose_manifests, platform_name
from storage.content import INDEXES, Descriptor, Manifest
from storage.errors import DigestInvalid, ManifestUnknown, NameUnknown, RegistryError, UpstreamUnavailable
from storage.interface import Reader, Registry
from storage.names import Digest, ImageReference, RepositoryName, Tag

FindStored = Callable[[Sequence[Digest]], Awaitable[set[Digest]]]
"""Those of some blobs that are here, whole."""
Locate = Callable[[RepositoryName], Awaitable[tuple[Registry, RepositoryName, str | None]]]
"""Where a name leads: the registry that has it, its name there, and the upstream it is from (None: none)."""

REFERENCES_AT_ONCE, BLOBS_AT_ONCE = 4, 8
"""How many are brought in at once. The mirror has its own limit to the connections it makes."""
MAX_INDEX_DEPTH = 4
"""Indexes inside indexes that are followed."""


class WarmObserver(Protocol):
    """Who is told how far it is. Calls come from one event loop; none may wait."""

    def on_blob_wanted(self, where: ImageReference, blob: Descriptor) -> None:
        """A blob is wanted."""
        ...

    def on_bytes(self, blob: Digest, count: int) -> None:
        """So many of its bytes are here, without a gap from the start."""
        ...

    def on_reference_done(self, where: ImageReference, warmed: WarmResult) -> None:
        """A reference is done with."""
        ...


@dataclass(slots=True)
class WarmResult:
    """What came of a reference. Bytes are those of configs and layers; `kept` were here before. `error` is one line
    for a person: some of it, or all, is not here."""

    manifests: int = 0
    blobs: int = 0
    fetched: int = 0
    already_stored: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class _WantedBlob:
    blob: Descriptor
    stored: bool
    """Before anything was fetched."""


class Warmer:
    """One run over some references. `platforms` None: all of them."""

    def __init__(
        self,
        locate: Locate,
        find_stored: FindStored,
        platforms: Sequence[Platform] | None,
        observer: WarmObserver,
    ) -> None:
        self._locate = locate
        self._find_stored = find_stored
        self._platforms = platforms
        self._observer = observer
        self._references = asyncio.Semaphore(REFERENCES_AT_ONCE)
        self._slots = asyncio.Semaphore(BLOBS_AT_ONCE)
        self._begun: dict[tuple[RepositoryName, Digest], asyncio.Task[None]] = {}

    async def warm(self, places: Sequence[ImageReference]) -> list[WarmResult]:
        """What came of each, in their order; one that fails stops no other. Cancelled: what has come stays, partial
        blobs too."""
        try:
            return await asyncio.gather(*map(self._one, places))
        finally:
            left = [task for task in self._begun.values() if not task.done()]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def _one(self, where: ImageReference) -> WarmResult:
        warmed = WarmResult()
        async with self._references:
            try:
                await self._bring(where, warmed)
            except RegistryError as error:
                warmed.error = error.message
        self._observer.on_reference_done(where, warmed)
        return warmed

    async def _bring(self, where: ImageReference, warmed: WarmResult) -> None:
        registry, repo, upstream = await self._locate(where.repository)
        if upstream is None:
            raise NameUnknown(f"{repo} is hosted here; no upstream has it")
        assert isinstance(registry, Mirror)
        wanted: dict[Digest, _WantedBlob] = {}
        outdated = await registry.revalidate(repo, where.reference) if isinstance(where.reference, Tag) else None
        problem = await self._gather_manifests(
            registry, ImageReference(repo, where.reference), wanted, warmed, MAX_INDEX_DEPTH
        )
        if outdated is not None:
            problem = problem or UpstreamUnavailable(outdated)
        tasks = {digest: self._begin(registry, repo, where, each.blob) for digest, each in wanted.items()}
        if tasks:
            await asyncio.wait(tasks.values())
        for digest, task in tasks.items():
            error = task.exception()
            if error is None:
                warmed.blobs += 1
                if wanted[digest].stored:
                    warmed.already_stored += wanted[digest].blob.size
                else:
                    warmed.fetched += wanted[digest].blob.size
            elif isinstance(error, RegistryError):
                problem = problem or error
            else:
                raise error
        if problem is not None:
            raise problem

    async def _gather_manifests(
        self, registry: Reader, at: ImageReference, wanted: dict[Digest, _WantedBlob], warmed: WarmResult, depth: int
    ) -> RegistryError | None:
        """Adds to `wanted` what the manifest and those below it refer to. Returns what is wanting of them, so that the
        rest is brought all the same; raises what stands in the way of the manifest itself."""
        manifest = await registry.get_manifest(at.repository, at.reference)
        warmed.manifests += 1
        if manifest.media_type not in INDEXES:
            await self._want(manifest.blobs, manifest.foreign, wanted)
            return None
        children, problem = self._chosen(manifest)
        blobs = manifest.blob_children
        await self._want([child for child in children if child.digest in blobs], frozenset(), wanted)
        for child in children:
            if child.digest not in blobs and depth:
                try:
                    place = ImageReference(at.repository, child.digest)
                    below = await self._gather_manifests(registry, place, wanted, warmed, depth - 1)
                except ManifestUnknown as unknown:  # an index may list what its registry does not have
                    below = unknown
                problem = problem or below
        return problem

    async def _want(
        self, blobs: Sequence[Descriptor], foreign: frozenset[Digest], wanted: dict[Digest, _WantedBlob]
    ) -> None:
        """Looks at once which are here: what is prefetched from now on counts as fetched."""
        stored = await self._find_stored([blob.digest for blob in blobs])
        for blob in blobs:
            if blob.digest not in foreign:
                wanted.setdefault(blob.digest, _WantedBlob(blob, blob.digest in stored))

    def _chosen(self, index: Manifest) -> tuple[Sequence[Descriptor], RegistryError | None]:
        entries = index.manifests
        offered = sorted({platform_name(entry) for entry in entries} - {""})
        if self._platforms is None or not offered:
            return entries, None
        chosen, missing = choose_manifests(entries, self._platforms)
        if not missing:
            return chosen, None
        wanting = ", ".join(map(str, missing))
        return chosen, ManifestUnknown(f"it is not there for {wanting}; there are: {', '.join(offered)}")

    def _begin(
        self, registry: Reader, repo: RepositoryName, where: ImageReference, blob: Descriptor
    ) -> asyncio.Task[None]:
        """The one task for that blob of that repository; images share layers."""
        key = (repo, blob.digest)
        if key not in self._begun:
            self._observer.on_blob_wanted(where, blob)
            self._begun[key] = asyncio.create_task(self._fetch(registry, repo, blob))
        return self._begun[key]

    async def _fetch(self, registry: Reader, repo: RepositoryName, blob: Descriptor) -> None:
        """Returns when the blob is here, whole and checked."""
        async with self._slots:
            try:
                await self._follow(registry, repo, blob.digest)
            except DigestInvalid:  # nothing of it was kept; another endpoint may have the right bytes
                await self._follow(registry, repo, blob.digest)

    async def _follow(self, registry: Reader, repo: RepositoryName, digest: Digest) -> None:
        reader = await registry.open_blob(repo, digest)
        try:
            at, stop = reader.span
            while at < stop:
                at = await reader.ready(at)
                self._observer.on_bytes(digest, at)
        finally:
            await reader.aclose()
