"""The result of one attempt to deliver an event to a webhook (`AttemptResult`), and the waits after failed attempts
(`WebhookHealth`). `DeliveryObserver` is the interface of objects that count or log the results of attempts. The
*endpoint* of a webhook is the URL to which its events are sent."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Final, NamedTuple, Protocol

FIRST_PAUSE_SECONDS: Final = 1.0
"""Upper limit of the wait after the first failure."""
LONGEST_PAUSE_SECONDS: Final = 300.0
"""Upper limit of the wait after any number of failures in a row."""
LONGEST_ENDPOINT_PAUSE_SECONDS: Final = 5.0
"""Upper limit of the pause of an endpoint that is down. It is low, because the endpoint may accept events of another
repository."""
MAX_FAILING_REPOSITORIES: Final = 10_000
"""Largest number of repositories whose failures a `WebhookHealth` remembers."""


class DeliveryOutcome(StrEnum):
    """How an attempt ended.

    - `DELIVERED`: the endpoint answered 2xx.
    - `DOWN`: the endpoint did not answer, or answered that it is not available now.
    - `REFUSED`: the endpoint gave any other answer."""

    DELIVERED = "delivered"
    REFUSED = "refused"
    DOWN = "down"


class AttemptResult(NamedTuple):
    """The outcome of an attempt. `reason`: why the attempt failed, as a text for people; empty if the event was
    delivered."""

    outcome: DeliveryOutcome
    reason: str = ""


class DeliveryObserver(Protocol):
    """Receives reports about deliveries, for example to count them. The methods must not block. `webhook` is the name
    of a webhook."""

    def on_attempt(self, webhook: str, outcome: DeliveryOutcome) -> None:
        """Called when an attempt has ended."""
        ...

    def on_given_up(self, webhook: str) -> None:
        """Called when an event has become a dead letter (an event that is not sent any more)."""
        ...

    def on_dropped(self, webhook: str, pending: int, dead: int) -> None:
        """Called when stored events were dropped because the webhook had too many. `pending`: number of dropped events
        that still waited for their delivery. `dead`: number of dropped dead letters."""
        ...


class NoObserver:
    """A `DeliveryObserver` that does nothing."""

    def on_attempt(self, webhook: str, outcome: DeliveryOutcome) -> None:
        return

    def on_given_up(self, webhook: str) -> None:
        return

    def on_dropped(self, webhook: str, pending: int, dead: int) -> None:
        return


def back_off(failures: int, random_part: Callable[[], float] = random.random) -> float:
    """Returns how many seconds to wait after a number of failures in a row. The wait is a random time between half of a
    limit and the limit. The limit doubles with each failure, from `FIRST_PAUSE_SECONDS` to `LONGEST_PAUSE_SECONDS`.
    `failures`: the number of failures, at least 1. `random_part` returns a random number from 0 to 1."""
    exponent = min(failures - 1, 30)  # a much larger exponent would raise OverflowError
    limit = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0**exponent)
    return limit * (0.5 + random_part() / 2)


class WebhookHealth:
    """Decides how long to wait after failed attempts at one endpoint. There are two kinds of delays:

    - A *pause* delays the endpoint or a repository. This object remembers the pauses. A pause ends early when the
      endpoint accepts an event.
    - A *wait* delays only a repository. `on_down` returns the length of the wait. The caller of `on_down` must delay
      the repository's events. An accepted event does not end the wait early.

    `on_down` has one of two effects:

    - If the endpoint accepted no event during the attempt, the endpoint counts as *down*. The endpoint pauses: for at
      most five seconds, no attempt begins. The repository of the event pauses for up to five minutes. Both pauses are
      longer after more failures in a row. When the endpoint accepts an event again, the pauses of all repositories end
      at once, and the endpoint's pause ends within a second.
    - If the endpoint accepted other events during the attempt, the event itself may be the cause of the failure. Then
      neither the endpoint nor the repository pauses. The repository of the event only has to wait.

    `time` returns seconds of a monotonic clock."""

    def __init__(self, time: Callable[[], float]) -> None:
        self._time = time
        self.failures = 0
        """Number of failures in a row at which the endpoint counted as down. All failures during one pause of the
        endpoint count as one."""
        self.delivered_count = 0
        """Number of events that the endpoint has accepted."""
        self._paused_until = float("-inf")
        self._pauses: dict[str, float] = {}
        """When the pause of each repository ends, in seconds of `time`."""
        self._failing: dict[str, tuple[int, int]] = {}
        """The repositories for which `on_down` was called since their last delivered event. Each has two values:

        - The number of these calls that *count*. A call counts if the endpoint accepted an event between the previous
          call and this call. The first call counts if the endpoint accepted an event during the failed attempt.
        - The value of `delivered_count` at the last call."""

    def on_delivered(self, repository: str) -> None:
        """Records that the endpoint has accepted an event of the repository."""
        self.delivered_count += 1
        self._failing.pop(repository, None)
        if self.failures:
            self.failures = 0
            self._pauses.clear()
            self._paused_until = min(self._paused_until, self._time() + FIRST_PAUSE_SECONDS)

    def on_down(self, repository: str, delivered_before: int) -> float:
        """Records a failed attempt to send an event of the repository. Call this in two cases:

        - The outcome is `DeliveryOutcome.DOWN`.
        - The outcome is `DeliveryOutcome.REFUSED`, and the event is too old to be sent again. Such an event becomes a
          dead letter. Without a pause or wait, many old events could become dead letters within a moment.

        `delivered_before`: the value of `delivered_count` when the attempt began. If the value is still the same, the
        endpoint counts as down.

        Returns how many seconds the repository has to wait. The wait is a random time (`back_off`), usually longer the
        more calls count (see `_failing`). If no call counts, returns 0: the endpoint then counts as down, and the
        repository pauses instead. If an earlier call counts, the repository can have a pause and a wait."""
        if delivered_before == self.delivered_count:
            self._pause(repository)
        count, delivered = self._failing.get(repository, (0, delivered_before))
        count += delivered < self.delivered_count  # whether this call counts (see `_failing`)
        if repository in self._failing or len(self._failing) < MAX_FAILING_REPOSITORIES:
            self._failing[repository] = count, self.delivered_count
        return back_off(count) if count else 0.0

    def _pause(self, repository: str) -> None:
        """Starts a pause of the repository. Also starts a pause of the endpoint, unless the endpoint is paused now."""
        now = self._time()
        if not self.is_paused:
            self.failures += 1
            self._paused_until = now + min(back_off(self.failures), LONGEST_ENDPOINT_PAUSE_SECONDS)
        if len(self._pauses) < MAX_FAILING_REPOSITORIES:
            self._pauses[repository] = now + back_off(self.failures)

    @property
    def is_paused(self) -> bool:
        """Whether the endpoint is paused. No attempt should begin during the pause."""
        return self._time() < self._paused_until

    def paused_repositories(self) -> Mapping[str, float]:
        """Returns the repositories that pause now. The value of each is the end of its pause, in seconds of `time`.
        Events of these repositories should not be sent."""
        now = self._time()
        self._pauses = {repository: until for repository, until in self._pauses.items() if until > now}
        return self._pauses
