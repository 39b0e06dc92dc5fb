"""Recognizes stored times that are in the future (`is_future`). Such a time is wrong: it was stored while the clock of
the machine was ahead, and the clock has been set back since then.

Code that compares a stored time with the present time must not wait until the clock has reached a time in the future,
because that can take years.
"""

from __future__ import annotations

from typing import Final

CLOCK_MARGIN_SECONDS: Final = 60.0
"""A time is in the future if it is more than this many seconds later than the present time. There is a margin because a
change reads the clock first and then waits for earlier changes, which may store slightly later times. The margin is
longer than such a wait."""


def is_future(stored_time: float, now: float) -> bool:
    """Returns whether the stored time is in the future at the time `now`. Both are in seconds since 1970."""
    return stored_time > now + CLOCK_MARGIN_SECONDS
