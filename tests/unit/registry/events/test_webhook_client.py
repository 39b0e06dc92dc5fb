"""How the client of a webhook understands responses."""

from __future__ import annotations

import pytest

from registry.config.event_settings import Webhook
from registry.events import webhook_client
from registry.events.attempts import DeliveryOutcome
from registry.events.webhook_client import WebhookClient
from storage.outbox import Event, EventAction, NewEvent
from tests.fakes.registry_content import BY
from tests.fakes.upstream_source import always, answer, scripted_server

EVENT = Event(1, "11111111-2222-3333-4444-555555555555", NewEvent(EventAction.PUSH, "team/app", 0.0, BY))


@pytest.mark.parametrize(("status", "outcome"), [(200, DeliveryOutcome.DELIVERED), (500, DeliveryOutcome.REFUSED)])
@pytest.mark.parametrize("is_cut", [False, True])
async def test_status_counts_without_the_body(
    monkeypatch: pytest.MonkeyPatch, is_cut: bool, status: int, outcome: DeliveryOutcome
) -> None:
    """The endpoint answers, and then sends only a part of the body, or closes the connection in the middle of it. The
    status counts, and the event is sent once. The next event goes through another connection."""
    monkeypatch.setattr(webhook_client, "MAX_READ_SECONDS", 0.05)
    headers = {"connection": "close"} if is_cut else {}
    async with scripted_server(always(answer(status, "ab", content_length="10", **headers))) as server:
        client = WebhookClient(Webhook(name="ci", url=server.url, private_network=True), "http://registry.test")
        assert (await client.send(EVENT)).outcome is outcome
        assert (server.count, server.connections) == (1, 1)
        assert (await client.send(EVENT)).outcome is outcome
        assert (server.count, server.connections) == (2, 2)
        await client.aclose()
