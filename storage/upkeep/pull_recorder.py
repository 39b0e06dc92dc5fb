"""Counts the pulls of manifests in memory, and stores the counts from time to time (`PullRecorder`).

Counting a pull must not slow down the request, so a pull changes only a dictionary. If the process is killed, the pulls
that it has not stored yet are lost.

The pulls are stored with a commit, and each commit empties the response caches of all processes. To empty the caches
only once in `STORE_SECONDS`, all processes store their pulls at the same times: the multiples of `STORE_SECONDS`.

The recorder also records that it runs, because retention counts only the time in which pulls were recorded
(`storage.recorded_periods`).
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
"""Seconds between two times at which the pulls are stored."""
MARK_SECONDS: Final = 300.0
"""Seconds between two times at which the recorder records that it runs. Must be a multiple of `STORE_SECONDS`."""
MAX_COUNTED_MANIFESTS: Final = 100_000
"""Largest number of manifests whose pulls are counted in memory. This number of counts takes about 20 MB. When the
number is reached, the pulls are stored at once. If they cannot be stored, pulls of further manifests are not
counted."""
log = logging.getLogger("storage.pulls")

Locate = Callable[[RepositoryName], Awaitable[tuple[object, RepositoryName, str | None]]]
"""Takes the name of a repository as clients write it. Returns the registry that serves the repository (not used here),
the *stored name* of the repository (its name in the store), and the name of its upstream registry. A *hosted*
repository is not mirrored; for it, the name of the upstream is None. Raises NameUnknown, NameInvalid."""


@dataclass(slots=True)
class _Count:
    """The pulls of one manifest that are not stored yet. `last_pull`: the time of the last pull, in seconds since 1970.
    `pulls`: the number of pulls."""

    last_pull: float
    pulls: int


class PullRecorder:
    """Counts the pulls that one process serves. Used from one event loop.

    `locate` finds the stored names when the pulls are stored. `clock` returns the time in seconds since 1970."""

    def __init__(
        self, pulls: Pulls, locate: Locate, clock: Callable[[], float], *, capacity: int = MAX_COUNTED_MANIFESTS
    ) -> None:
        self._pulls = pulls
        self._locate = locate
        self._clock = clock
        self._capacity = capacity
        self._counts: dict[Pull, _Count] = {}
        """The count of each manifest. The key has only the repository's name and the manifest's digest, so all pulls of
        one manifest have the same key."""
        self._is_full = asyncio.Event()
        self._marked_interval = -1.0
        """The number of the last interval in which `mark_recorded` made a record; -1.0 before the first record. The
        intervals of `MARK_SECONDS` are counted from 1970."""

    def count(self, pull: Pull) -> None:
        """Counts a pull. Takes less than a microsecond."""
        manifest_count = self._counts.get(pull)
        if manifest_count is not None:
            manifest_count.last_pull = self._clock()
            manifest_count.pulls += 1
        elif len(self._counts) < self._capacity:
            self._counts[pull] = _Count(self._clock(), 1)
            if len(self._counts) == self._capacity:
                self._is_full.set()

    async def run(self) -> None:
        """Stores the pulls at the multiples of `STORE_SECONDS`, until the task is cancelled. After an error of the
        store, logs the error and tries again later."""
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
                await self.mark_recorded()
                logged_error = ""
            except Exception as error:
                raise_if_cancelled()
                if logged_error != (logged_error := str(error)):  # logs a repeated error once
                    log_round_error(log, "cannot store when images were last pulled", error)
                # Without this pause, the attempts would follow each other immediately if new pulls fill the dictionary
                # again during each attempt.
                await asyncio.sleep(1.0)

    async def store(self) -> None:
        """Stores the pulls that were counted so far. Pulls that are not stored because of an error or a cancellation
        stay counted in memory. Raises StorageFull, StorageFailed."""
        pulls = list(self._counts)
        for start in range(0, len(pulls), MAX_SAVED_PULLS):
            batch = pulls[start : start + MAX_SAVED_PULLS]
            locations = {repo: await self._find_location(repo) for repo in {repo for repo, _ in batch}}
            counts = [(pull, self._counts.pop(pull)) for pull in batch]
            pulls_to_save = [
                PullCount(location[0], digest, location[1], count.last_pull, count.pulls)
                for (repo, digest), count in counts
                if (location := locations[repo]) is not None
            ]
            try:
                await self._pulls.save(pulls_to_save)  # a cancellation takes effect only after the change has been made
            except RegistryError:
                self._count_again(counts)
                raise

    async def mark_recorded(self) -> None:
        """Records that the recorder runs and has stored all pulls until now. Does this once in each interval of
        `MARK_SECONDS`. Does nothing on a full disk, because retention must not count the time in which no pulls can be
        stored. Raises StorageFailed."""
        now = self._clock()
        if now // MARK_SECONDS != self._marked_interval:
            with suppress(StorageFull):
                await self._pulls.mark_recorded(now)
                self._marked_interval = now // MARK_SECONDS

    async def _find_location(self, repo: RepositoryName) -> tuple[RepositoryName, str] | None:
        """Returns the stored name of a repository, and the name of its upstream (empty if the repository is hosted).
        Returns None if the repository does not exist any more."""
        try:
            _, stored_name, upstream = await self._locate(repo)
        except (NameUnknown, NameInvalid):
            return None
        return stored_name, upstream or ""

    def _count_again(self, counts: list[tuple[Pull, _Count]]) -> None:
        """Adds the pulls of a failed batch to the counts again."""
        for pull, count in counts:
            newer_count = self._counts.setdefault(pull, count)
            if newer_count is not count:
                newer_count.pulls += count.pulls
