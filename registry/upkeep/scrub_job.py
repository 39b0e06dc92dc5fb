"""Runs scrub jobs, for servers and for the command `entrepot scrub` (`scrub_work`). A scrub job reads all stored
content again to find damage. One complete reading is a *round*. `scrub_on_schedule` decides when a server starts a
scrub job."""

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
"""Each server process checks at this interval, in seconds, whether a round is due."""
CONTINUE_SECONDS: Final = 86400.0
"""A round that a user has stopped, or that has failed, continues after this time in seconds, or after the setting
`every` if that time is shorter."""
SCHEDULE_SLOT: Final = "scrub schedule"
"""Name of the slot that a process holds while it checks whether a round is due. Only one process at a time can hold
it."""
SCHEDULE_ACTOR: Final = "schedule"
"""The actor of a job that a server has started by itself."""
log = logging.getLogger("registry.upkeep.scrub")


def scrub_arguments(rate: int | None, *, keep_going: bool) -> dict[str, JSON]:
    """Returns the arguments of a job. `rate`: bytes per second; None: the rate in the settings. `keep_going`: whether
    the job continues after many damaged blobs in a row."""
    return {"rate": rate, "keep_going": keep_going}


def scrub_work(
    settings: ScrubSettings, store: StoredRegistry, router: Router, on_scrubbed: OnScrubbed = ignore_scrubbed
) -> Work:
    """Returns the function that runs a job. The job completes the current round; if there is none, it starts and
    completes a new one. It also fetches those damaged blobs again that a mirror of `router` can download. `on_scrubbed`
    counts the bytes that are read."""

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
    """Returns whether a round should start or continue at the time `now`:

    - The first round starts when the oldest blob is `every` seconds old, because younger blobs need no check yet.
    - A round that has not ended continues `CONTINUE_SECONDS` after its last progress, or after `every` seconds if that
      time is shorter.
    - Otherwise, a round starts `every` seconds after the end of the last round.

    If one of these intervals begins in the future, because the clock was set back (`storage.future_times`), it counts
    as over."""
    newest_rounds = await damage.rounds(1)
    if not newest_rounds:
        oldest = await damage.oldest_blob_created_at()
        return oldest is not None and _has_passed(every, oldest, now)
    if newest_rounds[0].ended is None:
        return _has_passed(min(every, CONTINUE_SECONDS), newest_rounds[0].updated, now)
    return _has_passed(every, newest_rounds[0].ended, now)


def _has_passed(seconds: float, since: float, now: float) -> bool:
    return now - since >= seconds or is_future(since, now)


async def start_if_due(settings: ScrubSettings, store: StoredRegistry, clock: Callable[[], float]) -> Job | None:
    """Queues a scrub job and returns it, if a round is due and no scrub job is queued or running. Otherwise returns
    None. The caller must hold `SCHEDULE_SLOT`."""
    if await store.jobs.active(SCRUB_KIND) or not await is_due(store.damage, settings.every, clock()):
        return None
    return await store.jobs.add(
        SCRUB_KIND, scrub_arguments(None, keep_going=False), actor=SCHEDULE_ACTOR, is_resumable=True
    )


async def scrub_on_schedule(settings: ScrubSettings, store: StoredRegistry, clock: Callable[[], float]) -> None:
    """Until the task is cancelled, queues a scrub job whenever a round is due and no scrub job is queued or running.
    Every server process calls this function, but only one of them queues the job. After an error, logs it and
    continues. `clock` returns seconds since 1970."""

    async def queue_if_due() -> None:
        if (job := await start_if_due(settings, store, clock)) is not None:
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
