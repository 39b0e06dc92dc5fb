"""Counts the pulls of manifests in memory, and stores the counts from time to time (`PullRecorder`).

Counting a pull must not slow down the request, so `PullRecorder.count` changes only a dictionary. If the process is
killed, the counts that it has not stored yet are lost.

Each commit to the store empties the response caches of all processes. To empty the caches only once in `STORE_SECONDS`,
all processes store their counts at the same times: the multiples of `STORE_SECONDS`.

The recorder also records at which times it runs. Retention keeps an image that was pulled within a given time, such as
30 days. These days include only the times in which a recorder ran (`storage.recorded_periods`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from storage.background_rounds import log_round_error, raise_if_cancelled
from storage.content import Pull
from storage.errors import NameInvalid, NameUnknown, RegistryError, StorageFull
from storage.names import RepositoryName
from storage.pulls import MAX_SAVED_PULLS, PullCount, Pulls

STORE_SECONDS: Final = 30.0
"""Seconds between two times at which the counts are stored."""
MARK_SECONDS: Final = 300.0
"""Seconds between two times at which the recorder records that it runs. Must be a multiple of `STORE_SECONDS`."""
MAX_COUNTED_MANIFESTS: Final = 100_000
"""Largest number of manifests whose pulls are counted in memory, which takes about 20 MB. When the number is reached,
the recorder stores the counts at once. Until they are stored, it does not count pulls of further manifests."""
log = logging.getLogger("storage.pulls")

Locate = Callable[[RepositoryName], Awaitable[tuple[object, RepositoryName, str | None]]]
"""A function that finds a repository by the name that clients use. Returns three values: the registry that serves the
repository (not used here), the repository's *stored name* (its name in the store), and the name of its upstream
registry, or None if the repository is not mirrored. Raises NameUnknown, NameInvalid."""


@dataclass(slots=True)
class _Count:
    """The pulls of one manifest that are not stored yet. `last_pull`: the time of the last pull, in seconds since 1970.
    `pulls`: the number of pulls."""

    last_pull: float
    pulls: int


class PullRecorder:
    """Counts the pulls that one process serves. Used from one event loop.

    `locate` finds the stored names when the counts are stored. `clock` returns the time in seconds since 1970.
    `capacity` is the largest number of manifests whose pulls are counted in memory."""

    def __init__(
        self, pulls: Pulls, locate: Locate, clock: Callable[[], float], *, capacity: int = MAX_COUNTED_MANIFESTS
    ) -> None:
        self._pull_store = pulls
        self._locate = locate
        self._clock = clock
        self._capacity = capacity
        self._counts: dict[Pull, _Count] = {}
        """The count of each manifest, by its repository's name and its digest."""
        self._is_full = asyncio.Event()
        self._marked_interval = -1.0
        """The number of the interval in which `mark_pulls_recorded` made its last record. The intervals have
        `MARK_SECONDS`, and are counted from 1970. -1.0 before the first record."""

    def count(self, pull: Pull) -> None:
        """Counts a pull. Ignores it if the manifest has no count yet and `capacity` is reached. Takes less than a
        microsecond."""
        manifest_count = self._counts.get(pull)
        if manifest_count is not None:
            manifest_count.last_pull = self._clock()
            manifest_count.pulls += 1
        elif len(self._counts) < self._capacity:
            self._counts[pull] = _Count(self._clock(), 1)
            if len(self._counts) == self._capacity:
                self._is_full.set()

    async def run(self) -> None:
        """Stores the counts until the task is cancelled: at the multiples of `STORE_SECONDS`, and when `capacity` is
        reached. If an error occurs, logs it and tries again later."""
        logged_error = ""
        while True:
            try:
                async with asyncio.timeout(STORE_SECONDS - self._clock() % STORE_SECONDS):
                    await self._is_full.wait()
            except TimeoutError:
                pass
            self._is_full.clear()
            try:
                await self.store()
                await self.mark_pulls_recorded()
                logged_error = ""
            except Exception as error:
                raise_if_cancelled()
                if logged_error != (logged_error := str(error)):  # logs a repeated error once
                    log_round_error(log, "cannot store when images were last pulled", error)
                # Limits the rate of attempts, because a full dictionary starts the next attempt at once.
                await asyncio.sleep(1.0)

    async def store(self) -> None:
        """Stores the counts and removes them from memory. After an error or a cancellation, the counts that were not
        stored stay in memory. Raises StorageFull, StorageFailed."""
        counted = list(self._counts)
        for start in range(0, len(counted), MAX_SAVED_PULLS):
            batch = counted[start : start + MAX_SAVED_PULLS]
            locations = {repo: await self._find_location(repo) for repo in {repo for repo, _ in batch}}
            counts = [(pull, self._counts.pop(pull)) for pull in batch]
            new_pulls = [
                PullCount(location[0], digest, location[1], count.last_pull, count.pulls)
                for (repo, digest), count in counts
                if (location := locations[repo]) is not None
            ]
            try:
                await self._pull_store.save(new_pulls)  # a cancellation takes effect only after the change
            except RegistryError:
                self._put_back(counts)
                raise

    async def mark_pulls_recorded(self) -> None:
        """Records that the recorder runs and has stored all pulls until now. Makes at most one record in each interval
        of `MARK_SECONDS`. Makes no record on a full disk: retention must not count times in which no pulls can be
        stored. Raises StorageFailed."""
        now = self._clock()
        if now // MARK_SECONDS != self._marked_interval:
            with suppress(StorageFull):
                await self._pull_store.mark_pulls_recorded(now)
                self._marked_interval = now // MARK_SECONDS

    async def _find_location(self, repo: RepositoryName) -> tuple[RepositoryName, str] | None:
        """Returns the stored name of a repository, and the name of its upstream, which is empty if the repository is
        not mirrored. Returns None if the repository does not exist any more."""
        try:
            _, stored_name, upstream = await self._locate(repo)
        except (NameUnknown, NameInvalid):
            return None
        return stored_name, upstream or ""

    def _put_back(self, counts: list[tuple[Pull, _Count]]) -> None:
        """Puts the counts of a failed batch back into memory. Adds them to the counts of newer pulls."""
        for pull, count in counts:
            newer_count = self._counts.setdefault(pull, count)
            if newer_count is not count:
                newer_count.pulls += count.pulls
