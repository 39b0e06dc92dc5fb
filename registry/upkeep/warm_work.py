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
"""The kind of the job in the list of jobs."""
MAX_WARMED_IMAGES: Final = 100
"""Largest number of images of one job."""
_REPORT_SECONDS: Final = 1.0
"""Time between two reports of the progress."""


def check_warm_arguments(references: Sequence[str], platforms: Sequence[str]) -> dict[str, JSON]:
    """Checks the arguments of the job and returns them as a JSON object. Raises RequestInvalid.

    - `references`: names of images, as in `docker pull`. At least one, at most `MAX_WARMED_IMAGES`.
    - `platforms`: names of platforms, such as `linux/amd64`, or `all`. Empty: the platform of this machine."""
    from registry.mirror.warm.targets import ReferencesError, parse_platforms, parse_references

    try:
        images = parse_references(references)
        parse_platforms(platforms)  # only a check: the job parses the platforms again
    except (ReferencesError, ValueError) as error:
        raise RequestInvalid(str(error)) from None
    if not images:
        raise RequestInvalid("name at least one image to fetch")
    if len(images) > MAX_WARMED_IMAGES:
        raise RequestInvalid(f"a job fetches at most {MAX_WARMED_IMAGES} images, not {len(images)}")
    return {"references": [str(image) for image in images], "platforms": list(platforms)}


def warm_work(store: StoredRegistry, router: Router) -> Work:
    """Returns the function that does the work of the job: it fetches the images, and reports how many bytes are stored.
    The function raises UpstreamUnavailable if all images have failed. If the job is stopped, fetched content stays
    cached. The function returns a JSON object:

    - `images`: the number of images.
    - `failed`: the number of images whose outcome has an error.
    - `results`: the outcome of each image."""

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
                    progress.stored_bytes, total=progress.total_bytes, unit="bytes", message=progress.message
                )
                await asyncio.wait([task], timeout=_REPORT_SECONDS)
            results = await task
        finally:
            await cancel_and_wait([task])
        await context.report(progress.stored_bytes, total=progress.total_bytes, save_now=True)
        errors = [result.error for result in results if result.error is not None]
        if len(errors) == len(results):
            raise UpstreamUnavailable(errors[0])
        outcomes = [_outcome(image, result) for image, result in zip(images, results, strict=True)]
        return {"images": len(results), "failed": len(errors), "results": outcomes}

    return work


def _outcome(image: ImageReference, result: WarmResult) -> dict[str, Any]:
    """Returns the outcome of one image as a JSON object: the name of the image, and some fields of `WarmResult`."""
    return {
        "image": str(image),
        "fetched": result.fetched,
        "already_stored": result.already_stored,
        "error": result.error,
    }


class _WarmProgress:
    """The progress of one job. Implements `WarmObserver`."""

    def __init__(self, image_count: int) -> None:
        self._image_count = image_count
        self._images_done = 0
        self._stored: dict[Digest, int] = {}
        self._sizes: dict[Digest, int] = {}

    @property
    def stored_bytes(self) -> int:
        """Number of stored bytes of the blobs that the job needs."""
        return sum(self._stored.values())

    @property
    def total_bytes(self) -> int:
        """Total size in bytes of the blobs that were reported to `on_blob_wanted`."""
        return sum(self._sizes.values())

    @property
    def message(self) -> str:
        """The progress as text, such as `3 of 5 images`. Images that could not be fetched count as done."""
        return f"{self._images_done} of {self._image_count} images"

    def on_blob_wanted(self, image: ImageReference, blob: Descriptor) -> None:
        """Records the size of the blob. A blob that several images need counts once."""
        self._sizes[blob.digest] = blob.size

    def on_bytes(self, blob: Digest, count: int) -> None:
        """Records that `count` bytes of the blob are stored."""
        self._stored[blob] = count

    def on_reference_done(self, image: ImageReference, result: WarmResult) -> None:
        """Counts the image as done, even if it could not be fetched."""
        self._images_done += 1
