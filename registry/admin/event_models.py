"""Events and their deliveries, as the management API and `entrepot events --json` show them. The docstrings of the
models and the descriptions of their fields appear in the OpenAPI document."""

from __future__ import annotations

from datetime import datetime
from typing import Self

from pydantic import BaseModel, Field

from registry.admin import models
from storage.outbox import Delivery, Event


class EventResponse(BaseModel):
    """An event. `address`, `request` and `user_agent` are null for a caller who may not push."""

    number: int = Field(description="Later events have higher numbers")
    id: str = Field(description="A UUID. Webhooks get the same value")
    time: datetime
    action: str
    repository: str
    tag: str | None
    digest: str | None
    previous: str | None = Field(description="The digest at which the tag pointed before the tag moved")
    media_type: str
    size: int
    actor: str
    address: str | None
    request: str | None
    user_agent: str | None
    reason: str

    @classmethod
    def from_stored(cls, event: Event, *, with_client: bool = True) -> Self:
        """Converts a stored event. `with_client`: whether to include `address`, `request` and `user_agent`."""
        content, by = event.content, event.content.by
        return cls(
            number=event.number,
            id=event.id,
            time=models.to_datetime(content.at),
            action=content.action,
            repository=content.repository,
            tag=content.tag,
            digest=content.digest,
            previous=content.previous,
            media_type=content.media_type,
            size=content.size,
            actor=by.name,
            address=by.address if with_client else None,
            request=by.request_id if with_client else None,
            user_agent=by.user_agent if with_client else None,
            reason=content.reason,
        )


class DeliveryResponse(BaseModel):
    """An event that a webhook has not accepted yet. After the server has given it up, the event is a dead letter."""

    webhook: str
    event: EventResponse
    attempts: int = Field(description="Number of failed attempts so far")
    error: str = Field(description="Why the last attempt failed")
    next_attempt: datetime | None = Field(
        description="Time of the next attempt; null: the event waits for its turn, or is a dead letter"
    )
    dead_since: datetime | None = Field(description="When the server gave up; null: the server still tries")

    @classmethod
    def from_stored(cls, delivery: Delivery) -> Self:
        """Converts a stored delivery."""
        is_scheduled = delivery.dead is None and delivery.next_at > 0
        return cls(
            webhook=delivery.webhook,
            event=EventResponse.from_stored(delivery.event),
            attempts=delivery.attempts,
            error=delivery.error,
            next_attempt=models.to_datetime(delivery.next_at) if is_scheduled else None,
            dead_since=models.to_datetime_or_none(delivery.dead),
        )
