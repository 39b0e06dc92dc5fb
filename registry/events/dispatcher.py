"""Delivers events to webhooks (`WebhookDispatcher`).

Only one of the server's processes does this at a time (see `registry.events.delivery.EventDelivery`). Each webhook has
a task of its own, so that one that is slow or down does not delay the others. A task works in rounds: it reads what is
due, sends the events of several repositories at the same time, and those of one repository one after the other. So the
events of a repository arrive in their order.

An event is sent until the endpoint answers 2xx. After each failure the repository waits longer: from a second to five
minutes, with a random part, so that many registries do not try at the same moment. If the endpoint is down, all of its
repositories wait. What cannot be delivered becomes a dead letter in the end (see `Webhook.max_attempts` and `max_age`).

The outcomes of several deliveries are stored together. After a crash, events whose outcome was not stored yet are sent
again.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from registry.config.event_settings import Webhook
from registry.events.attempts import Attempt, DeliveryObserver, Outcome, raise_if_cancelled
from registry.events.webhook_client import WebhookClient
from storage.errors import RegistryError
from storage.outbox import Delivery, FailedDelivery, Outbox

FIRST_PAUSE_SECONDS: Final = 1.0
LONGEST_PAUSE_SECONDS: Final = 300.0
"""Shortest and longest pause after a failed attempt."""
POLL_SECONDS: Final = 0.2
"""Time between two checks whether another process has added events."""
LONGEST_WAIT_SECONDS: Final = 60.0
"""Longest time between two rounds."""
STORE_RETRY_SECONDS: Final = 5.0
"""Pause after an error of the store."""
REPOSITORIES_PER_ROUND: Final = 64
EVENTS_PER_ROUND: Final = 50
"""Largest number of repositories in one round, and of events of each."""
MAX_DOWN_REPOSITORIES: Final = 10_000
"""Largest number of repositories for which the dispatcher remembers that the endpoint was down."""
SETTLE_SECONDS: Final = 0.5
"""How often a running round stores the outcomes of its deliveries."""
log = logging.getLogger("registry.events")


def back_off(failures: int, random_part: Callable[[], float] = random.random) -> float:
    """Returns how many seconds to wait after this number of failures in a row. The longest wait doubles with each
    failure, from `FIRST_PAUSE_SECONDS` to `LONGEST_PAUSE_SECONDS`. The returned wait is between half of the longest
    one and all of it, at random. `random_part` returns a number from 0 to 1."""
    longest = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** min(failures - 1, 30))
    return longest * (0.5 + random_part() / 2)


@dataclass(slots=True)
class _Round:
    """The outcomes of a round that are not stored yet. `settled_at`: when the round last stored outcomes, by the
    clock of the event loop. `is_down`: whether the endpoint is down."""

    delivered: list[int] = field(default_factory=list)
    failed: list[FailedDelivery] = field(default_factory=list)
    settled_at: float = 0.0
    is_down: bool = False


class WebhookDispatcher:
    """Delivers events to one webhook. `clock` returns the time in seconds since 1970. `version` returns a value that
    every commit of any process changes. `observer` is told how attempts end."""

    def __init__(
        self,
        settings: Webhook,
        client: WebhookClient,
        outbox: Outbox,
        version: Callable[[], object],
        clock: Callable[[], float],
        observer: DeliveryObserver,
    ) -> None:
        self._settings = settings
        self._client = client
        self._outbox = outbox
        self._version = version
        self._clock = clock
        self._observer = observer
        self._failures = 0
        """How many attempts in a row have found the endpoint down."""
        self._delivered = 0
        self._down_repositories: dict[str, tuple[int, int]] = {}
        """The repositories for which the endpoint was down at the last attempt. For each: the number of such
        attempts before which the endpoint had accepted events of other repositories, and the value of `_delivered` at
        the last attempt."""
        self._logged_reason = ""

    async def run(self) -> None:
        """Works until the task is cancelled. Logs an error of the store, and goes on."""
        while True:
            try:
                await self._work()
            except RegistryError as error:
                log.warning("webhook %s: cannot read or write its events: %s", self._settings.name, error)
            except Exception:
                log.exception("webhook %s: an unexpected error; its events are sent again", self._settings.name)
            raise_if_cancelled()
            await asyncio.sleep(STORE_RETRY_SECONDS)

    async def _work(self) -> None:
        while True:
            version = self._version()
            now = self._clock()
            repositories = self._settings.connections if self._failures else REPOSITORIES_PER_ROUND
            due = await self._outbox.due(self._settings.name, now, repositories, EVENTS_PER_ROUND)
            if due.queues:
                if await self._send_round(due.queues):
                    await asyncio.sleep(back_off(self._failures))
            else:
                until = now + LONGEST_WAIT_SECONDS if due.next_at is None else due.next_at
                await self._wait_for_change(version, until)

    async def _wait_for_change(self, version: object, until: float) -> None:
        """Returns when the store has changed since `version`, or at the time `until`."""
        while (remaining := until - self._clock()) > 0 and self._version() == version:  # noqa: ASYNC110  another process
            await asyncio.sleep(min(POLL_SECONDS, remaining))

    async def _send_round(self, queues: Sequence[Sequence[Delivery]]) -> bool:
        """Sends the events in the queues. Returns whether the endpoint is down. Stores what was delivered even if the
        task is cancelled."""
        current = _Round(settled_at=asyncio.get_running_loop().time())
        waiting = list(reversed(queues))

        async def send_queues() -> None:
            while waiting and not current.is_down:
                await self._send_queue(waiting.pop(), current)

        senders = [asyncio.create_task(send_queues()) for _ in range(min(self._settings.connections, len(queues)))]
        try:
            await asyncio.gather(*senders)
        finally:
            for sender in senders:
                sender.cancel()
            try:
                await asyncio.gather(*senders, return_exceptions=True)
            finally:  # a cancellation can arrive in any `await`
                await self._settle(current)
        return current.is_down

    async def _send_queue(self, queue: Sequence[Delivery], current: _Round) -> None:
        """Sends the events of a repository, until one fails."""
        for delivery in queue:
            attempt = await self._client.send(delivery.event)
            self._observer.attempted(self._settings.name, attempt.outcome)
            if attempt.outcome is not Outcome.DELIVERED:
                self._note_failure(delivery, attempt, current)
                return
            current.delivered.append(delivery.event.number)
            self._delivered += 1
            self._down_repositories.pop(delivery.event.content.repository, None)
            if self._failures or self._logged_reason:
                log.info("webhook %s: it takes events again", self._settings.name)
                self._failures, self._logged_reason = 0, ""
            if current.is_down:
                return
            if asyncio.get_running_loop().time() - current.settled_at >= SETTLE_SECONDS:
                await self._settle(current)

    def _note_failure(self, delivery: Delivery, attempt: Attempt, current: _Round) -> None:
        """Decides what happens to a delivery that failed."""
        event, now = delivery.event, self._clock()
        attempts = delivery.attempts
        is_aged = now - event.content.at >= self._settings.max_age
        # An event that is too old becomes a dead letter after one failed attempt. So it causes a pause like an endpoint
        # that is down: otherwise, thousands of old events could become dead letters within seconds.
        if attempt.outcome is Outcome.DOWN or is_aged:
            self._failures += 0 if current.is_down else 1
            current.is_down = True
        if attempt.outcome is Outcome.DOWN:
            next_at = now + self._pause_of_repository(event.content.repository)
        else:
            attempts += 1
            next_at = now + back_off(attempts)
        is_dead = attempts >= self._settings.max_attempts or is_aged
        if is_dead:
            self._observer.given_up(self._settings.name)
            log.error(
                "webhook %s: event %d (%s of %s) is given up: %s; `entrepot events retry %d` sends it again",
                *(self._settings.name, event.number, event.content.action, event.content.repository),
                *(attempt.reason, event.number),
            )
        elif attempt.reason != self._logged_reason:
            self._logged_reason = attempt.reason
            log.warning("webhook %s: %s; its events are sent again later", self._settings.name, attempt.reason)
        dead = now if is_dead else None
        current.failed.append(FailedDelivery(event.number, attempts, next_at, dead, attempt.reason))

    def _pause_of_repository(self, repository: str) -> float:
        """Returns how many seconds the repository waits after an attempt that found the endpoint down.

        If the endpoint has accepted events of other repositories since the repository's last such attempt, the event of
        this repository may be what the endpoint cannot handle. The repository then waits longer each time, so that it
        does not hold up the other repositories. Otherwise returns 0: all repositories wait (`_work`)."""
        count, delivered = self._down_repositories.get(repository, (0, self._delivered))
        count += delivered < self._delivered
        if len(self._down_repositories) < MAX_DOWN_REPOSITORIES:
            self._down_repositories[repository] = count, self._delivered
        return back_off(count) if count else 0.0

    async def _settle(self, current: _Round) -> None:
        """Stores the outcomes so far."""
        current.settled_at = asyncio.get_running_loop().time()
        delivered, failed = current.delivered, current.failed
        if delivered or failed:
            current.delivered, current.failed = [], []
            await self._outbox.settle(self._settings.name, delivered, failed)
