"""Recognizes stored times that are in the future (`is_future`), and repairs such times of files (`repair_write_time`).
A stored time is in the future if it was stored while the machine's clock was ahead, and the clock was set back
afterwards. No code may wait until the clock has reached such a time, because this can take years.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import Final

CLOCK_MARGIN_SECONDS: Final = 60.0
"""A time is in the future if it is more than this many seconds later than the present time. A smaller difference can
occur although the clock is right. For example, task A reads the present time and then waits. Meanwhile task B stores a
later time. After the wait, task A compares B's stored time with the time that A has read, which is earlier. The margin
is longer than such a wait."""


def is_future(stored_time: float, now: float) -> bool:
    """Returns whether the stored time is in the future at the time `now`. Both are in seconds since 1970."""
    return stored_time > now + CLOCK_MARGIN_SECONDS


def repair_write_time(path: str | os.PathLike[str], status: os.stat_result) -> float:
    """Returns when the file at `path` was last written, in seconds since 1970. `status`: the status of the file. If the
    time of the last write is in the future, sets it to the present time, and returns the present time. Reads the
    machine's clock, because the times of files come from this clock."""
    now = time.time()
    if not is_future(status.st_mtime, now):
        return status.st_mtime
    with suppress(OSError):  # the file was deleted meanwhile, or this process lacks the permission to change it
        os.utime(path, (now, now))
    return now
