"""A circuit breaker (`Breaker`): it stops requests after repeated failures, and later permits some requests as a
trial."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

FAILURES_TO_OPEN: Final = 3
"""Number of failures in a row after which a closed breaker opens."""
FIRST_OPEN_SECONDS: Final = 5.0
"""How long a breaker stays open the first time."""
LONGEST_OPEN_SECONDS: Final = 60.0


class Breaker:
    """A circuit breaker. It has three states:

    - *closed*, the first state: requests may be sent. After `FAILURES_TO_OPEN` failures in a row, the breaker opens.
    - *open*: no requests may be sent. After some time, the breaker becomes half-open.
    - *half-open*: requests may be sent as *trials*. After `failures_to_reopen` failed trials, the breaker opens again.
      It then stays open for twice as long as before, but for at most `LONGEST_OPEN_SECONDS`.

    A breaker is *tripped* if it is open or half-open. When a request succeeds, the caller replaces the breaker by a new
    one."""

    def __init__(self, clock: Callable[[], float], max_trials: int = 1, failures_to_reopen: int = 1) -> None:
        """`clock` returns seconds. `max_trials`: largest number of trials that run at the same time.
        `failures_to_reopen`: number of failed trials after which the half-open breaker opens again."""
        self._clock = clock
        self._max_trials = max_trials
        self._failures_to_reopen = failures_to_reopen
        self._failures = 0
        """The number of failures in a row if the breaker is closed. The number of failed trials if it is half-open."""
        self._failed_at = 0.0
        """When the last failure was counted."""
        self._opened_at = 0.0
        self._open_seconds = FIRST_OPEN_SECONDS
        """How long the breaker stays open after `_opened_at`."""
        self._running_trials = 0
        self.is_tripped = False
        """Whether the breaker is open or half-open."""

    @property
    def is_blocking(self) -> bool:
        """Whether a request must not be sent now: the breaker is open, or `max_trials` trials are running."""
        return self.is_tripped and (self.retry_in_seconds > 0 or self._running_trials >= self._max_trials)

    @property
    def is_closed_after_failures(self) -> bool:
        """Whether the breaker has counted at least one failure, but too few to open: it is still closed."""
        return self._failures > 0 and not self.is_tripped

    @property
    def retry_in_seconds(self) -> float:
        """Seconds until the open breaker becomes half-open; 0 or less if the breaker is not open."""
        if not self.is_tripped:
            return 0.0
        # The limit applies if the clock was set back.
        return min(self._opened_at + self._open_seconds - self._clock(), self._open_seconds)

    @contextmanager
    def trial(self) -> Iterator[None]:
        """Context manager for a request. If the breaker is tripped, counts the request as a running trial."""
        is_trial = self.is_tripped
        self._running_trials += is_trial
        try:
            yield
        finally:
            self._running_trials -= is_trial

    def on_failure(self, started_at: float) -> None:
        """Counts the failure of a request that started at `started_at`. Opens the breaker after enough failures.

        - A closed breaker ignores requests that started before the last counted failure. So if one outage makes many
          running requests fail, it counts once.
        - A tripped breaker ignores requests that started before it opened. It counts each failed trial."""
        counted_since = self._opened_at if self.is_tripped else self._failed_at
        # If `counted_since` is in the future, the clock was set back, and the failure is counted.
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
        """Opens the breaker for `_open_seconds` from now, even if it is already open."""
        self.is_tripped = True
        self._opened_at = self._clock()
        self._failures = 0

    def make_half_open(self) -> None:
        """Makes the breaker half-open now. If the trials fail, the breaker opens for `FIRST_OPEN_SECONDS`."""
        self.open()
        self._open_seconds = 0.0
