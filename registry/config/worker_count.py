"""Decides the number of workers (server processes) when the setting `workers` is not given."""

from __future__ import annotations

import os

MAX_DEFAULT_WORKERS = 4
"""Largest number of workers without the setting. Each worker takes memory of its own, so a larger number has to be set
with `workers`."""


def default_worker_count() -> int:
    """Returns one worker for each processor core that this process may use, from 1 to MAX_DEFAULT_WORKERS."""
    usable_cores = len(os.sched_getaffinity(0))
    return max(1, min(usable_cores, MAX_DEFAULT_WORKERS))
