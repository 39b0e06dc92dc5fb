"""Recognizes stored times that are in the future (`is_future`), and corrects those of files (`corrected_write_time`).
Such a time is wrong: it was stored while the clock of the machine was ahead, and the clock has been set back since
then.

Code that compares a stored time with the present time must not wait until the clock has reached a time in the future:
this can take years.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import Final

CLOCK_MARGIN_SECONDS: Final = 60.0
"""A time is in the future if it is more than this many seconds later than the present time. A smaller difference can
occur although the clock is right: a change of the store first reads the clock, and then waits for other changes to end.
For example, it reads 10:00:00, and then waits for a change that stores the time 10:00:02. The margin is longer than
such a wait."""


def is_future(stored_time: float, now: float) -> bool:
    """Returns whether the stored time is in the future at the time `now`. Both are in seconds since 1970."""
    return stored_time > now + CLOCK_MARGIN_SECONDS


def corrected_write_time(path: str | os.PathLike[str], status: os.stat_result) -> float:
    """Returns when the file at `path`, whose status is `status`, was last written, in seconds since 1970. If this time
    is in the future, returns the present time instead, and sets it as the file's time. So the age of a file that was
    written while the clock was ahead counts from now on. The present time is that of the machine's clock, because the
    times of files come from this clock."""
    now = time.time()
    if not is_future(status.st_mtime, now):
        return status.st_mtime
    with suppress(OSError):  # the file was deleted meanwhile, or may not be changed
        os.utime(path, (now, now))
    return now
