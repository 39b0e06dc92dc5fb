"""Tests that other servers cannot occupy the event loop with a body in chunks of one byte. The HTTP library returns
each chunk of one read by itself, without waiting."""

from __future__ import annotations

import pytest

from registry.auth.external.identity_http import NoUsableResponse, send_request
from registry.config.event_settings import Webhook
from registry.events.attempts import DeliveryOutcome
from registry.events.webhook_client import WebhookClient
from storage.outbox import Event, EventAction, NewEvent
from tests.fakes.loop_hold import MAX_SECONDS, watch_loop
from tests.fakes.registry_content import BY
from tests.fakes.upstream_source import always, answer, scripted_server

SMALL_CHUNKS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 300_000 + b"0\r\n\r\n"
EVENT = Event(1, "11111111-2222-3333-4444-555555555555", NewEvent(EventAction.PUSH, "team/app", 0.0, BY))


async def test_response_of_a_webhook_in_small_chunks() -> None:
    """The client of a webhook takes the status, and other tasks run while it reads the chunks."""
    async with scripted_server(always(answer(200))) as server:
        client = WebhookClient(Webhook(name="ci", url=server.url, private_network=True), "http://registry.test")
        # The first event creates the HTTP client, which takes time.
        assert (await client.send(EVENT)).outcome is DeliveryOutcome.DELIVERED
        server.reply = always(SMALL_CHUNKS)
        async with watch_loop() as hold:
            assert (await client.send(EVENT)).outcome is DeliveryOutcome.DELIVERED
        await client.aclose()
        assert hold.longest < MAX_SECONDS, hold.longest


async def test_response_of_an_identity_provider_in_small_chunks() -> None:
    """The client refuses a response that is too large, or on a busy machine one that takes too long. Other tasks run
    while it reads the chunks."""
    async with scripted_server(always(SMALL_CHUNKS)) as server, watch_loop() as hold:
        with pytest.raises(NoUsableResponse, match=r"more than|no complete response"):
            await send_request(server.url)
    assert hold.longest < MAX_SECONDS, hold.longest
