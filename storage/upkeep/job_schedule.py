"""Queues jobs of one kind at an interval (`queue_jobs`). The interval begins when the newest job of this kind was added
to the store, by a schedule or by a person. A restart of the server does not change the time of the next job."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from storage.background_rounds import run_in_one_process
from storage.future_times import is_future
from storage.jobs import Jobs
from storage.leases import Leases

CHECK_SECONDS: Final = 60.0
"""Longest time between two checks whether a job is due. Also the longest time from the start of the process to the
first check."""
log = logging.getLogger("storage.jobs")


async def queue_jobs(
    jobs: Jobs,
    leases: Leases,
    kind: str,
    interval_seconds: float,
    clock: Callable[[], float],
    *,
    actor: str,
    check_seconds: float = CHECK_SECONDS,
) -> None:
    """Queues a job of the kind `kind` whenever two conditions are met: no job of this kind is queued or running, and
    `interval_seconds` have passed since the newest job of this kind was added. The job is *resumable*: a server
    continues it after a restart.

    Runs until the task is cancelled. Every process runs this function, but only one process at a time queues jobs. Logs
    errors and continues. `actor`: the name of the actor that the job records. `clock` returns the time in seconds since
    1970."""

    async def queue_if_due() -> None:
        if await _is_due(jobs, kind, interval_seconds, clock()):
            await jobs.add(kind, {}, actor=actor, is_resumable=True)

    seconds = min(interval_seconds, check_seconds)
    await asyncio.sleep(seconds)
    await run_in_one_process(
        leases,
        f"schedule of {kind}",
        queue_if_due,
        lambda: asyncio.sleep(seconds),
        log=log,
        what_failed=f"cannot queue a job of the kind {kind}",
    )


async def _is_due(jobs: Jobs, kind: str, interval_seconds: float, now: float) -> bool:
    """Returns whether to queue a job of the kind. Returns True in two cases:

    - There is no job of the kind.
    - The newest job of the kind has ended, and was added at least `interval_seconds` ago or at a time in the future.
      Such a time is wrong (`storage.future_times`)."""
    newest = (await jobs.jobs(None, 1, kind)).items
    if not newest:
        return True
    created = newest[0].created
    return newest[0].ended is not None and (now - created >= interval_seconds or is_future(created, now))
