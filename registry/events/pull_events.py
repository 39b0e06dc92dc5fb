"""`PullEvents`: records pulls as events, if the settings ask for that.

A request only adds its pull to a list in memory, which takes almost no time. Every `STORE_SECONDS`, the pulls in the
list are stored as events. If the process is killed, the pulls that are not stored yet are lost. If the list is full,
further pulls are *dropped*: they are counted, and get no event.

Each time that a process stores pulls, the response caches of all processes are emptied. All processes store their pulls
at the same times, so that the caches are emptied only once per interval.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from registry.config import Settings
from storage.background_rounds import log_round_error, raise_if_cancelled
from storage.content import Actor, Pull
from storage.errors import NameInvalid, NameUnknown, RegistryError
from storage.names import RepositoryName
from storage.outbox import MAX_ADDED_EVENTS, EventAction, NewEvent, Outbox

STORE_SECONDS: Final = 5.0
"""Interval at which the pulls are stored."""
MAX_PULLS: Final = 10_000
"""Largest number of pulls in the list, enough for 2,000 pulls a second. They take about 5 MB of memory."""
log = logging.getLogger("registry.events")

Locate = Callable[[RepositoryName], Awaitable[tuple[object, RepositoryName, str | None]]]
"""Finds a repository by the name that clients use. Returns three values: the registry that answers reads of the
repository, the name under which the repository is stored, and the name of its upstream (None: no upstream). This module
uses only the second value. Raises NameUnknown, NameInvalid."""


def wants_pulls(settings: Settings) -> bool:
    """Returns whether the settings ask for events of pulls, for a webhook or for the list of events."""
    action_lists = [webhook.actions for webhook in settings.webhook]
    if settings.events.keep:
        action_lists.append(settings.events.actions)
    return any(EventAction.PULL in actions for actions in action_lists)


OnUnrecorded = Callable[[int], None]
"""Called with the number of dropped pulls, which are not recorded as events."""


def ignore_unrecorded(_: int) -> None:
    """An `OnUnrecorded` that does nothing."""


class PullEvents:
    """Records the pulls that one process serves. Used from one event loop."""

    def __init__(
        self,
        outbox: Outbox,
        locate: Locate,
        clock: Callable[[], float],
        on_unrecorded: OnUnrecorded = ignore_unrecorded,
    ) -> None:
        """`clock` returns seconds since 1970."""
        self._outbox = outbox
        self._locate = locate
        self._clock = clock
        self._on_unrecorded = on_unrecorded
        self._pulls: list[tuple[Pull, float, str, str, str]] = []
        """The pulls that are not stored yet, each with its time, and the name, address and request id of the client."""
        self._dropped = 0

    def add(self, pull: Pull, name: str, address: str, request_id: str) -> None:
        """Adds a pull to the list, or drops it if the list is full. The other parameters describe the client. `name`:
        the name of the client's account, or `anonymous`. `request_id`: the id of the client's request."""
        if len(self._pulls) < MAX_PULLS:
            self._pulls.append((pull, self._clock(), name, address, request_id))
        else:
            self._dropped += 1

    async def run(self) -> None:
        """Stores the pulls at each multiple of `STORE_SECONDS`, until the task is cancelled. If the pulls cannot be
        stored, logs the error, and tries again at the next multiple."""
        logged_error = ""
        while True:
            await asyncio.sleep(STORE_SECONDS - self._clock() % STORE_SECONDS)
            try:
                await self.store()
                logged_error = ""
            except Exception as error:
                raise_if_cancelled()
                if logged_error != (logged_error := str(error)):  # an error that repeats is logged once
                    log_round_error(log, "cannot store pulls as events", error)

    async def store(self) -> None:
        """Stores the pulls in the list as events, and removes them from the list. Stores no event for a repository that
        no longer exists. Raises StorageFull or StorageFailed. After one of these errors, the pulls that are not stored
        stay in the list."""
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            self._on_unrecorded(dropped)
            log.warning(
                "%d pulls have no event, because there were more than %d within %g seconds, or because earlier pulls "
                "could not be stored",
                *(dropped, MAX_PULLS, STORE_SECONDS),
            )
        for _ in range(0, len(self._pulls), MAX_ADDED_EVENTS):
            batch = self._pulls[:MAX_ADDED_EVENTS]
            names = {repo: await self._stored_name(repo) for repo in {pull[0] for pull, *_ in batch}}
            events = [
                NewEvent(EventAction.PULL, stored, pulled_at, Actor(name, address, request_id), digest=digest)
                for (repo, digest), pulled_at, name, address, request_id in batch
                if (stored := names[repo]) is not None
            ]
            del self._pulls[: len(batch)]
            try:
                await self._outbox.add(events)  # a cancellation takes effect only after the events are stored
            except RegistryError:
                self._pulls[:0] = batch
                raise

    async def _stored_name(self, repo: RepositoryName) -> RepositoryName | None:
        """Returns the name under which a repository is stored; None if the repository no longer exists."""
        try:
            return (await self._locate(repo))[1]
        except (NameUnknown, NameInvalid):
            return None
