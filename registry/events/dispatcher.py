"""Delivers events to webhooks (`WebhookDispatcher`).

One process at a time does this for all: the one that holds a slot. Each webhook has a task of its own, so that one that
is slow or down does not delay the others. This task reads what is due, in *queues*: the next events of one repository.
For each queue it starts a *sender*, a task that sends its events one after the other, so that the events of a
repository arrive in their order. Up to `Webhook.connections` senders run at a time; when one has ended, the next queue
gets its place, however slow the others are. All webhooks together have a limit as well (`SenderLimit`).

An event is sent until the endpoint answers 2xx. After each failure the repository waits longer: from a second to five
minutes, with a random part, so that many registries do not try at the same moment. `EndpointHealth` decides how long
the others wait. What cannot be delivered becomes a dead letter in the end (see `Webhook.max_attempts` and `max_age`).

Outcomes are written down in groups. Until then, the repository has no other sender. After a crash, the events of the
last moment are sent again. While outcomes cannot be written down, no sender starts.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from registry.config.event_settings import Webhook
from registry.events.attempts import (
    FIRST_PAUSE_SECONDS,
    Attempt,
    DeliveryObserver,
    EndpointHealth,
    Outcome,
    back_off,
    raise_if_cancelled,
)
from registry.events.webhook_client import WebhookClient
from storage.errors import RegistryError
from storage.outbox import Delivery, FailedDelivery, Outbox

POLL_SECONDS: Final = 0.2
"""Time between two looks whether another process has added events, or a pause has ended."""
STORE_RETRY_SECONDS: Final = 5.0
"""Pause after an error of the store."""
QUEUES_PER_READ: Final = 64
EVENTS_PER_QUEUE: Final = 50
"""Largest number of queues that are in memory, and of events of each."""
SETTLE_SECONDS: Final = 0.5
"""Longest time for which outcomes are not written down while others are being sent."""
MAX_SHARED_SENDERS: Final = 64
"""How many senders all webhooks together may have, besides one of each."""
log = logging.getLogger("registry.events")


class SenderLimit:
    """Limits the senders of all webhooks together. Each webhook may always have one, so that endpoints that are slow
    never stop the others. For each further one it needs a permit, of which there are `permits`."""

    def __init__(self, permits: int = MAX_SHARED_SENDERS) -> None:
        self._free = permits

    def take(self) -> bool:
        """Takes a permit. Returns False if there is none."""
        if self._free == 0:
            return False
        self._free -= 1
        return True

    def give_back(self) -> None:
        """Gives a permit back."""
        self._free += 1


@dataclass(slots=True)
class _Outcomes:
    """The outcomes that are not written down yet, and the repositories that wait for that."""

    delivered: list[int] = field(default_factory=list)
    failed: list[FailedDelivery] = field(default_factory=list)
    repositories: set[str] = field(default_factory=set)

    def add(self, later: _Outcomes) -> None:
        """Adds outcomes that came later."""
        self.delivered += later.delivered
        self.failed += later.failed
        self.repositories |= later.repositories

    def __bool__(self) -> bool:
        return bool(self.delivered or self.failed)


class WebhookDispatcher:
    """Tells one webhook of its events. `clock` returns the time in seconds since 1970. `version` returns a value that
    every commit of any process changes. `observer` is told how attempts end. `limit` is that of all webhooks. Used from
    one event loop."""

    def __init__(
        self,
        settings: Webhook,
        client: WebhookClient,
        outbox: Outbox,
        version: Callable[[], object],
        clock: Callable[[], float],
        observer: DeliveryObserver,
        limit: SenderLimit,
    ) -> None:
        self._settings = settings
        self._client = client
        self._outbox = outbox
        self._version = version
        self._clock = clock
        self._observer = observer
        self._limit = limit
        self._time = asyncio.get_running_loop().time
        self._health = EndpointHealth(self._time)
        self._waiting: deque[Sequence[Delivery]] = deque()
        """Queues that were read and have no sender yet."""
        self._senders: dict[str, asyncio.Task[None]] = {}
        """The senders that run, by their repositories."""
        self._outcomes = _Outcomes()
        self._settle_at = float("inf")
        """When to write the outcomes down, by the event loop's clock."""
        self._sender_ended = asyncio.Event()
        self._read_version: object = None
        """The version at the last read."""
        self._next_at: float | None = None
        """When the next delivery is due that was not at the last read, in seconds since 1970."""
        self._read_again_at = float("-inf")
        """When there may be more to read, although nothing has changed and nothing has become due. By the event loop's
        clock."""
        self._logged_reason = ""

    async def run(self) -> None:
        """Works until the task is cancelled, and then writes down what was delivered. Logs an error of the store, and
        goes on. A cancellation cuts off the requests that are running; their events are sent again."""
        try:
            while True:
                try:
                    await self._work()
                except RegistryError as error:
                    log.warning("webhook %s: cannot read or write its events: %s", self._settings.name, error)
                except Exception:
                    log.exception("webhook %s: an unexpected error; it is tried again", self._settings.name)
                raise_if_cancelled()
                await asyncio.sleep(STORE_RETRY_SECONDS)
        finally:
            await self._stop()

    async def _stop(self) -> None:
        """Ends the senders, and writes down what they did."""
        senders = list(self._senders.values())
        for sender in senders:
            sender.cancel()
        try:
            if senders:
                await asyncio.wait(senders)
        finally:  # another cancellation can arrive in any `await`
            try:
                await self._settle()
            except RegistryError as error:
                name, events = self._settings.name, len(self._outcomes.delivered)
                log.warning("webhook %s: %d events will be sent again, because of an error: %s", name, events, error)

    async def _work(self) -> None:
        while True:
            if self._outcomes and (not self._senders or self._time() >= self._settle_at):
                await self._settle()
            if self._health.is_paused:
                self._waiting.clear()  # until the end of the pause, some may be dropped
                self._read_again_at = float("-inf")
            else:
                if not self._waiting and len(self._senders) < self._settings.connections:
                    await self._read()
                self._start_senders()
            if self._senders or not self._outcomes:
                await self._wait()

    async def _read(self) -> None:
        """Reads the queues that are due, except those of repositories that have a sender or pause. Does nothing if
        there can be nothing new."""
        version, now = self._version(), self._clock()
        is_due = self._next_at is not None and now >= self._next_at
        if version == self._read_version and not is_due and self._time() < self._read_again_at:
            return
        pauses = self._health.pauses()
        limit = self._settings.connections if self._health.failures else QUEUES_PER_READ
        without = {*self._senders, *self._outcomes.repositories, *pauses}
        due = await self._outbox.due(self._settings.name, now, limit, EVENTS_PER_QUEUE, without)
        self._waiting.extend(due.queues)
        self._read_version, self._next_at = version, due.next_at
        has_more = len(due.queues) == limit
        self._read_again_at = float("-inf") if has_more else min(pauses.values(), default=float("inf"))

    async def _wait(self) -> None:
        """Waits until a sender has ended, but not longer than until the next look."""
        with suppress(TimeoutError):
            async with asyncio.timeout(POLL_SECONDS):
                await self._sender_ended.wait()
        self._sender_ended.clear()

    def _start_senders(self) -> None:
        """Starts senders for the queues that wait, as many as are allowed."""
        while self._waiting and len(self._senders) < self._settings.connections:
            has_permit = bool(self._senders)
            if has_permit and not self._limit.take():
                return
            queue = self._waiting.popleft()
            sender = asyncio.create_task(self._send_queue(queue))
            self._senders[queue[0].event.content.repository] = sender
            sender.add_done_callback(partial(self._on_sender_ended, queue, has_permit))

    def _on_sender_ended(self, queue: Sequence[Delivery], has_permit: bool, sender: asyncio.Task[None]) -> None:
        del self._senders[queue[0].event.content.repository]
        if has_permit:
            self._limit.give_back()
        if len(queue) == EVENTS_PER_QUEUE:  # the repository may have more, which wait for the outcomes
            self._settle_at = self._time()
        self._sender_ended.set()
        if not sender.cancelled() and (error := sender.exception()) is not None:
            log.error("webhook %s: an unexpected error; events are sent again", self._settings.name, exc_info=error)

    async def _send_queue(self, queue: Sequence[Delivery]) -> None:
        """Sends the events of a repository, until one fails or the endpoint is down."""
        for delivery in queue:
            if self._health.is_paused:
                return
            delivered_before = self._health.delivered
            attempt = await self._attempt(delivery)
            raise_if_cancelled()
            self._observer.attempted(self._settings.name, attempt.outcome)
            self._settle_at = min(self._settle_at, self._time() + SETTLE_SECONDS)
            if attempt.outcome is not Outcome.DELIVERED:
                await self._note_failure(delivery, attempt, delivered_before)
                return
            self._outcomes.repositories.add(delivery.event.content.repository)
            self._outcomes.delivered.append(delivery.event.number)
            if self._health.failures or self._logged_reason:
                log.info("webhook %s: it takes events again", self._settings.name)
                self._logged_reason = ""
            self._health.on_delivered(delivery.event.content.repository)

    async def _attempt(self, delivery: Delivery) -> Attempt:
        """Sends an event once. An error of ours counts as a refusal, so that it does not hold up other events for
        ever."""
        try:
            return await self._client.send(delivery.event)
        except Exception as error:
            raise_if_cancelled()
            log.exception("webhook %s: event %d cannot be sent", self._settings.name, delivery.event.number)
            return Attempt(Outcome.REFUSED, f"it cannot be sent, because of an unexpected {type(error).__name__}")

    async def _note_failure(self, delivery: Delivery, attempt: Attempt, delivered_before: int) -> None:
        """Decides what happens to a delivery that failed. Returns when its repository may have another sender."""
        event, now = delivery.event, self._clock()
        attempts = delivery.attempts
        is_aged = now - event.content.at >= self._settings.max_age
        is_down = attempt.outcome is Outcome.DOWN
        # Without the pause, aged events would be given up at full speed.
        own_pause = self._health.on_down(event.content.repository, delivered_before) if is_down or is_aged else 0.0
        if not is_down:
            attempts += 1
        next_at = now + (own_pause if is_down else back_off(attempts))
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
        self._outcomes.repositories.add(event.content.repository)
        self._outcomes.failed.append(FailedDelivery(event.number, attempts, next_at, dead, attempt.reason))
        if is_dead and own_pause:  # `next_at` holds up a dead letter, but not the event behind it
            await asyncio.sleep(min(own_pause, FIRST_PAUSE_SECONDS))

    async def _settle(self) -> None:
        """Writes down the outcomes so far. After an error of the store they stay."""
        settling, self._outcomes, self._settle_at = self._outcomes, _Outcomes(), float("inf")
        if not settling:
            return
        try:
            await self._outbox.settle(self._settings.name, settling.delivered, settling.failed)
        except RegistryError:
            settling.add(self._outcomes)
            self._outcomes, self._settle_at = settling, self._time()
            raise
