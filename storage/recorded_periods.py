"""The periods in which a server recorded pulls (`RecordedPeriods`). Retention keeps content that was pulled within a
window of time. The length of the window counts only the time in these periods, because nobody can pull while no server
runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

MAX_SILENT_SECONDS: Final = 3600.0
"""Every few minutes, a server makes a record that it runs and has stored all pulls so far. A period ends with a
record if the next record is made more than this time later."""


@dataclass(frozen=True, slots=True)
class RecordedPeriods:
    """The periods in which a server recorded pulls, oldest first. A period is a pair of its start and its end, in
    seconds since 1970. If `periods` is empty, all time counts as recorded."""

    periods: Sequence[tuple[float, float]] = ()

    def start_of_window(self, seconds: float, now: float) -> float:
        """Returns the start of the window that ends at `now` and contains `seconds` of recorded time. Ignores all
        recorded time after `now`. The last period lasts until `now` if it ended at most `MAX_SILENT_SECONDS` ago.

        - If no period has started by `now`, returns `now - seconds`.
        - If the recorded time is less than `seconds`, returns 0."""
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
