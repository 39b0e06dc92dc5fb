"""Clients that do not read their response. While a client does not read, its request's body is not kept in memory. A
budget limits the memory of all unread responses."""

from __future__ import annotations

import asyncio
import tracemalloc

import pytest
from fastapi import Request

from registry.app import create_app
from registry.asgi import Message
from registry.config import Settings
from registry.http import DistributionAPI
from registry.http.body_memory import MAX_UNCOUNTED_RESPONSE_BYTES, BodyMemory
from registry.memory_budget import MemoryBudget
from storage.content import Manifest
from storage.errors import TooManyRequests
from storage.memory_registry import MemoryRegistry
from storage.names import Reference, RepositoryName, Tag
from tests.fakes.asgi_client import AsgiClient, scope_of
from tests.unit.registry.conftest import REPO, V2, put_blob, put_image, wait_until
from tests.unit.registry.http.conftest import KIB, LARGE, PiecewiseSender, StalledReader, api_of, large_image


@pytest.mark.parametrize("body", [large_image(), b"{" * LARGE], ids=["201", "400"])
async def test_a_client_that_does_not_read_delays_no_other(registry: MemoryRegistry, body: bytes) -> None:
    """Before the response is sent, the memory of the request's body is released, and the next manifest can be parsed.
    This holds for a 201 and for a 400."""
    await put_blob(registry, b"{}")
    body_memory = BodyMemory()
    silent, other = (
        StalledReader(api_of(registry, body_memory), body, "a"),
        PiecewiseSender(api_of(registry, body_memory), large_image(), "b"),
    )
    silent.send_all()
    waiting_request = silent.start()
    await wait_until(lambda: silent.status)
    assert body_memory.manifests.used == 0
    other.send_all()
    async with asyncio.timeout(10):
        await other.start()
    assert other.status == 201
    silent.reads.set()
    await waiting_request


