"""The table of the periods in which a server recorded pulls (`RecordedPeriods`). Times are in seconds since 1970.

Retention rules can keep tags that were pulled within a given time, such as 30 days. Only recorded periods count towards
the 30 days: while no server runs, nobody can pull.
"""

from __future__ import annotations

from typing import Any, Final

import apsw

from storage.future_times import CLOCK_MARGIN_SECONDS
from storage.recorded_periods import MAX_SILENT_SECONDS, RecordedPeriods

MAX_PERIODS: Final = 2000
"""Largest number of periods that the table keeps. If the server stops once a night, the table covers five years."""
_MIN_EXTENSION_SECONDS: Final = 60.0
"""`mark_pulls_recorded` extends a period only by at least this much. All processes of a server call it at about the
same times, and the limit lets only the first of them write."""
_LAST_PERIOD: Final = "SELECT start, until FROM recorded_period ORDER BY start DESC LIMIT 1"
_DELETE_OLDEST: Final = """
DELETE FROM recorded_period WHERE start < (SELECT start FROM recorded_period ORDER BY start DESC LIMIT 1 OFFSET ?)"""


def mark_pulls_recorded(db: apsw.Connection, now: float) -> None:
    """Records that a server runs and has stored the pulls until `now`. Extends the last period to `now`. If the last
    period ended more than `MAX_SILENT_SECONDS` ago, begins a new period. Deletes or shortens periods in the future,
    which were stored while the clock was ahead. The caller begins and commits the transaction."""
    future_start = now + CLOCK_MARGIN_SECONDS
    db.execute("DELETE FROM recorded_period WHERE start > ?", (future_start,))
    db.execute("UPDATE recorded_period SET until = max(start, ?1) WHERE until > ?2", (now, future_start))
    last: Any = db.execute(_LAST_PERIOD).fetchone()
    if last is None or now - last[1] > MAX_SILENT_SECONDS:
        db.execute("INSERT INTO recorded_period (start, until) VALUES (?1, ?1)", (now,))
        db.execute(_DELETE_OLDEST, (MAX_PERIODS - 1,))
    elif now - last[1] >= _MIN_EXTENSION_SECONDS:
        db.execute("UPDATE recorded_period SET until = ? WHERE start = ?", (now, last[0]))


def read_periods(db: apsw.Connection) -> RecordedPeriods:
    """Returns the stored periods, oldest first."""
    rows: list[Any] = db.execute("SELECT start, until FROM recorded_period ORDER BY start").fetchall()
    return RecordedPeriods(rows)
