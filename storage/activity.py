"""`ActivityLog`: the interface of a store that counts, for each hour of the last month, the pulls, the pushes, and the
cache hits and misses of the mirrors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

HOUR_SECONDS: Final = 3600
DAY_SECONDS: Final = 24 * HOUR_SECONDS
KEEP_SECONDS: Final = 32 * DAY_SECONDS
"""How long the counts of an hour are kept."""


@dataclass(frozen=True, slots=True)
class Activity:
    """The activity of the server in a period of time.

    - `pulls`, `pushes`: manifests that clients pulled and pushed.
    - `hits`: requests for mirrored content that the mirrors answered with stored content.
    - `misses`: requests for mirrored content that the mirrors had to download.
    - `fetched_bytes`: bytes of content that the mirrors downloaded from the upstreams. `saved_bytes`: bytes of stored
      content that the mirrors sent to clients without a download."""

    pulls: int = 0
    pushes: int = 0
    hits: int = 0
    misses: int = 0
    fetched_bytes: int = 0
    saved_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ActivityBucket:
    """The activity in a period that begins at `start`, in seconds since 1970."""

    start: int
    activity: Activity


class ActivityLog(Protocol):
    """The store of the activity. All processes share this store."""

    async def add(self, at: float, activity: Activity) -> None:
        """Adds activity to the hour that contains `at` (in seconds since 1970), and deletes the counts of hours that
        are older than `KEEP_SECONDS`. A crash of the process loses no added activity; a power cut may lose the newest.
        Raises StorageFull, StorageFailed."""
        ...

    async def buckets(self, since: float, seconds: int) -> list[ActivityBucket]:
        """Returns the activity since the time `since` (in seconds since 1970), in buckets, oldest first. `seconds` is
        the length of each bucket, and must be a multiple of an hour. Each bucket starts at a multiple of `seconds`. The
        first bucket can include activity before `since`. Leaves out empty buckets."""
        ...