async def test_an_unread_error_does_not_keep_the_body_in_memory(registry: MemoryRegistry) -> None:
    """The traceback of an error refers to the request's body. So the traceback is dropped before the error response is
    sent."""
    size = 4 * 1024 * KIB
    silent = StalledReader(api_of(registry, BodyMemory()), b"{" * size)
    silent.send_all()
    tracemalloc.start()
    try:
        waiting = silent.start()
        await wait_until(lambda: silent.status)
        await wait_until(lambda: tracemalloc.get_traced_memory()[0] < size // 2)
    finally:
        tracemalloc.stop()
    assert silent.status == 400
    silent.reads.set()
    await waiting


async def test_large_responses_wait_for_memory(registry: MemoryRegistry) -> None:
    """A response stays in memory until the client has received it. If the budget is used up, the next request waits,
    and then gets 429. Responses with the same manifest count once."""
    body_memory = BodyMemory(responses=MemoryBudget(4 * MAX_UNCOUNTED_RESPONSE_BYTES, "answers", wait_seconds=0.05))
    await put_image(registry, "a", annotations={"a": "x" * 2 * MAX_UNCOUNTED_RESPONSE_BYTES})
    await put_image(registry, "b", annotations={"a": "y" * 2 * MAX_UNCOUNTED_RESPONSE_BYTES})
    api = api_of(registry, body_memory)
    may_receive = asyncio.Event()

    async def get(name: str, gate: asyncio.Event | None) -> int:
        status = 0

        async def send(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            if gate is not None and message["type"] == "http.response.body":
                await gate.wait()

        async def receive() -> Message:
            await asyncio.Event().wait()
            raise AssertionError

        await api(scope_of("GET", f"{V2}/manifests/{name}", {}), receive, send)
        return status

    slow = [asyncio.create_task(get("a", may_receive)) for _ in range(5)]
    await wait_until(lambda: body_memory.responses.used > 2 * MAX_UNCOUNTED_RESPONSE_BYTES)
    assert body_memory.responses.used < 3 * MAX_UNCOUNTED_RESPONSE_BYTES
    assert await get("b", None) == 429
    assert await get("a", None) == 200
    may_receive.set()
    assert await asyncio.gather(*slow) == [200] * 5
    assert await get("b", None) == 200
    assert body_memory.responses.used == 0


class UnreadGet:
    """A client that sends a GET of a manifest and reads nothing of the response until `reads` is set."""

    def __init__(
        self, api: DistributionAPI, name: str, headers: dict[str, str] | None = None, part: str = "body"
    ) -> None:
        """`part` is the part of the response before which the client stops reading: "start" or "body"."""
        self.status = 0
        self.reads = asyncio.Event()
        self._part = f"http.response.{part}"
        self.task = asyncio.create_task(
            api(scope_of("GET", f"{V2}/manifests/{name}", headers or {}), self._receive, self._send)
        )

    async def _receive(self) -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def _send(self, message: Message) -> None:
        if message["type"] == self._part:
            await self.reads.wait()
        self.status = message.get("status", self.status)


@pytest.mark.parametrize("part", ["start", "body"])
async def test_slow_clients_are_cut_off_when_a_request_waits(registry: MemoryRegistry, part: str) -> None:
    """When a request waits for memory, slow clients are cut off. All clients that are receiving the same manifest are
    cut off together, whether or not they have received the headers."""
    body_memory = BodyMemory(
        responses=MemoryBudget(4 * MAX_UNCOUNTED_RESPONSE_BYTES, "answers", wait_seconds=30, slow_seconds=0.0)
    )
    await put_image(registry, "a", annotations={"a": "x" * 2 * MAX_UNCOUNTED_RESPONSE_BYTES})
    await put_image(registry, "b", annotations={"a": "y" * 2 * MAX_UNCOUNTED_RESPONSE_BYTES})
    slow = [UnreadGet(api_of(registry, body_memory), "a", part=part) for _ in range(5)]
    await wait_until(lambda: body_memory.responses.used > 2 * MAX_UNCOUNTED_RESPONSE_BYTES)
    other = UnreadGet(api_of(registry, body_memory), "b")
    other.reads.set()
    async with asyncio.timeout(10):
        await other.task
    assert other.status == 200
    for each in slow:
        with pytest.raises(TooManyRequests):  # the server cuts the connection
            await each.task
    assert body_memory.responses.used == 0


async def test_a_response_without_a_body_needs_no_memory(registry: MemoryRegistry) -> None:
    """A response with 304 needs no memory, so it is sent even if the budget is used up."""
    body_memory = BodyMemory(responses=MemoryBudget(4 * MAX_UNCOUNTED_RESPONSE_BYTES, "answers", wait_seconds=0.05))
    await put_image(registry, "a", annotations={"a": "x" * 2 * MAX_UNCOUNTED_RESPONSE_BYTES})
    await put_image(registry, "b", annotations={"a": "y" * 2 * MAX_UNCOUNTED_RESPONSE_BYTES})
    slow = UnreadGet(api_of(registry, body_memory), "a")
    await wait_until(lambda: body_memory.responses.used > 2 * MAX_UNCOUNTED_RESPONSE_BYTES)
    digest = (await registry.resolve_manifest(REPO, Tag("b"))).digest
    for headers, status in (({"if-none-match": f'"{digest}"'}, 304), ({}, 429)):
        other = UnreadGet(api_of(registry, body_memory), "b", headers)
        other.reads.set()
        await other.task
        assert other.status == status
    slow.reads.set()
    await slow.task


async def test_a_large_manifest_is_read_once() -> None:
    """If there is memory for a large manifest, the manifest is read from the store only once."""
    references: list[Reference] = []

    class CountingRegistry(MemoryRegistry):
        """A registry that records each read of a manifest."""

        async def get_manifest(self, repo: RepositoryName, reference: Reference) -> Manifest:
            references.append(reference)
            return await super().get_manifest(repo, reference)

    registry = CountingRegistry()
    await put_image(registry, "a", annotations={"a": "x" * 2 * MAX_UNCOUNTED_RESPONSE_BYTES})
    answer = await AsgiClient(DistributionAPI(registry))("GET", f"{V2}/manifests/a")
    assert (answer.status, references) == (200, ["a"])


async def test_a_form_is_not_in_memory_while_its_response_is_sent() -> None:
    """While a client does not read the response to its form, the form is not in memory."""
    app = create_app(Settings(), MemoryRegistry())
    app.body_memory = BodyMemory()

    @app.post("/form")
    async def form(request: Request) -> int:
        return len(await request.body())

    silent = StalledReader(app, b"")
    silent.scope.update({"path": "/form", "raw_path": b"/form", "method": "POST"})
    messages = [{"type": "http.request", "body": b"x" * 100, "more_body": False}]

    async def receive() -> Message:
        return messages.pop() if messages else await asyncio.Future()

    task = asyncio.create_task(app(silent.scope, receive, silent._send))
    await wait_until(lambda: silent.status)
    assert (silent.status, app.body_memory.forms.used) == (200, 0)
    silent.reads.set()
    await task
