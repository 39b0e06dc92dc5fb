"""Warms the mirror: fetches images into its cache before a client requests them (`Warmer`).

The warmer requests each manifest and each blob of an image from the mirror, as a client would, and waits until the
mirror has stored them. The mirror downloads each blob once, even if a client requests it at the same time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from registry.mirror.mirror import Mirror
from registry.mirror.warm.targets import Platform, choose_manifests, platform_name
from registry.single_flight import cancel_and_wait
from storage.content import INDEXES, Descriptor, Manifest
from storage.errors import DigestInvalid, ManifestUnknown, NameUnknown, RegistryError, UpstreamUnavailable
from storage.interface import Reader, Registry
from storage.names import Digest, ImageReference, RepositoryName, Tag

FindStoredBlobs = Callable[[Sequence[Digest]], Awaitable[set[Digest]]]
"""A function that returns which of the given blobs are completely stored."""
Locate = Callable[[RepositoryName], Awaitable[tuple[Registry, RepositoryName, str | None]]]
"""A function that finds a repository by its name. Returns the registry that serves the repository, the repository's
name in that registry, and the name of the upstream registry. The name of the upstream registry is None for a *hosted*
repository, to which clients push."""

MAX_RUNNING_REFERENCES = 4
MAX_RUNNING_BLOBS = 8
"""Largest numbers of image references and of blobs that are fetched at a time. The mirror itself limits the connections
to the upstream."""
MAX_INDEX_DEPTH = 4
"""Largest number of levels of manifests that are fetched below an image's index. Level 1 has the manifests that the
index lists. Each further level has the manifests that an index of the previous level lists."""


class WarmObserver(Protocol):
    """Receives reports about the progress of a `Warmer`. Its methods are called on the event loop and must not
    block."""

    def on_blob_wanted(self, image: ImageReference, blob: Descriptor) -> None:
        """Called before a blob of `image` is fetched. If several images of one repository have the blob, this method is
        called for the first of these images only."""
        ...

    def on_bytes(self, blob: Digest, count: int) -> None:
        """Called repeatedly while a blob is fetched. `count`: number of the blob's bytes that are stored by now."""
        ...

    def on_reference_done(self, image: ImageReference, result: WarmResult) -> None:
        """Called when the image has been fetched, or when fetching it has failed."""
        ...


@dataclass(slots=True)
class WarmResult:
    """The result for one image reference.

    - `manifests`, `blobs`: numbers of the image's manifests and blobs that are cached.
    - `fetched`: total size in bytes of the blobs that were fetched.
    - `already_stored`: total size in bytes of the blobs that were cached before.
    - `error`: one line for the user. It says why a part of the image is not cached, or why the cached tag may be out
      of date. None: there was no error."""

    manifests: int = 0
    blobs: int = 0
    fetched: int = 0
    already_stored: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class _ImageBlob:
    """A blob of an image. `was_stored`: whether the blob was stored before the warmer requested any blob of the
    image."""

    blob: Descriptor
    was_stored: bool


