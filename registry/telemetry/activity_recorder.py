"""`ActivityRecorder`: stores the activity of the server (such as pulls and pushes) from time to time.

All processes count the activity in shared memory, and one process stores these counts in the database. Each commit
empties the response caches of all processes. To cause few commits, the process stores new activity only every 5
minutes, at times at which `storage.upkeep.pull_recorder` commits the pulls of manifests. If the server is killed, the
activity that is not stored yet is lost.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from registry.telemetry.activity import ActivityCounts
from storage.activity import Activity, ActivityLog
from storage.background_rounds import log_round_error, raise_if_cancelled
from storage.leases import Leases

STORE_SECONDS: Final = 300.0
"""Seconds between two times at which activity is stored: a multiple of `pull_recorder.STORE_SECONDS`."""
SLOT_NAME: Final = "activity"
"""Name of the *slot*: the permit to store the activity. Only one process at a time can hold the slot."""
_LATE_SECONDS: Final = 10.0
"""Activity that is stored within this number of seconds after the end of an hour counts for that hour."""
log = logging.getLogger("registry.telemetry")


class ActivityRecorder:
    """Stores activity in `activity_log`. Used from one event loop. `clock` returns seconds since 1970."""

    def __init__(
        self, activity_log: ActivityLog, leases: Leases, counts: ActivityCounts, clock: Callable[[], float]
    ) -> None:
        self._activity_log = activity_log
        self._leases = leases
        self._counts = counts
        self._clock = clock

    async def run(self) -> None:
        """Stores the activity at the multiples of `STORE_SECONDS`, until the task is cancelled. Every server process
        runs this method, but only the process that holds the slot stores the activity. After an error, gives up the
        slot and tries again later. Logs an error only if its text differs from that of the previous error."""
        logged_error = ""
        while True:
            try:
                async with self._leases.try_slot(SLOT_NAME, count=1) as has_slot:
                    while has_slot:
                        await self._wait()
                        await self.store()
                        logged_error = ""
            except Exception as error:
                raise_if_cancelled()
                if logged_error != (logged_error := str(error)):
                    log_round_error(log, "cannot store the activity counts", error)
            await self._wait()

    async def store(self) -> None:
        """Stores the activity of all processes that is not stored yet. Raises StorageFull, StorageFailed. After an
        error, the next call stores the activity.

        Does nothing if this process has no *column*: cells of the shared memory to which only this process writes.
        Without a column, the process cannot record which activity it has stored."""
        if not self._counts.has_own_column:
            return
        activity = self._counts.compute_unstored()
        if activity != Activity():
            await self._activity_log.add(self._clock() - _LATE_SECONDS, activity)
            self._counts.record_stored(activity)

    async def store_last(self) -> None:
        """Stores the remaining activity at the end of this process, unless another process holds the slot. Logs an
        error instead of raising it; the activity is then lost."""
        try:
            async with self._leases.try_slot(SLOT_NAME, count=1) as has_slot:
                if has_slot:
                    await self.store()
        except Exception as error:
            log.warning("the activity of the last minutes is lost: %s", error)

    async def _wait(self) -> None:
        await asyncio.sleep(STORE_SECONDS - self._clock() % STORE_SECONDS)
