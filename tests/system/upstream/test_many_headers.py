"""Tests that other servers cannot occupy the event loop with many header lines. Each HTTP client of the registry
refuses a response with too many header lines before it parses them."""

from __future__ import annotations

import pytest

from registry.auth.external.identity_http import NoUsableResponse, send_request
from registry.config.event_settings import Webhook
from registry.events.attempts import DeliveryOutcome
from registry.events.webhook_client import WebhookClient
from registry.response_limits import MAX_HEADER_LINES
from storage.errors import RegistryError, UpstreamUnavailable
from storage.outbox import Event, EventAction, NewEvent
from storage.store.stored_registry import StoredRegistry
from tests.fakes.loop_hold import MAX_SECONDS, watch_loop
from tests.fakes.registry_content import BY
from tests.fakes.upstream_content import ImageTree
from tests.fakes.upstream_source import REPO, TAG, always, answer, fetch, scripted_server, upstream_source
from tests.system.upstream.conftest import ABSENT_DIGEST

# Responses with very many lines. Each has less than 100 KiB, the largest head that the HTTP library reads.
MANY_LINES = {
    "cookies": b"HTTP/1.1 200 OK\r\n" + b"Set-Cookie: a=b; c\r\n" * 4_800 + b"Content-Length: 0\r\n\r\n",
    "short headers": b"HTTP/1.1 200 OK\r\n" + b"a:b\r\n" * 18_500 + b"Content-Length: 0\r\n\r\n",
    "interim responses": b"HTTP/1.1 103 \r\n\r\n" * 5_000 + answer(200, "{}"),
    "interim responses with headers": (b"HTTP/1.1 103 \r\n" + b"a:b\r\n" * 400 + b"\r\n") * 40 + answer(200, "{}"),
    "trailers": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n"
    + b"a:b\r\n" * 18_500
    + b"\r\n",
}


@pytest.mark.parametrize("kind", MANY_LINES)
async def test_response_of_an_upstream_with_many_header_lines(registry: StoredRegistry, kind: str) -> None:
    """The client of an upstream refuses the response, and does not send the request again."""
    async with (
        scripted_server(always(answer(404))) as server,
        upstream_source(registry, server.url) as source,
    ):
        with pytest.raises(RegistryError):  # the first request also creates the HTTP client, which takes time
            await source.get_manifest(REPO, TAG)
        server.reply = always(MANY_LINES[kind])
        async with watch_loop() as hold:
            with pytest.raises(UpstreamUnavailable, match=f"more than {MAX_HEADER_LINES} header lines"):
                await source.get_manifest(REPO, TAG)
        assert (server.count, hold.longest < MAX_SECONDS) == (2, True), hold.longest


@pytest.mark.parametrize("kind", MANY_LINES)
async def test_response_of_a_webhook_with_many_header_lines(kind: str) -> None:
    """The client of a webhook treats the response as a failure of the endpoint."""
    async with scripted_server(always(answer(200))) as server:
        client = WebhookClient(Webhook(name="ci", url=server.url, private_network=True), "http://registry.test")
        event = Event(1, "11111111-2222-3333-4444-555555555555", NewEvent(EventAction.PUSH, "team/app", 0.0, BY))
        assert (await client.send(event)).outcome is DeliveryOutcome.DELIVERED
        server.reply = always(MANY_LINES[kind])
        async with watch_loop() as hold:
            assert (await client.send(event)).outcome is DeliveryOutcome.DOWN
        await client.aclose()
    assert hold.longest < MAX_SECONDS


async def test_response_of_an_identity_provider_with_many_header_lines() -> None:
    """The client of OpenID providers and token issuers refuses the responses."""
    for kind, response in MANY_LINES.items():
        async with scripted_server(always(response)) as server:
            with pytest.raises(NoUsableResponse, match="header lines"):
                await send_request(server.url)
            assert server.count == 1, kind


async def test_usual_numbers_of_header_lines(registry: StoredRegistry, image: ImageTree) -> None:
    """Responses with many, but not too many, headers, interim responses and trailers are accepted. The lines are
    counted for each response, also if it comes over the same connection."""
    interim = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 100
    many = {f"x-{number}": "y" for number in range(200)}
    plain = answer(200, image.body, content_type=image.media_type, **many)
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {image.media_type}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    chunks = b"%x\r\n%b\r\n0\r\n" % (len(image.body), image.body) + b"Digest: HTTP/1.1 1\r\n" * 200 + b"\r\n"
    async with (
        scripted_server(lambda request: interim + (head + chunks if server.count % 2 else plain)) as server,
        upstream_source(registry, server.url) as source,
    ):
        for _ in range(6):
            assert (await source.get_manifest(REPO, TAG)).digest == image.digest
        assert server.connections == 1


@pytest.mark.parametrize("line", [b"a:b\r\n" * 200, b"a: " + b"b" * 70_000 + b"\r\n"])
async def test_blob_with_too_many_or_too_long_header_lines(registry: StoredRegistry, line: bytes) -> None:
    """The download of a blob is refused, and the request is not sent again."""
    async with (
        scripted_server(always(b"HTTP/1.1 200 OK\r\n" + line + b"\r\n")) as server,
        upstream_source(registry, server.url) as source,
    ):
        with pytest.raises(UpstreamUnavailable, match="header lines"):
            await fetch(source, ABSENT_DIGEST)
        assert server.count == 1


@pytest.mark.parametrize("interim", [b"102 Processing", b"103 Early Hints\r\nLink: </x>", b"100 Continue", b"199 X"])
async def test_interim_responses_before_a_blob(registry: StoredRegistry, interim: bytes) -> None:
    """Interim responses (RFC 9110, 15.2) before the response with a blob are skipped, and the connection is reused. If
    there are very many, the download is refused, and the request is not sent again."""
    response = b"HTTP/1.1 " + interim + b"\r\n\r\n"
    async with (
        scripted_server(always(response * 100 + answer(200, "0123456789"))) as server,
        upstream_source(registry, server.url) as source,
    ):
        for _ in range(3):
            assert bytes((await fetch(source, ABSENT_DIGEST)).body) == b"0123456789"
        assert (server.count, server.connections) == (3, 1)
        server.reply = always(response * 1_000 + answer(200, "0123456789"))
        with pytest.raises(UpstreamUnavailable, match="header lines"):
            await fetch(source, ABSENT_DIGEST)
        assert server.count == 4
