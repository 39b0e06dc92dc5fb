"""The outcome of an attempt to deliver an event (`Attempt`), and the interface of objects that count or log such
outcomes (`DeliveryObserver`)."""

from __future__ import annotations

import asyncio
from enum import Enum
from typing import NamedTuple, Protocol


class Outcome(Enum):
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
