"""Scheduled warming: one server process repeatedly fetches the images that the settings name into the mirror's cache,
before clients request them.

A *round* fetches all images of one upstream once. The settings say how long to wait between two rounds of an upstream.
The rounds of different upstreams run independently, so a slow upstream delays only its own images.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from registry.config.mirror_settings import WarmSettings
from registry.mirror.warm.targets import ReferencesError, parse_platforms, parse_references, read_references
from registry.mirror.warm.warmer import FindStoredBlobs, Locate, Warmer, WarmObserver, WarmResult
from registry.single_flight import cancel_and_wait
from storage.background_rounds import raise_if_cancelled, run_in_one_process
from storage.content import Descriptor
from storage.errors import RegistryError
from storage.leases import Leases
from storage.names import Digest, ImageReference

WARM_SLOT = "warm"
"""Name of the *slot*, a permit that only one process at a time can hold. The process that holds the slot runs the
rounds."""
FIRST_ROUND_DELAY_SECONDS = 60.0
"""Longest time from the start of the server to the first round. If the interval between two rounds is shorter, the
first round starts after one interval."""
TAKEOVER_POLL_SECONDS = 15.0
"""Longest time between two attempts of a process to get the slot."""
log = logging.getLogger("registry.mirror.warm")


class WarmLog(WarmObserver):
    """Receives the reports of a round, and logs the result for each image reference."""

    def on_blob_wanted(self, image: ImageReference, blob: Descriptor) -> None:
        """Logs nothing."""

    def on_bytes(self, blob: Digest, count: int) -> None:
        """Logs nothing."""

    def on_reference_done(self, image: ImageReference, result: WarmResult) -> None:
        """Logs the error, or how many bytes were fetched. Logs nothing if the whole image was cached before."""
        if result.error:
            log.warning("%s is not completely cached: %s", image, result.error)
        elif result.fetched:
            log.info(
                "%s is cached: %d bytes were fetched, %d were cached before",
                image,
                result.fetched,
                result.already_stored,
            )


@asynccontextmanager
async def warm_on_schedule(
    settings: WarmSettings, locate: Locate, find_stored: FindStoredBlobs, leases: Leases
) -> AsyncIterator[None]:
    """Runs rounds in the background while the `async with` block runs. Every server process calls this function, but
    only one process at a time runs rounds. When this process ends, another process takes over. Does nothing if the
    settings name no images. `locate`: finds the mirror that serves a repository. `find_stored`: returns which of the
    given blobs are completely stored."""
    if not settings.references and settings.file is None:
        yield
        return
    rounds_task = asyncio.create_task(_run_rounds(settings, locate, find_stored, leases))
    try:
        yield
    finally:
        await cancel_and_wait([rounds_task])


async def _run_rounds(settings: WarmSettings, locate: Locate, find_stored: FindStoredBlobs, leases: Leases) -> None:
    """Waits until this process gets the slot, and then runs the rounds of all upstreams. Ends only when it is
    cancelled."""
    await asyncio.sleep(min(FIRST_ROUND_DELAY_SECONDS, settings.interval))
    await run_in_one_process(
        leases,
        WARM_SLOT,
        lambda: _run_rounds_of_all_upstreams(settings, locate, find_stored),
        lambda: asyncio.sleep(min(TAKEOVER_POLL_SECONDS, settings.interval)),
        log=log,
        what_failed="cannot find out whether another process warms the mirror",
    )


async def _run_rounds_of_all_upstreams(settings: WarmSettings, locate: Locate, find_stored: FindStoredBlobs) -> None:
    """Runs the rounds of all upstreams. Starts the next round of an upstream `settings.interval` seconds after the
    previous round of this upstream has ended. Ends only when it is cancelled, and then cancels the running rounds."""
    rounds: dict[str | None, asyncio.Task[None]] = {}
    """The tasks that run `_run_round_and_pause`, by upstream."""
    try:
        while True:
            rounds = {upstream: task for upstream, task in rounds.items() if not task.done()}
            for upstream, images in (await _images_by_upstream(settings, locate)).items():
                if upstream not in rounds:
                    rounds[upstream] = asyncio.create_task(_run_round_and_pause(settings, locate, find_stored, images))
            if rounds:
                # The timeout makes the loop read the images again, because the file may have changed meanwhile.
                await asyncio.wait(rounds.values(), timeout=settings.interval, return_when=asyncio.FIRST_COMPLETED)
            else:
                await asyncio.sleep(settings.interval)
    finally:
        await cancel_and_wait(rounds.values())


async def _images_by_upstream(settings: WarmSettings, locate: Locate) -> dict[str | None, list[ImageReference]]:
    """Returns the images to warm, by the name of their upstream. The key None stands for the images for which
    `_find_upstream` returns None. If the list of images cannot be read or is not valid, or after an unexpected error,
    logs the error and returns an empty dict."""
    images_by_upstream: dict[str | None, list[ImageReference]] = {}
    try:
        from_file = read_references(settings.file) if settings.file else []
        for image in parse_references([*settings.references, *from_file]):
            images_by_upstream.setdefault(await _find_upstream(locate, image), []).append(image)
    except ReferencesError as error:
        log.warning("no image is warmed in this round: %s", error)
    except Exception:
        _log_unexpected_error()
        return {}
    return images_by_upstream


async def _find_upstream(locate: Locate, image: ImageReference) -> str | None:
    """Returns the name of the image's upstream. Returns None if the image has no upstream, or if the look-up fails. A
    failed look-up is not logged here, because the round that fetches the image repeats the look-up and logs the
    error."""
    try:
        _, _, upstream = await locate(image.repository)
    except RegistryError:
        return None
    return upstream


async def _run_round_and_pause(
    settings: WarmSettings, locate: Locate, find_stored: FindStoredBlobs, images: Sequence[ImageReference]
) -> None:
    """Fetches each image of an upstream once, and then waits `settings.interval` seconds. Logs errors. Raises only
    CancelledError."""
    try:
        await Warmer(locate, find_stored, parse_platforms(settings.platforms), WarmLog()).warm(images)
    except Exception:
        _log_unexpected_error()
    await asyncio.sleep(settings.interval)


def _log_unexpected_error() -> None:
    """Logs the error that the caller's `except` clause handles, with a traceback. If this task is being cancelled,
    raises CancelledError instead (see `raise_if_cancelled`)."""
    raise_if_cancelled()
    log.exception("warming the mirror failed; the next round tries again")
