"""Describes the result of an attempt to deliver an event (`AttemptResult`), and decides how long to wait after failures
(`WebhookHealth`). `DeliveryObserver` is the interface of objects that count or log such outcomes. An *endpoint* is the
URL to which the events of a webhook are sent."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Final, NamedTuple, Protocol

FIRST_PAUSE_SECONDS: Final = 1.0
LONGEST_PAUSE_SECONDS: Final = 300.0
"""Limits of the wait that `back_off` returns. After one failure, it is at most `FIRST_PAUSE_SECONDS`. After any number
of failures in a row, it is at most `LONGEST_PAUSE_SECONDS`."""
LONGEST_ENDPOINT_PAUSE_SECONDS: Final = 5.0
"""Longest pause of an endpoint that is down. After the pause, the next attempt sends an event of a repository that is
not paused, if there is such an event."""
MAX_DOWN_REPOSITORIES: Final = 10_000
"""Largest number of repositories for which a `WebhookHealth` remembers that the endpoint was down."""


class DeliveryOutcome(StrEnum):
    """How an attempt ended. `DELIVERED`: the endpoint answered 2xx. `REFUSED`: it answered with another status, so the
    same event may never succeed. `DOWN`: it did not answer, or answered that it is not available now."""

    DELIVERED = "delivered"
    REFUSED = "refused"
    DOWN = "down"


class AttemptResult(NamedTuple):
    """The outcome of an attempt, with `reason`: a text for people that says why the attempt failed; empty if the event
    was delivered."""

    outcome: DeliveryOutcome
    reason: str = ""


class DeliveryObserver(Protocol):
    """Receives reports about deliveries, for example to count them. The methods return immediately. `webhook` is the
    name of a webhook."""

    def attempted(self, webhook: str, outcome: DeliveryOutcome) -> None:
        """Called when an attempt has ended."""
        ...

    def given_up(self, webhook: str) -> None:
        """Called when an event has become a dead letter (an event that is not sent any more)."""
        ...

    def dropped(self, webhook: str, pending: int, dead: int) -> None:
        """Called when `pending` deliveries and `dead` dead letters were dropped, because there were too many."""
        ...


class NoObserver:
    """A `DeliveryObserver` that does nothing."""

    def attempted(self, webhook: str, outcome: DeliveryOutcome) -> None:
        return

    def given_up(self, webhook: str) -> None:
        return

    def dropped(self, webhook: str, pending: int, dead: int) -> None:
        return


def back_off(failures: int, random_part: Callable[[], float] = random.random) -> float:
    """Returns how many seconds to wait after this number of failures in a row. The longest wait doubles with each
    failure. The returned wait is a random time between half of the longest wait and all of it. `random_part` returns a
    number from 0 to 1."""
    exponent = min(failures - 1, 30)  # without a limit, the power would raise OverflowError after 1024 failures
    longest = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0**exponent)
    return longest * (0.5 + random_part() / 2)


class WebhookHealth:
    """Decides from the outcomes of the attempts whether one endpoint is down, and how long to wait before the next
    attempt.

    If an attempt ends with `DeliveryOutcome.DOWN`, and the endpoint accepted no event during the attempt, the whole
    endpoint is *down*. It then pauses for at most five seconds. The repository of the event pauses too, for up to five
    minutes: the more failures in a row, the longer. When the endpoint accepts an event again, the pauses of the
    repositories end, and that of the endpoint ends within a second.

    If an attempt ends with `DeliveryOutcome.DOWN`, but the endpoint accepts events of other repositories in the
    meantime, the event itself may be the cause. In this case only its repository waits, longer after each failure.
    Other repositories do not wait for it.

    `time` returns seconds of a monotonic clock."""

    def __init__(self, time: Callable[[], float]) -> None:
        self._time = time
        self.failures = 0
        """Number of failures in a row at which the endpoint was down. Failures during the same pause count as one."""
        self.delivered = 0
        """Number of events that the endpoint has accepted."""
        self._paused_until = float("-inf")
        self._pauses: dict[str, float] = {}
        """By repository: when its pause ends, in seconds of `time`."""
        self._stuck: dict[str, tuple[int, int]] = {}
        """The repositories whose last event the endpoint did not accept. For each: how many attempts failed although
        the endpoint accepted events of other repositories meanwhile, and the value of `delivered` at the last
        failure."""

    def on_delivered(self, repository: str) -> None:
        """Records that the endpoint has accepted an event of the repository."""
        self.delivered += 1
        self._stuck.pop(repository, None)
        if self.failures:
            self.failures = 0
            self._pauses.clear()
            self._paused_until = min(self._paused_until, self._time() + FIRST_PAUSE_SECONDS)

    def on_down(self, repository: str, delivered_before: int) -> float:
        """Records a failed attempt to send an event of the repository. Call it for an attempt with
        `DeliveryOutcome.DOWN`. Also call it if the event is too old to be sent again: without a pause, many old events
        would be given up within a moment. `delivered_before`: the value of `delivered` when the attempt began.

        If the endpoint has accepted no event of any repository during this attempt, it counts as down: it pauses, and
        the repository pauses, too.

        Returns how many seconds this repository alone has to wait: 0 if the endpoint has accepted no event of any
        repository since the first of this repository's failed attempts in a row began."""
        if delivered_before == self.delivered:
            self._pause(repository)
        count, delivered = self._stuck.get(repository, (0, delivered_before))
        count += delivered < self.delivered  # 1 if the endpoint has accepted other events meanwhile
        if repository in self._stuck or len(self._stuck) < MAX_DOWN_REPOSITORIES:
            self._stuck[repository] = count, self.delivered
        return back_off(count) if count else 0.0

    def _pause(self, repository: str) -> None:
        """Starts a pause of the endpoint, unless it is paused already, and a pause of the repository."""
        now = self._time()
        if not self.is_paused:
            self.failures += 1
            self._paused_until = now + min(back_off(self.failures), LONGEST_ENDPOINT_PAUSE_SECONDS)
        if len(self._pauses) < MAX_DOWN_REPOSITORIES:
            self._pauses[repository] = now + back_off(self.failures)

    @property
    def is_paused(self) -> bool:
        """Whether no attempt should begin now."""
        return self._time() < self._paused_until

    def pauses(self) -> Mapping[str, float]:
        """Returns the repositories whose events should not be sent now, each with the end of its pause in seconds of
        `time`."""
        now = self._time()
        self._pauses = {repository: until for repository, until in self._pauses.items() if until > now}
        return self._pauses
