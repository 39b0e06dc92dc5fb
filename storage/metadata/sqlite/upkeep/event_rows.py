"""The columns of events and deliveries that queries of the metadata database select, and the objects made of such
rows. An *event* is one thing that happened to a repository, such as a push or a pull. A *delivery* is an event that has
to be sent to one webhook."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from storage.content import Actor
from storage.outbox import Delivery, Event, EventAction, NewEvent

EVENT_COLUMNS: Final = (
    "e.id, e.uuid, e.at, e.action, e.repository, e.tag, e.digest, e.previous, e.media_type, e.size, e.actor, "
    "e.address, e.request_id, e.user_agent, e.reason"
)
"""The columns of the table `event`, which the query calls `e`. `previous`: the digest that the tag pointed at before it
moved."""
DELIVERY_COLUMNS: Final = f"d.webhook, d.attempts, d.next_at, d.dead, d.error, {EVENT_COLUMNS}"
"""The columns of the table `event_delivery`, which the query calls `d`, and of the event that has to be sent.
`next_at`: when the server tries next. `dead`: when the server gave up the delivery; NULL: it still tries."""


def to_event(row: Sequence[Any]) -> Event:
    """Returns the event of a row with the columns `EVENT_COLUMNS`."""
    number, uuid, at, action, repository, tag, digest, previous, media_type, size, *origin_columns = row
    actor, address, request_id, user_agent, reason = origin_columns
    by = Actor(actor, address, request_id, user_agent)
    # `NewEvent` is the content of an event without its number (the column `id`) and its UUID.
    content = NewEvent(EventAction(action), repository, at, by, tag, digest, previous, media_type, size, reason)
    return Event(number, uuid, content)


def to_delivery(row: Sequence[Any]) -> Delivery:
    """Returns the delivery of a row with the columns `DELIVERY_COLUMNS`."""
    webhook, attempts, next_at, dead, error, *event = row
    return Delivery(webhook, to_event(event), attempts, next_at, dead, error)
