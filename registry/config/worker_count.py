"""The default of the setting `workers`, the number of server processes."""

from __future__ import annotations

import os

MAX_DEFAULT_WORKERS = 4
"""The largest default number of workers. Each worker takes additional memory, so only the setting `workers` can give a
higher number."""


def default_worker_count() -> int:
    """Returns one worker for each processor core that this process may use, from 1 to MAX_DEFAULT_WORKERS."""
    usable_cores = len(os.sched_getaffinity(0))
    return max(1, min(usable_cores, MAX_DEFAULT_WORKERS))
