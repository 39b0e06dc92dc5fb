"""Stores the server's activity in the metadata database (`SqliteActivityLog`): the numbers of pulls, pushes, cache
hits, cache misses, fetched bytes and saved bytes. *Fetched* bytes were downloaded from an upstream registry. *Saved*
bytes were sent from the cache, without a download. There is one row for each hour."""

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
"""Adds up the hours from the time ?1 on, in buckets of ?2 seconds. The integer division rounds down."""


class SqliteActivityLog:
    """Implements `storage.activity.ActivityLog`, which describes the methods. Reads run on the event loop. They are
    short, because there are less than a thousand rows."""

    def __init__(self, db: apsw.Connection, writer: CommitThread | ImmutableDatabase) -> None:
        """Reads with `db` and changes through `writer`; an `ImmutableDatabase` refuses changes."""
        self._db = db
        self._writer = writer

    async def add(self, at: float, activity: Activity) -> None:
        start = int(at) // HOUR_SECONDS * HOUR_SECONDS
        row = (
            *(start, activity.pulls, activity.pushes, activity.hits, activity.misses),
            *(activity.fetched_bytes, activity.saved_bytes),
        )

        def add(db: apsw.Connection) -> None:
            db.execute(_ADD, row)
            db.execute("DELETE FROM activity_hour WHERE start < ?", (start - KEEP_SECONDS,))

        # `ReserveUse.NONE`: on a full disk, statistics must not use the reserved space that deletions need.
        await self._writer.run(add, durable=False, reserve_use=ReserveUse.NONE)

    async def buckets(self, since: float, seconds: int) -> list[ActivityBucket]:
        assert seconds % HOUR_SECONDS == 0
        rows: Any = self._db.execute(_BUCKETS, (int(since) // seconds * seconds, seconds))
        return [ActivityBucket(start, Activity(*numbers)) for start, *numbers in rows]
