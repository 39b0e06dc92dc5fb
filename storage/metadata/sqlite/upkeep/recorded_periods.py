"""Stores the periods in which a server recorded pulls (`storage.recorded_periods`) in the metadata database. Times are
in seconds since 1970.

Retention rules can keep tags that were pulled within a given time, such as 30 days. The gaps between the periods do not
count towards this time, because nobody can pull while no server runs.
"""

from __future__ import annotations

from typing import Any, Final

import apsw

from storage.future_times import CLOCK_MARGIN_SECONDS
from storage.recorded_periods import MAX_SILENT_SECONDS, RecordedPeriods

MAX_PERIODS: Final = 2000
"""Largest number of periods that are kept. With one gap each night, they cover five years."""
_MIN_STEP_SECONDS: Final = 60.0
"""A process extends the last period only if it ended at least this long ago. All processes of a server do so at about
the same times, so only the first process writes."""
_LAST: Final = "SELECT start, until FROM recorded_period ORDER BY start DESC LIMIT 1"
_DELETE_OLDEST: Final = """
DELETE FROM recorded_period WHERE start < (SELECT start FROM recorded_period ORDER BY start DESC LIMIT 1 OFFSET ?)"""


def mark_recorded(db: apsw.Connection, now: float) -> None:
    """Records that a server runs and has stored the pulls until `now`. Extends the last period, or begins another one
    if the last one ended more than `MAX_SILENT_SECONDS` ago. Corrects periods in the future, which were stored while
    the clock was ahead. Runs inside a transaction, which the caller commits."""
    future_start = now + CLOCK_MARGIN_SECONDS
    db.execute("DELETE FROM recorded_period WHERE start > ?", (future_start,))
    db.execute("UPDATE recorded_period SET until = max(start, ?1) WHERE until > ?2", (now, future_start))
    last: Any = db.execute(_LAST).fetchone()
    if last is None or now - last[1] > MAX_SILENT_SECONDS:
        db.execute("INSERT INTO recorded_period (start, until) VALUES (?1, ?1)", (now,))
        db.execute(_DELETE_OLDEST, (MAX_PERIODS - 1,))
    elif now - last[1] >= _MIN_STEP_SECONDS:
        db.execute("UPDATE recorded_period SET until = ? WHERE start = ?", (now, last[0]))


def read_periods(db: apsw.Connection) -> RecordedPeriods:
    """Returns the stored periods, oldest first."""
    rows: list[Any] = db.execute("SELECT start, until FROM recorded_period ORDER BY start").fetchall()
    return RecordedPeriods(rows)
