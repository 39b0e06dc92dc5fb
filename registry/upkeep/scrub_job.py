"""Runs scrub jobs (`scrub_work`), and starts them on a schedule (`scrub_on_schedule`). A scrub job reads all stored
content to find damage. A *round* is one pass over all content. If a job stops or fails, the next job continues the
round."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Final

from registry.config.upkeep_settings import ScrubSettings
from registry.router import Router
from registry.upkeep.refetch import Refetcher
from storage.background_rounds import run_in_one_process
from storage.damage import DamageRecords
from storage.future_times import is_future
from storage.jobs import JSON, Job
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.job_runner import JobContext, Work
from storage.upkeep.read_rate import ReadRate
from storage.upkeep.scrubber import SCRUB_KIND, OnScrubbed, Scrubber, ignore_scrubbed

CHECK_SECONDS: Final = 300.0
"""Longest time in seconds that a server process waits before it checks again whether a round is due."""
CONTINUE_SECONDS: Final = 86400.0
"""Longest time in seconds between the last progress of an unfinished round and its continuation by the schedule."""
SCHEDULE_SLOT: Final = "scrub schedule"
"""Name of the *slot* (a permit that all processes share) that a process holds while it checks whether a round is
due."""
SCHEDULE_ACTOR: Final = "schedule"
"""The actor of the jobs that a server starts on schedule."""
log = logging.getLogger("registry.upkeep.scrub")


def scrub_arguments(rate: int | None, *, keep_going: bool) -> dict[str, JSON]:
    """Returns the arguments of a scrub job. `rate`: how many bytes to read per second; None: the rate in the settings.
    `keep_going`: whether the job continues after many damaged blobs in a row."""
    return {"rate": rate, "keep_going": keep_going}


def scrub_work(
    settings: ScrubSettings, store: StoredRegistry, router: Router, on_scrubbed: OnScrubbed = ignore_scrubbed
) -> Work:
    """Returns the function that runs a scrub job. The job completes the unfinished round or, if all rounds are
    complete, a new round. It also fetches damaged blobs of mirrored repositories again, with the mirrors of `router`.
    `on_scrubbed`: called with the number of bytes after each read."""

    async def work(context: JobContext) -> JSON:
        arguments: Mapping[str, JSON] = context.job.arguments
        async with Refetcher(store.damage, router, context) as refetcher:
            scrubber = Scrubber(
                store.damage,
                store.quarantine,
                ReadRate(arguments.get("rate") or settings.rate),
                context,
                quarantine_bytes=settings.quarantine_max,
                continue_after_many_damaged=bool(arguments.get("keep_going")),
                on_damaged=refetcher.add,
                on_scrubbed=on_scrubbed,
            )
            result = await scrubber.run()
            await refetcher.finish()
        return {
            **result,
            "fetched": refetcher.fetched,
            "not_fetched": refetcher.failed,
            "still_damaged": await store.damage.damaged_count(),
        }

    return work


async def is_due(damage: DamageRecords, every: float, now: float) -> bool:
    """Returns whether a round should start or continue at the time `now`, in seconds since 1970. The interval is
    `every` seconds, and begins:

    - At the creation of the oldest blob, if there was no round yet. Without blobs, no round is due.
    - At the last progress of the newest round, if this round has not ended. The interval is then at most
      `CONTINUE_SECONDS`.
    - At the end of the newest round, if this round has ended.

    A beginning in the future means that the clock was set back (`storage.future_times`). A round is then due."""
    newest_rounds = await damage.rounds(1)
    if not newest_rounds:
        oldest = await damage.oldest_blob_created_at()
        return oldest is not None and _has_passed(every, oldest, now)
    if newest_rounds[0].ended is None:
        return _has_passed(min(every, CONTINUE_SECONDS), newest_rounds[0].updated, now)
    return _has_passed(every, newest_rounds[0].ended, now)


def _has_passed(seconds: float, since: float, now: float) -> bool:
    return now - since >= seconds or is_future(since, now)


async def queue_scrub_if_due(settings: ScrubSettings, store: StoredRegistry, clock: Callable[[], float]) -> Job | None:
    """If a round is due and no scrub job is queued or running, queues a scrub job and returns it. Otherwise returns
    None. The caller must hold the slot `SCHEDULE_SLOT`."""
    if await store.jobs.active(SCRUB_KIND) or not await is_due(store.damage, settings.every, clock()):
        return None
    return await store.jobs.add(
        SCRUB_KIND, scrub_arguments(None, keep_going=False), actor=SCHEDULE_ACTOR, is_resumable=True
    )


async def scrub_on_schedule(settings: ScrubSettings, store: StoredRegistry, clock: Callable[[], float]) -> None:
    """Queues a scrub job whenever a round is due and no scrub job is queued or running. Runs until the task is
    cancelled. Every server process calls this function, but only one of the processes queues the job. Logs errors and
    continues. `clock` returns seconds since 1970."""

    async def queue_if_due() -> None:
        if (job := await queue_scrub_if_due(settings, store, clock)) is not None:
            log.info("job %d reads all stored content again (scrub)", job.id)

    interval = min(CHECK_SECONDS, settings.every)
    await asyncio.sleep(interval)
    await run_in_one_process(
        store.leases,
        SCHEDULE_SLOT,
        queue_if_due,
        lambda: asyncio.sleep(interval),
        log=log,
        what_failed="scrub cannot be started",
    )
