"""The periods in which a server recorded pulls (`RecordedPeriods`). Retention keeps content that was pulled within a
given time. Only time in which a server ran counts, because nobody can pull while no server runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

MAX_SILENT_SECONDS: Final = 3600.0
"""A server records every few minutes that it runs. If there is no such record for longer than this, no server ran, or
it could not store pulls, or the clock has jumped ahead."""


@dataclass(frozen=True, slots=True)
class RecordedPeriods:
    """The periods in which a server recorded pulls, oldest first. Each is given by its begin and its end, in seconds
    since 1970. The times between two periods are *gaps*. The time before the first period is a gap, too, because no
    server had run on the store yet. Without any period, nothing is known, and all time counts as recorded."""

    periods: Sequence[tuple[float, float]] = ()

    def start_of_window(self, seconds: float, now: float) -> float:
        """Returns the start of a window that ends at `now` and contains `seconds` of recorded time. Without gaps, this
        is `now - seconds`. The time since the end of the last period is a gap, too, if it is longer than
        `MAX_SILENT_SECONDS`. Ignores the parts of periods that are in the future. If no part of a period is left,
        returns `now - seconds`. If the parts that are left contain less than `seconds` in total, returns 0."""
        past_periods = [(start, min(end, now)) for start, end in self.periods if start <= now]
        if past_periods and now - past_periods[-1][1] <= MAX_SILENT_SECONDS:
            past_periods[-1] = past_periods[-1][0], now
        for start, end in reversed(past_periods):
            if seconds <= end - start:
                return end - seconds
            seconds -= end - start
        return 0.0 if past_periods else now - seconds


ALWAYS_RECORDED: Final = RecordedPeriods()
"""No periods: all time counts as recorded."""
