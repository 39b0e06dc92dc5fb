"""Stores the server's activity in the metadata database (`SqliteActivityLog`): the numbers of pulls, pushes, cache
hits, cache misses, fetched bytes and saved bytes. *Fetched* bytes were downloaded from an upstream registry. *Saved*
bytes were sent from the cache, without a download. Each row has the numbers of one hour."""

from __future__ import annotations

from typing import Any, Final

import apsw

from storage.activity import HOUR_SECONDS, KEEP_SECONDS, Activity, ActivityBucket
from storage.data_dir.reserve import ReserveUse
from storage.metadata.sqlite.commit_thread import CommitThread
from storage.metadata.sqlite.immutable_database import ImmutableDatabase

_ADD: Final = """
INSERT INTO activity_hour (start, pulls, pushes, hits, misses, fetched_bytes, saved_bytes) VALUES (?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (start) DO UPDATE SET
       pulls = pulls + excluded.pulls,
       pushes = pushes + excluded.pushes,
       hits = hits + excluded.hits,
       misses = misses + excluded.misses,
       fetched_bytes = fetched_bytes + excluded.fetched_bytes,
       saved_bytes = saved_bytes + excluded.saved_bytes"""
_BUCKETS: Final = """
SELECT start / ?2 * ?2 AS bucket, sum(pulls), sum(pushes), sum(hits), sum(misses), sum(fetched_bytes), sum(saved_bytes)
  FROM activity_hour WHERE start >= ?1 GROUP BY bucket ORDER BY bucket"""
"""Adds up the numbers of the hours that start at the time ?1 or later, in buckets of ?2 seconds. `start / ?2 * ?2` is
the start of a bucket, because the integer division rounds down."""


class SqliteActivityLog:
    """Implements `storage.activity.ActivityLog`, which describes the methods. Reads run on the event loop, because the
    table has less than a thousand rows."""

    def __init__(self, db: apsw.Connection, writer: CommitThread | ImmutableDatabase) -> None:
        """`db` runs the reads, `writer` runs the changes. An `ImmutableDatabase` refuses every change."""
        self._db = db
        self._writer = writer

    async def add(self, at: float, activity: Activity) -> None:
        start = int(at) // HOUR_SECONDS * HOUR_SECONDS
        row = (
            *(start, activity.pulls, activity.pushes, activity.hits, activity.misses),
            *(activity.fetched_bytes, activity.saved_bytes),
        )

        def write(db: apsw.Connection) -> None:
            db.execute(_ADD, row)
            db.execute("DELETE FROM activity_hour WHERE start < ?", (start - KEEP_SECONDS,))

        # `ReserveUse.NONE`: on a full disk, statistics must not use the reserved space that deletions need.
        await self._writer.run(write, durable=False, reserve_use=ReserveUse.NONE)

    async def buckets(self, since: float, seconds: int) -> list[ActivityBucket]:
        assert seconds % HOUR_SECONDS == 0
        rows: Any = self._db.execute(_BUCKETS, (int(since) // seconds * seconds, seconds))
        return [ActivityBucket(start, Activity(*numbers)) for start, *numbers in rows]
