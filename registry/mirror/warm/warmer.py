"""Warms the mirror: fetches images into its cache before a client requests them (`Warmer`).

The warmer opens each manifest and each blob of an image through the mirror, as a client's request would, and waits
until the blob is stored. The mirror downloads each blob once, even if a client pulls it at the same time.
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
"""Returns those of the given blobs that are completely stored."""
Locate = Callable[[RepositoryName], Awaitable[tuple[Registry, RepositoryName, str | None]]]
"""Returns for a repository name: the registry that serves it, the repository's name there, and the name of its upstream
registry (None: clients push to the repository, so it has no upstream)."""

MAX_RUNNING_REFERENCES = 4
MAX_RUNNING_BLOBS = 8
"""Image references and blobs that are warmed at a time. The mirror itself limits the connections to the upstream."""
MAX_INDEX_DEPTH = 4
"""Levels of indexes within indexes that are followed."""


class WarmObserver(Protocol):
    """Receives reports about the progress. Its methods are called on the event loop and must not block."""

    def on_blob_wanted(self, image: ImageReference, blob: Descriptor) -> None:
        """Called before a blob of `image` is fetched."""
        ...

    def on_bytes(self, blob: Digest, count: int) -> None:
        """Called repeatedly while a blob is fetched. `count`: number of its bytes that are stored."""
        ...

    def on_reference_done(self, image: ImageReference, result: WarmResult) -> None:
        """Called when the work for an image reference has ended, with success or with an error."""
        ...


@dataclass(slots=True)
class WarmResult:
    """The result for one image reference. `manifests`, `blobs`: numbers of those that are cached now. `fetched`: bytes
    of configs and layers that the warmer had fetched. `already_stored`: bytes that were cached before. `error`: one
    line for the user that says why a part of the image is not cached; None if all of it is."""

    manifests: int = 0
    blobs: int = 0
    fetched: int = 0
    already_stored: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class _ImageBlob:
    """A blob of an image. `was_stored`: whether it was stored before the warmer fetched anything."""

    blob: Descriptor
    was_stored: bool


class Warmer:
    """Warms a list of images once. Make a new object for each time."""

    def __init__(
        self,
        locate: Locate,
        find_stored: FindStored,
        platforms: Sequence[Platform] | None,
        observer: WarmObserver,
    ) -> None:
        """`platforms`: the platforms for which manifests of an index are fetched; None: all."""
        self._locate = locate
        self._find_stored = find_stored
        self._platforms = platforms
        self._observer = observer
        self._reference_limit = asyncio.Semaphore(MAX_RUNNING_REFERENCES)
        self._blob_limit = asyncio.Semaphore(MAX_RUNNING_BLOBS)
        self._blob_tasks: dict[tuple[RepositoryName, Digest], asyncio.Task[None]] = {}

    async def warm(self, images: Sequence[ImageReference]) -> list[WarmResult]:
        """Fetches the images and returns one result for each, in order. An error of one image does not stop the others.
        If this call is cancelled, the bytes fetched so far are kept, also those of incomplete blobs."""
        try:
            return await asyncio.gather(*map(self._warm_image, images))
        finally:
            running = [task for task in self._blob_tasks.values() if not task.done()]
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _warm_image(self, image: ImageReference) -> WarmResult:
        """Fetches one image and returns the result, which has the error if there was one."""
        result = WarmResult()
        async with self._reference_limit:
            try:
                await self._fetch_image(image, result)
            except RegistryError as error:
                result.error = error.message
        self._observer.on_reference_done(image, result)
        return result

    async def _fetch_image(self, image: ImageReference, result: WarmResult) -> None:
        """Fetches one image and counts in `result`. After an error, fetches the rest of the image, and then raises the
        first error."""
        registry, repo, upstream = await self._locate(image.repository)
        if upstream is None:
            raise NameUnknown(f"{repo} is hosted here; no upstream has it")
        assert isinstance(registry, Mirror)
        image_blobs: dict[Digest, _ImageBlob] = {}
        outdated = await registry.revalidate(repo, image.reference) if isinstance(image.reference, Tag) else None
        problem = await self._fetch_manifests(
            registry, ImageReference(repo, image.reference), image_blobs, result, MAX_INDEX_DEPTH
        )
        if outdated is not None:
            problem = problem or UpstreamUnavailable(outdated)
        tasks = {digest: self._start_fetch(registry, repo, image, each.blob) for digest, each in image_blobs.items()}
        if tasks:
            await asyncio.wait(tasks.values())
        for digest, task in tasks.items():
            error = task.exception()
            if error is None:
                result.blobs += 1
                if image_blobs[digest].was_stored:
                    result.already_stored += image_blobs[digest].blob.size
                else:
                    result.fetched += image_blobs[digest].blob.size
            elif isinstance(error, RegistryError):
                problem = problem or error
            else:
                raise error
        if problem is not None:
            raise problem

    async def _fetch_manifests(
        self,
        registry: Reader,
        image: ImageReference,
        image_blobs: dict[Digest, _ImageBlob],
        result: WarmResult,
        depth: int,
    ) -> RegistryError | None:
        """Fetches a manifest and, if it is an index, the manifests that it lists, down to `depth` further levels. Adds
        their blobs to `image_blobs`. Returns the first error of a listed manifest or a missing platform, so that the
        caller still fetches the rest; None if there was none. Raises the error of the manifest itself."""
        manifest = await registry.get_manifest(image.repository, image.reference)
        result.manifests += 1
        if manifest.media_type not in INDEXES:
            await self._add_blobs(manifest.blobs, manifest.foreign, image_blobs)
            return None
        entries, problem = self._choose_entries(manifest)
        listed_blobs = manifest.blob_children  # an index may list blobs as well as manifests
        await self._add_blobs([entry for entry in entries if entry.digest in listed_blobs], frozenset(), image_blobs)
        for entry in entries:
            if entry.digest not in listed_blobs and depth:
                try:
                    child = ImageReference(image.repository, entry.digest)
                    child_problem = await self._fetch_manifests(registry, child, image_blobs, result, depth - 1)
                except ManifestUnknown as unknown:  # an index may list manifests that its registry does not have
                    child_problem = unknown
                problem = problem or child_problem
        return problem

    async def _add_blobs(
        self, blobs: Sequence[Descriptor], foreign: frozenset[Digest], image_blobs: dict[Digest, _ImageBlob]
    ) -> None:
        """Adds `blobs` to `image_blobs`, except for `foreign` layers, which registries do not serve. Looks up now which
        are stored, so that a blob that the mirror prefetches from now on counts as fetched."""
        stored = await self._find_stored([blob.digest for blob in blobs])
        for blob in blobs:
            if blob.digest not in foreign:
                image_blobs.setdefault(blob.digest, _ImageBlob(blob, blob.digest in stored))

    def _choose_entries(self, index: Manifest) -> tuple[Sequence[Descriptor], RegistryError | None]:
        """Returns the entries of an index for the platforms that are warmed, and an error if the index has no entry for
        one of them. Returns all entries if the index names no platforms."""
        entries = index.manifests
        offered = sorted({platform_name(entry) for entry in entries} - {""})
        if self._platforms is None or not offered:
            return entries, None
        chosen, missing = choose_manifests(entries, self._platforms)
        if not missing:
            return chosen, None
        missing_names = ", ".join(map(str, missing))
        return chosen, ManifestUnknown(f"it is not there for {missing_names}; there are: {', '.join(offered)}")

    def _start_fetch(
        self, registry: Reader, repo: RepositoryName, image: ImageReference, blob: Descriptor
    ) -> asyncio.Task[None]:
        """Returns the task that fetches a blob of a repository. Starts it if there is none; there is one already if
        another image has the same layer."""
        key = (repo, blob.digest)
        if key not in self._blob_tasks:
            self._observer.on_blob_wanted(image, blob)
            self._blob_tasks[key] = asyncio.create_task(self._fetch_blob(registry, repo, blob))
        return self._blob_tasks[key]

    async def _fetch_blob(self, registry: Reader, repo: RepositoryName, blob: Descriptor) -> None:
        """Fetches a blob, and returns when it is stored and verified."""
        async with self._blob_limit:
            try:
                await self._wait_until_stored(registry, repo, blob.digest)
            except DigestInvalid:  # tried again, because another endpoint of the upstream may send the right bytes
                await self._wait_until_stored(registry, repo, blob.digest)

    async def _wait_until_stored(self, registry: Reader, repo: RepositoryName, digest: Digest) -> None:
        """Opens a blob, which starts its download, and reports the progress until its last byte is stored."""
        reader = await registry.open_blob(repo, digest)
        try:
            offset, stop = reader.span
            while offset < stop:
                offset = await reader.readable_until(offset)
                self._observer.on_bytes(digest, offset)
        finally:
            await reader.aclose()