class Warmer:
    """Warms a list of images once. Make a new object for each list."""

    def __init__(
        self,
        locate: Locate,
        find_stored: FindStoredBlobs,
        platforms: Sequence[Platform] | None,
        observer: WarmObserver,
    ) -> None:
        """`locate`: finds the mirror that serves a repository. `find_stored`: says which blobs are stored. `platforms`:
        the platforms whose manifests are fetched if an image is an index; None: all platforms."""
        self._locate = locate
        self._find_stored = find_stored
        self._platforms = platforms
        self._observer = observer
        self._reference_limit = asyncio.Semaphore(MAX_RUNNING_REFERENCES)
        self._blob_limit = asyncio.Semaphore(MAX_RUNNING_BLOBS)
        self._blob_tasks: dict[tuple[RepositoryName, Digest], asyncio.Task[None]] = {}
        """The tasks that fetch or have fetched blobs, by repository and digest."""

    async def warm(self, images: Sequence[ImageReference]) -> list[WarmResult]:
        """Fetches the images and returns their results in the same order.

        - If an image fails with a RegistryError, its result says so, and the other images are still fetched.
        - If an image fails with any other error, raises this error, and stops fetching the other images.
        - If this call is cancelled, the mirror keeps the bytes that it has fetched, including the bytes of incomplete
          blobs."""
        image_tasks = [asyncio.ensure_future(self._warm_image(image)) for image in images]
        try:
            return await asyncio.gather(*image_tasks)
        finally:
            try:
                await cancel_and_wait(image_tasks)  # first, because these tasks start the tasks for blobs
            finally:
                await cancel_and_wait(self._blob_tasks.values())

    async def _warm_image(self, image: ImageReference) -> WarmResult:
        """Fetches one image and returns its result."""
        result = WarmResult()
        async with self._reference_limit:
            try:
                await self._fetch_image(image, result)
            except RegistryError as error:
                result.error = error.message
        self._observer.on_reference_done(image, result)
        return result

    async def _fetch_image(self, image: ImageReference, result: WarmResult) -> None:
        """Fetches one image, and adds its numbers to `result`. If one of the following errors occurs, fetches the rest
        of the image, and then raises the error. If several occur, raises one of them:

        - The cached tag may be out of date.
        - An index has no entry for a platform.
        - The upstream does not have a manifest that an index lists.
        - A blob cannot be fetched.

        If a manifest cannot be fetched for another reason, raises the error at once."""
        registry, repo, upstream = await self._locate(image.repository)
        if upstream is None:
            raise NameUnknown(f"{repo} is hosted here; no upstream has it")
        assert isinstance(registry, Mirror)
        image_blobs: dict[Digest, _ImageBlob] = {}
        # Why the cached tag may be out of date; None: it is current.
        stale_reason = await registry.revalidate(repo, image.reference) if isinstance(image.reference, Tag) else None
        first_error = await self._fetch_manifests(
            registry, ImageReference(repo, image.reference), image_blobs, result, MAX_INDEX_DEPTH
        )
        if stale_reason is not None:
            first_error = first_error or UpstreamUnavailable(stale_reason)
        tasks = {
            digest: self._find_or_start_fetch(registry, repo, image, image_blob.blob)
            for digest, image_blob in image_blobs.items()
        }
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
                first_error = first_error or error
            else:
                raise error
        if first_error is not None:
            raise first_error

    async def _fetch_manifests(
        self,
        registry: Reader,
        image: ImageReference,
        image_blobs: dict[Digest, _ImageBlob],
        result: WarmResult,
        depth: int,
    ) -> RegistryError | None:
        """Fetches a manifest. If it is an index, also fetches the manifests that it lists, down to `depth` further
        levels. Adds the blobs of all these manifests to `image_blobs`, but does not fetch them.

        Two kinds of errors are returned, not raised: the upstream does not have a listed manifest, or an index has no
        entry for a platform. Returns the first such error; None if there was none."""
        manifest = await registry.get_manifest(image.repository, image.reference)
        result.manifests += 1
        if manifest.media_type not in INDEXES:
            await self._add_blobs(manifest.blobs, manifest.foreign, image_blobs)
            return None
        entries, first_error = self._choose_entries(manifest)
        listed_blobs = manifest.blob_children  # an index may list blobs as well as manifests
        await self._add_blobs([entry for entry in entries if entry.digest in listed_blobs], frozenset(), image_blobs)
        for entry in entries:
            if entry.digest not in listed_blobs and depth:
                try:
                    child = ImageReference(image.repository, entry.digest)
                    child_error = await self._fetch_manifests(registry, child, image_blobs, result, depth - 1)
                except ManifestUnknown as unknown:  # an index may list manifests that the upstream does not have
                    child_error = unknown
                first_error = first_error or child_error
        return first_error

    async def _add_blobs(
        self, blobs: Sequence[Descriptor], foreign: frozenset[Digest], image_blobs: dict[Digest, _ImageBlob]
    ) -> None:
        """Adds `blobs` to `image_blobs`, except for `foreign` layers, which registries do not serve. Looks up which
        blobs are stored. Call this before any blob of the image is requested, because the first request makes the
        mirror prefetch the other blobs, which would then count as already stored."""
        stored = await self._find_stored([blob.digest for blob in blobs])
        for blob in blobs:
            if blob.digest not in foreign:
                image_blobs.setdefault(blob.digest, _ImageBlob(blob, blob.digest in stored))

    def _choose_entries(self, index: Manifest) -> tuple[Sequence[Descriptor], RegistryError | None]:
        """Returns the entries of an index for the platforms that are warmed. Returns all entries if all platforms are
        warmed, or if the index states no platforms. The second result is an error if the index has no entry for one of
        the platforms, otherwise None."""
        entries = index.manifests  # despite the name, all entries of the index: manifests and blobs
        offered = sorted({platform_name(entry) for entry in entries} - {""})
        if self._platforms is None or not offered:
            return entries, None
        chosen, missing = choose_manifests(entries, self._platforms)
        if not missing:
            return chosen, None
        missing_names = ", ".join(map(str, missing))
        return chosen, ManifestUnknown(f"the image does not exist for {missing_names}, only for {', '.join(offered)}")

    def _find_or_start_fetch(
        self, registry: Reader, repo: RepositoryName, image: ImageReference, blob: Descriptor
    ) -> asyncio.Task[None]:
        """Returns the task that fetches a blob of a repository. Starts the task if it was not started for
        another image."""
        key = (repo, blob.digest)
        if key not in self._blob_tasks:
            self._observer.on_blob_wanted(image, blob)
            self._blob_tasks[key] = asyncio.create_task(self._fetch_blob(registry, repo, blob))
        return self._blob_tasks[key]

    async def _fetch_blob(self, registry: Reader, repo: RepositoryName, blob: Descriptor) -> None:
        """Fetches a blob, and returns when its digest is verified and the blob is stored."""
        async with self._blob_limit:
            try:
                await self._wait_until_stored(registry, repo, blob.digest)
            except DigestInvalid:  # tried again, because another endpoint of the upstream may send the right bytes
                await self._wait_until_stored(registry, repo, blob.digest)

    async def _wait_until_stored(self, registry: Reader, repo: RepositoryName, digest: Digest) -> None:
        """Opens a blob, and reports the progress until the last byte of the blob is stored. Opening a blob that is not
        stored starts its download."""
        reader = await registry.open_blob(repo, digest)
        try:
            offset, end_offset = reader.span
            while offset < end_offset:
                # `readable_until` waits until the byte at `offset` can be read. Then it returns a later offset. All
                # bytes before the later offset can be read now.
                offset = await reader.readable_until(offset)
                self._observer.on_bytes(digest, offset)
        finally:
            await reader.aclose()
