"""The outcome of an attempt to deliver an event (`Attempt`), the interface of objects that count or log such outcomes
(`DeliveryObserver`), and the back-off of an endpoint that is down (`EndpointHealth`)."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Final, NamedTuple, Protocol

FIRST_PAUSE_SECONDS: Final = 1.0
LONGEST_PAUSE_SECONDS: Final = 300.0
"""Shortest and longest pause after a failed attempt."""
LONGEST_ENDPOINT_PAUSE_SECONDS: Final = 5.0
"""While an endpoint is down, it is tried at least this often, if there are events of repositories that do not pause."""
MAX_DOWN_REPOSITORIES: Final = 10_000
"""Largest number of repositories for which it is remembered that the endpoint was down."""


class Outcome(StrEnum):
    """How an attempt ended. `DELIVERED`: the endpoint answered 2xx. `REFUSED`: it answered another status, so the same
    event may never succeed. `DOWN`: it did not answer, or said that it is not available now."""

    DELIVERED = "delivered"
    REFUSED = "refused"
    DOWN = "down"


class Attempt(NamedTuple):
    """How an attempt ended. `reason`: why, for people; empty if the event was delivered."""

    outcome: Outcome
    reason: str = ""


def raise_if_cancelled() -> None:
    """Raises CancelledError if the cancellation of this task was requested. For a loop that goes on after an error: the
    error may come from a `finally` that a cancellation entered, and then has replaced the CancelledError."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


class DeliveryObserver(Protocol):
    """An object that learns what happens to deliveries, for example to count them. The methods return at once.
    `webhook` is the name of a webhook."""

    def attempted(self, webhook: str, outcome: Outcome) -> None:
        """An attempt has ended."""
        ...

    def given_up(self, webhook: str) -> None:
        """An event has become a dead letter."""
        ...

    def dropped(self, webhook: str, pending: int, dead: int) -> None:
        """`pending` deliveries and `dead` dead letters were dropped, because there were too many."""
        ...


class NoObserver:
    """A `DeliveryObserver` that does nothing."""

    def attempted(self, webhook: str, outcome: Outcome) -> None:
        return

    def given_up(self, webhook: str) -> None:
        return

    def dropped(self, webhook: str, pending: int, dead: int) -> None:
        return


def back_off(failures: int, random_part: Callable[[], float] = random.random) -> float:
    """Returns how many seconds to wait after this number of failures in a row: twice as long after each, of which half
    is random. `random_part` returns a number from 0 to 1."""
    longest = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** min(failures - 1, 30))
    return longest * (0.5 + random_part() / 2)


class EndpointHealth:
    """The health of one endpoint, from the outcomes of the attempts: whether it is down, and how long to wait then.

    An endpoint that takes no event at all is *down*: it pauses for at most five seconds, and each repository whose
    event it did not take pauses longer and longer. When it takes an event again, they need not pause any more. If it
    takes events of other repositories in the meantime, then something in this one's events may be what the endpoint
    cannot answer. Such a repository waits longer and longer by itself, and the others do not wait for it.

    `time` returns seconds of a monotonic clock."""

    def __init__(self, time: Callable[[], float]) -> None:
        self._time = time
        self.failures = 0
        """How many attempts in a row have found the endpoint down. Those of one pause count once."""
        self.delivered = 0
        """How many events the endpoint has taken."""
        self._paused_until = float("-inf")
        self._pauses: dict[str, float] = {}
        """The end of the pause of each repository that found the endpoint down."""
        self._stuck: dict[str, tuple[int, int]] = {}
        """The repositories for whose events the endpoint was down last time. For each, how often it was down only for
        this repository, and the value of `delivered` at that time."""

    def on_delivered(self, repository: str) -> None:
        """Notes that the endpoint has taken an event."""
        self.delivered += 1
        self._stuck.pop(repository, None)
        if self.failures:
            self.failures = 0
            self._pauses.clear()
            self._paused_until = min(self._paused_until, self._time() + FIRST_PAUSE_SECONDS)

    def on_down(self, repository: str, delivered_before: int) -> float:
        """Notes that the endpoint did not take an event, in an attempt that began when `delivered` was
        `delivered_before`. Returns how many seconds the repository has to wait by itself; 0 unless the endpoint has
        taken other events since then, or since the last such attempt."""
        if delivered_before == self.delivered:
            self._pause(repository)
        count, delivered = self._stuck.get(repository, (0, delivered_before))
        count += delivered < self.delivered
        if repository in self._stuck or len(self._stuck) < MAX_DOWN_REPOSITORIES:
            self._stuck[repository] = count, self.delivered
        return back_off(count) if count else 0.0

    def _pause(self, repository: str) -> None:
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
        """Returns the repositories whose events should not be tried now, each with the end of its pause, in the seconds
        of `time`."""
        now = self._time()
        self._pauses = {repository: until for repository, until in self._pauses.items() if until > now}
        return self._pauses
