"""Reads when a file was last written, and corrects times in the future (`past_write_time`)."""

from __future__ import annotations

import os
import time
from contextlib import suppress

from storage.future_times import is_future


def past_write_time(path: str | os.PathLike[str], status: os.stat_result) -> float:
    """Returns when the file at `path`, whose status is `status`, was last written, in seconds since 1970. If this time
    is in the future (`storage.future_times`), returns the present time instead, and also gives it to the file. So the
    age of a file that was written while the clock was ahead counts from now on. The present time is that of the
    machine's clock, because the times of files come from this clock."""
    now = time.time()
    if not is_future(status.st_mtime, now):
        return status.st_mtime
    with suppress(OSError):  # the file was deleted meanwhile, or may not be changed
        os.utime(path, (now, now))
    return now
