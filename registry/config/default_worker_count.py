"""The number of worker processes if the setting `workers` gives none."""

from __future__ import annotations

import os
from typing import Final

MAX_DEFAULT_WORKERS: Final = 4
"""The largest default number of workers. Each worker takes additional memory, so only the setting `workers` can give a
higher number."""


def default_worker_count() -> int:
    """Returns one worker for each processor core that this process may use, from 1 to MAX_DEFAULT_WORKERS."""
    usable_cores = len(os.sched_getaffinity(0))
    return max(1, min(usable_cores, MAX_DEFAULT_WORKERS))
