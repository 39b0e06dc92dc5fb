"""The interface of the store of events about content, and of their deliveries to webhooks (`Outbox`).

An *event* is one thing that happened to a repository: a push, a deletion, a tag that moved. A change and its events are
one transaction, so every change that the server has acknowledged has its events. A *webhook* is an HTTP endpoint to
which the server sends events. A *delivery* is an event that has to be sent to a webhook, and that the webhook has not
accepted yet. It is *pending* as long as the server still tries to send it. When the server has given it up, it is a
*dead letter*.

A *reader* is a webhook, or the list of events that people and programs read. An event that no reader wants is not
stored. Times are seconds since 1970.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

from storage.content import Actor

LIST_READER: Final = ""
"""Name of the reader that is the list of events."""
MAX_ADDED_EVENTS: Final = 500
"""Largest number of events in one call of `Outbox.add`."""


class EventAction(StrEnum):
    """The kind of an event.

    - `PUSH`: a client pushed a manifest; with a tag if it pushed the manifest by tag.
    - `DELETE`: a manifest or tag was deleted. The tags of a deleted manifest have events of their own.
    - `MOVE`: a tag was pointed at a manifest without a push. A reader that wants `MOVE` also
      gets each `PUSH` that moves a tag.
    - `RETENTION`: a rule of retention deleted a manifest or tag.
    - `EVICTION`: a mirrored manifest, or a tag of it, was deleted to free space in the cache.
    - `QUARANTINE`: the stored bytes of a blob or manifest were found damaged.
    - `PULL`: a client pulled a manifest.
    - `FILL`: a mirror fetched a manifest or blob from its upstream.
    - `BLOB_PUSH`: a client or an import stored a blob, also one that the repository had already.
    - `BLOB_MOUNT`: a repository got a blob that another repository has, without an upload.
    - `BLOB_DELETE`: a client deleted a blob. Garbage collection has no events."""

    PUSH = "push"
    DELETE = "delete"
    MOVE = "move"
    RETENTION = "retention"
    EVICTION = "eviction"
    QUARANTINE = "quarantine"
    PULL = "pull"
    FILL = "fill"
    BLOB_PUSH = "blob_push"
    BLOB_MOUNT = "blob_mount"
    BLOB_DELETE = "blob_delete"


CHANGES: Final = frozenset(EventAction) - {
    *(EventAction.PULL, EventAction.FILL),
    *(EventAction.BLOB_PUSH, EventAction.BLOB_MOUNT, EventAction.BLOB_DELETE),
}
"""The kinds of events about changes of manifests and tags, and about damage. Events of the other kinds are far more
frequent."""


@dataclass(frozen=True, slots=True)
class NewEvent:
    """An event that is not stored yet. `repository`: the repository's name in the store. `tag` and `digest`: the tag,
    manifest or blob that the event is about; one of them may be None. `previous`: the digest that the tag pointed at
    before it moved; None if it did not move, or is new. `media_type` and `size` (in bytes): of the manifest or blob;
    empty and 0 if they are not known. `by`: the client, command or job that caused the event. `reason`: a text for
    people about the cause of the event."""

    action: EventAction
    repository: str
    at: float
    by: Actor
    tag: str | None = None
    digest: str | None = None
    previous: str | None = None
    media_type: str = ""
    size: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Event:
    """A stored event. `number` grows with each event; later changes have higher numbers. `id` is a UUID."""

    number: int
    id: str
    content: NewEvent


@dataclass(frozen=True, slots=True)
class EventPage:
    """Events that one look-up in the list of events found. A look-up reads a limited number of events, so `events` may
    be empty although later look-ups find some. `position`: number of the last event that was read, or the number at
    which the look-up began if it read none; the next look-up begins there. `is_last`: whether the list had no further
    event to read."""

    events: Sequence[Event]
    position: int
    is_last: bool


@dataclass(frozen=True, slots=True)
class EventReader:
    """A webhook, or the list of events (`LIST_READER`). It wants the events with one of `actions`, from repositories
    whose names match one of the patterns `repositories`."""

    name: str
    actions: frozenset[EventAction]
    repositories: Sequence[str]


@dataclass(frozen=True, slots=True)
class Delivery:
    """An event that `webhook` has not accepted yet. `attempts`: number of attempts so far, which all failed. `next_at`:
    time of the next attempt. `dead`: time at which the server gave up the delivery; None if the server still tries.
    `error`: why the last attempt failed."""

    webhook: str
    event: Event
    attempts: int
    next_at: float
    dead: float | None
    error: str


@dataclass(frozen=True, slots=True)
class DeliveryPosition:
    """The position of a delivery in the list of deliveries: the number of its event, and its webhook. The list has the
    newest event first, and the deliveries of an event in the order of their webhooks."""

    event: int
    webhook: str


@dataclass(frozen=True, slots=True)
class DueDeliveries:
    """Deliveries of one webhook. `queues`: one sequence for each repository, in the order of the events. `next_at`: the
    next time at which a delivery of a repository without a queue here becomes due. None: there is no such delivery, or
    the time was not determined, because there are as many queues as the caller wanted. `wait_seconds`: the time that
    the caller must wait before it looks for due deliveries again. It is 0, unless the search was costly because very
    many repositories have pending deliveries."""

    queues: Sequence[Sequence[Delivery]]
    next_at: float | None
    wait_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class FailedDelivery:
    """The outcome of an attempt that failed. `event`: number of the event. `attempts`, `next_at`, `dead` and `error`
    replace the values of the delivery."""

    event: int
    attempts: int
    next_at: float
    dead: float | None
    error: str


@dataclass(frozen=True, slots=True)
class EventLimits:
    """How much the outbox keeps at the time `now` (seconds since 1970). `keep_since`: events before this time are
    removed from the list. `events`: largest number of events in the list. `pending` and `dead`: largest number of
    pending deliveries, and of dead letters, of each webhook. An event that is not in the list and has no pending
    delivery or dead letter left is deleted. The newest event stays, so that no later event gets its number."""

    keep_since: float
    events: int
    pending: int
    dead: int
    now: float


@dataclass(frozen=True, slots=True)
class DroppedDeliveries:
    """How many pending deliveries and how many dead letters of a webhook were dropped, because there were too many or
    the webhook was removed."""

    webhook: str
    pending: int
    dead: int


@dataclass(frozen=True, slots=True)
class WebhookBacklog:
    """How many pending deliveries and how many dead letters a webhook has. `oldest`: time of the oldest event that has
    a pending delivery to this webhook; None if there is none."""

    webhook: str
    pending: int
    dead: int
    oldest: float | None


class Outbox(Protocol):
    """The events and deliveries, which all processes share. Changes of content add their events themselves. All methods
    may raise StorageFailed. Methods that change something may also raise StorageFull."""

    async def configure(self, readers: Sequence[EventReader]) -> Sequence[DroppedDeliveries]:
        """Replaces the readers, and drops the deliveries of all webhooks that are not among the new readers. From then
        on no method returns or counts a dropped delivery. It stays in the store until `tidy` deletes it. But if a new
        reader has the name of a removed webhook, this method first deletes the dropped deliveries of that webhook, so
        that the new reader does not get them. Returns how many deliveries each removed webhook had. Does not write if
        nothing changes."""
        ...

    async def add(self, events: Sequence[NewEvent]) -> None:
        """Adds at most `MAX_ADDED_EVENTS` events. This is for events that come without a change of content, such as
        pulls. A power cut may lose the newest of them."""
        ...

    async def due(
        self,
        webhook: str,
        now: float,
        max_repositories: int,
        max_events: int,
        excluded_repositories: Collection[str] = (),
    ) -> DueDeliveries:
        """Returns deliveries that are due at the time `now`: of at most `max_repositories` repositories, the longest
        waiting first, and at most `max_events` of each repository. If the oldest delivery of a repository is not due
        yet, the other deliveries of that repository are not due either. `excluded_repositories`: repositories to leave
        out."""
        ...

    async def settle(self, webhook: str, delivered: Sequence[int], failed: Sequence[FailedDelivery]) -> None:
        """Deletes the deliveries of the events with the numbers `delivered`, and updates the deliveries that failed. A
        power cut may undo this change; the server then delivers these events again."""
        ...

    async def newest(self) -> int:
        """Returns the number of the newest event, even if the event is not in the list; 0 if there never was an
        event."""
        ...

    async def first_complete_number(self) -> int:
        """Returns the number from which on the list is complete: no event with this or a higher number was removed from
        the list. So the result is higher than the number of the newest removed event, even if the list is empty. The
        numbers in the list have gaps even if no event was removed, because not every event enters the list."""
        ...

    async def after(
        self, number: int, limit: int, *, action: EventAction | None = None, repository: str | None = None
    ) -> EventPage:
        """Returns at most `limit` events of the list with numbers above `number`, oldest first. `action` and
        `repository`: only such events (None: all)."""
        ...

    async def before(
        self, number: int | None, limit: int, *, action: EventAction | None = None, repository: str | None = None
    ) -> EventPage:
        """Returns at most `limit` events of the list with numbers below `number` (None: all of them), newest first.
        `action` and `repository`: only such events (None: all)."""
        ...

    async def deliveries(
        self,
        webhook: str | None,
        after: DeliveryPosition | None,
        limit: int,
        *,
        only_dead: bool,
        only_pending: bool = False,
    ) -> Sequence[Delivery]:
        """Returns at most `limit` deliveries of one webhook (None: of all), in the order of `DeliveryPosition`: those
        that follow `after` (None: from the first on). `only_dead`: only dead letters. `only_pending`: only deliveries
        that the server still tries."""
        ...

    async def retry(self, webhook: str | None, event: int | None) -> int:
        """Makes dead letters due again, so that the server sends them: the dead letters of a webhook (None: of all) and
        of an event (None: of all). Returns their number."""
        ...

    async def tidy(self, limits: EventLimits) -> Sequence[DroppedDeliveries]:
        """Deletes the deliveries of removed webhooks, and then the events and deliveries that exceed the limits, oldest
        first, in several transactions if there are many. Returns how many pending deliveries and how many dead letters
        of each webhook exceeded the limits."""
        ...

    async def backlog(self) -> Sequence[WebhookBacklog]:
        """Returns the backlog of each webhook."""
        ...
