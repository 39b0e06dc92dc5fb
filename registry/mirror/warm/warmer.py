"""Warming: brings images into the cache before a client asks for them.

The warmer reads through the registry as a client would and waits for each blob. The mirror's own fills fetch the bytes,
so a blob that a client is pulling is not fetched twice.
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
"""Returns those of the given blobs that are stored as a whole."""
Locate = Callable[[RepositoryName], Awaitable[tuple[Registry, RepositoryName, str | None]]]
"""Returns where a repository is: its registry, its stored name, and its upstream (None: it is hosted here)."""

REFERENCES_AT_ONCE, BLOBS_AT_ONCE = 4, 8
"""References and blobs warmed at a time. The mirror limits its connections itself."""
MAX_INDEX_DEPTH = 4
"""Levels of nested indexes that are followed."""


class WarmObserver(Protocol):
    """Receives the progress. Called on one event loop; methods must not block."""

    def on_blob_wanted(self, where: ImageReference, blob: Descriptor) -> None:
        """Called when a blob of `where` is about to be fetched."""
        ...

    def on_bytes(self, blob: Digest, count: int) -> None:
        """Called when the first `count` bytes of the blob are stored."""
        ...

    def on_reference_done(self, where: ImageReference, warmed: WarmResult) -> None:
        """Called when the work for a reference has ended."""
        ...


@dataclass(slots=True)
class WarmResult:
    """The result for one reference. Bytes count configs and layers; `already_stored` bytes were stored before. `error`:
    one line for the user; part or all of the image is missing."""

    manifests: int = 0
    blobs: int = 0
    fetched: int = 0
    already_stored: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class _WantedBlob:
    blob: Descriptor
    stored: bool
    """Before the warmer fetched anything."""


class Warmer:
    """One run over a list of references. `platforms` None: all platforms."""

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
        """Returns one result per reference, in order. A failed reference does not stop the others. When cancelled, the
        bytes fetched so far are kept, also those of partial blobs."""
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
        """Adds the blobs of the manifest, and of all manifests below it, to `wanted`. Returns the first error of the
        manifests below, so that the rest is still warmed. Raises the error of the manifest itself."""
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
                except ManifestUnknown as unknown:  # an index may list manifests that its registry does not have
                    below = unknown
                problem = problem or below
        return problem

    async def _want(
        self, blobs: Sequence[Descriptor], foreign: frozenset[Digest], wanted: dict[Digest, _WantedBlob]
    ) -> None:
        """Adds blobs to `wanted`. Looks up at once which are stored: a blob that is prefetched later counts as
        fetched."""
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
        """Returns the task for a blob of a repository, started if there is none; images share layers."""
        key = (repo, blob.digest)
        if key not in self._begun:
            self._observer.on_blob_wanted(where, blob)
            self._begun[key] = asyncio.create_task(self._fetch(registry, repo, blob))
        return self._begun[key]

    async def _fetch(self, registry: Reader, repo: RepositoryName, blob: Descriptor) -> None:
        """Returns when the blob is stored and verified."""
        async with self._slots:
            try:
                await self._follow(registry, repo, blob.digest)
            except DigestInvalid:  # the bytes were dropped; another endpoint may have the right ones
                await self._follow(registry, repo, blob.digest)

    async def _follow(self, registry: Reader, repo: RepositoryName, digest: Digest) -> None:
        reader = await registry.open_blob(repo, digest)
        try:
            at, stop = reader.span
            while at < stop:
                at = await reader.readable_until(at)
                self._observer.on_bytes(digest, at)
        finally:
            await reader.aclose()
