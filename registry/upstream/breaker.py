"""A circuit breaker (`Breaker`), which stops requests after repeated failures and lets single requests try again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

FAILURES_TO_OPEN: Final = 3
"""Number of failures in a row that open a breaker."""
FIRST_OPEN_SECONDS: Final = 5.0
"""Time for which a breaker stays open the first time. Failed trials double the time."""
LONGEST_OPEN_SECONDS: Final = 60.0


class Breaker:
    """A circuit breaker. It is *closed* at first, and requests may be sent. After `FAILURES_TO_OPEN` failures in a row,
    it is *open* for some time, and no requests may be sent. Then it is *half-open*: requests may be sent as *trials*.
    If the trials fail, the breaker is open again, for twice the time. An open or half-open breaker is *tripped*. The
    caller replaces the breaker by a new one when a request succeeds."""

    def __init__(self, clock: Callable[[], float], max_trials: int = 1, failures_to_reopen: int = 1) -> None:
        """`clock` returns seconds. `max_trials`: largest number of trials that run at the same time.
        `failures_to_reopen`: number of failed trials after which the half-open breaker is open again."""
        self._clock = clock
        self._max_trials = max_trials
        self._failures_to_reopen = failures_to_reopen
        self._failures = 0
        """While the breaker is closed: the failures in a row. While it is half-open: the failed trials."""
        self._failed_at = 0.0
        """When the last failure was counted."""
        self._opened_at = 0.0
        self._open_seconds = FIRST_OPEN_SECONDS
        """How long the breaker is open after `_opened_at`."""
        self._running_trials = 0
        self.is_tripped = False
        """Whether the breaker is open or half-open."""

    @property
    def is_blocking(self) -> bool:
        """Whether a request must not be sent now: the breaker is open, or `max_trials` trials are running."""
        return self.is_tripped and (self.retry_in_seconds > 0 or self._running_trials >= self._max_trials)

    @property
    def is_closed_after_failures(self) -> bool:
        """True if the last request failed, but too few requests in a row have failed to open the breaker."""
        return self._failures > 0 and not self.is_tripped

    @property
    def retry_in_seconds(self) -> float:
        """Seconds until the open breaker becomes half-open; 0 or less if the breaker is not open."""
        if not self.is_tripped:
            return 0.0
        # If the clock was set back, the computed time is too long. Therefore it is limited to `_open_seconds`.
        return min(self._opened_at + self._open_seconds - self._clock(), self._open_seconds)

    @contextmanager
    def trial(self) -> Iterator[None]:
        """Context manager around a request. The request is a trial if the breaker is half-open."""
        is_trial = self.is_tripped
        self._running_trials += is_trial
        try:
            yield
        finally:
            self._running_trials -= is_trial

    def on_failure(self, started_at: float) -> None:
        """Counts the failure of a request that started at `started_at`. Opens the breaker after enough failures.

        While the breaker is closed, failures of requests that run at the same time count as one, because one outage
        makes all of them fail. So a failure is not counted if its request started before the last counted failure.

        While the breaker is tripped, each failed trial counts, even if trials run at the same time. Failures of
        requests that started before the breaker opened do not count."""
        counted_since = self._opened_at if self.is_tripped else self._failed_at
        # If `counted_since` is later than now, the clock was set back, and the failure is counted.
        if started_at < counted_since <= self._clock():
            return
        self._failures += 1
        self._failed_at = self._clock()
        if not self.is_tripped and self._failures >= FAILURES_TO_OPEN:
            self.open()
        elif self.is_tripped and self._failures >= self._failures_to_reopen:
            self._open_seconds = min(max(self._open_seconds * 2, FIRST_OPEN_SECONDS), LONGEST_OPEN_SECONDS)
            self.open()

    def open(self) -> None:
        """Opens the breaker now, for `_open_seconds`. If it is open already, the time starts again."""
        self.is_tripped = True
        self._opened_at = self._clock()
        self._failures = 0

    def make_half_open(self) -> None:
        """Makes the breaker half-open now, so that a trial may be sent immediately. If the trial fails, the breaker is
        open for `FIRST_OPEN_SECONDS`."""
        self.open()
        self._open_seconds = 0.0
