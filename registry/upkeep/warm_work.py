"""A job of the server: fetches images from upstream registries before anyone pulls them (`warm_work`)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from registry.request import RequestInvalid
from registry.router import Router
from registry.single_flight import cancel_and_wait
from storage.errors import UpstreamUnavailable
from storage.jobs import JSON
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.job_runner import JobContext, Work

if TYPE_CHECKING:
    from registry.mirror.warm.warmer import WarmResult
    from storage.content import Descriptor
    from storage.names import Digest, ImageReference

WARM_KIND: Final = "warm"
"""The kind of the job."""
MAX_WARMED_IMAGES: Final = 100
"""Largest number of images of one job."""
_REPORT_SECONDS: Final = 1.0
"""Time between two reports of the progress."""


def warm_arguments(references: Sequence[str], platforms: Sequence[str]) -> dict[str, JSON]:
    """Checks and returns the arguments of the job. `references`: names of images, as in `docker pull`. `platforms`: for
    example, `linux/amd64`. `all` stands for every platform. An empty sequence stands for the platform of this machine.
    Raises RequestInvalid."""
    from registry.mirror.warm.targets import ReferencesError, parse_platforms, parse_references

    try:
        images = parse_references(references)
        parse_platforms(platforms)  # only checks them, because the job parses them again
    except (ReferencesError, ValueError) as error:
        raise RequestInvalid(str(error)) from None
    if not images:
        raise RequestInvalid("name at least one image to fetch")
    if len(images) > MAX_WARMED_IMAGES:
        raise RequestInvalid(f"a job fetches at most {MAX_WARMED_IMAGES} images, and these are {len(images)}")
    return {"references": [str(image) for image in images], "platforms": list(platforms)}


def warm_work(store: StoredRegistry, router: Router) -> Work:
    """Returns the function that runs the job. It fetches all images, and reports the number of stored bytes. The
    result is a JSON object. `images`: the number of images. `failed`: how many images could not be fetched completely.
    `results`: the outcome of each image. The job fails with UpstreamUnavailable if all images have failed. If the job
    is stopped, the content that was fetched stays cached."""

    async def work(context: JobContext) -> JSON:
        from registry.mirror.warm.targets import parse_platforms, parse_references
        from registry.mirror.warm.warmer import Warmer

        arguments = context.job.arguments
        images = parse_references(arguments["references"])
        progress = _WarmProgress(len(images))
        platforms = parse_platforms(arguments["platforms"])
        warmer = Warmer(router.locate, store.metadata.known_blobs, platforms, progress)
        task = asyncio.create_task(warmer.warm(images))
        try:
            while not task.done():
                await context.report(
                    progress.stored_bytes, total=progress.total, unit="bytes", message=progress.message
                )
                await asyncio.wait([task], timeout=_REPORT_SECONDS)
            results = await task
        finally:
            await cancel_and_wait([task])
        await context.report(progress.stored_bytes, total=progress.total, save_now=True)
        failed = [result.error for result in results if result.error is not None]
        if len(failed) == len(results):
            raise UpstreamUnavailable(failed[0])
        outcomes = [_outcome(image, result) for image, result in zip(images, results, strict=True)]
        return {"images": len(results), "failed": len(failed), "results": outcomes}

    return work


def _outcome(image: ImageReference, result: WarmResult) -> dict[str, Any]:
    """Returns the outcome of one image as a JSON object. `fetched` and `already_stored` are numbers of bytes."""
    return {
        "image": str(image),
        "fetched": result.fetched,
        "already_stored": result.already_stored,
        "error": result.error,
    }


class _WarmProgress:
    """Counts the bytes of the blobs that the job needs, and the bytes that are stored. It is a `WarmObserver`."""

    def __init__(self, image_count: int) -> None:
        self._image_count = image_count
        self._images_done = 0
        self._stored: dict[Digest, int] = {}
        self._sizes: dict[Digest, int] = {}

    @property
    def stored_bytes(self) -> int:
        """Number of bytes that are stored."""
        return sum(self._stored.values())

    @property
    def total(self) -> int:
        """Total size in bytes of all blobs that the job is known to need so far."""
        return sum(self._sizes.values())

    @property
    def message(self) -> str:
        """A text for people that says how many images are done, including those that could not be fetched."""
        return f"{self._images_done} of {self._image_count} images"

    def on_blob_wanted(self, image: ImageReference, blob: Descriptor) -> None:
        """Records the size of the blob. Several images may have the same blob."""
        self._sizes[blob.digest] = blob.size

    def on_bytes(self, blob: Digest, count: int) -> None:
        """Records how many bytes of the blob are stored."""
        self._stored[blob] = count

    def on_reference_done(self, image: ImageReference, result: WarmResult) -> None:
        """Counts the image as done, even if it could not be fetched."""
        self._images_done += 1
