"""Request bodies in memory: they share a memory budget, must arrive at a minimum rate, and are parsed one at a time."""

from __future__ import annotations

import asyncio
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial

import pytest
from fastapi import APIRouter, Request

from registry.admin.management_route import ManagementRoute
from registry.app import create_app
from registry.asgi import Header, Message, Receive
from registry.config import Settings
from registry.http.body_memory import MIN_PIECE_BYTES, SMALL_BODY_BYTES, BodyMemory
from registry.memory_budget import MIB, SMALL_SHARE_BYTES, MemoryBudget
from storage.content import Actor, Condition, Descriptor, Manifest
from storage.errors import TooManyRequests
from storage.memory_registry import MemoryRegistry
from storage.names import Digest, RepositoryName, Tag
from tests.unit.registry.conftest import REPO, image, put_blob, wait_until
from tests.unit.registry.http.conftest import KIB, LARGE, PiecewiseSender, api_of, budget, large_image


class RouteForEveryone(ManagementRoute):
    """A route of the management API that needs no rights, because the application of the test has no accounts."""

    async def check_rights(self, request: Request) -> None:
        pass


async def discard(message: Message) -> None:
    """An ASGI `send` that does nothing."""


def received_at_once(body: bytes) -> Receive:
    """Returns an ASGI `receive` that returns the whole body."""

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


async def test_bodies_beyond_the_budget_are_429(registry: MemoryRegistry) -> None:
    """A request waits while the memory budget is used up. After the longest wait, the request gets 429 with
    Retry-After. Its body is not read."""
    body_memory = BodyMemory(manifests=budget(200 * KIB, wait_seconds=0.05, slow_seconds=60))
    await put_blob(registry, b"{}")
    first, second = (PiecewiseSender(api_of(registry, body_memory), large_image(), name) for name in "ab")
    first_task = first.start()
    first.send(first.body[:-1])
    await wait_until(lambda: body_memory.manifests.used > LARGE)
    await second.start()
    assert (second.status, second.headers[b"retry-after"]) == (429, b"1")
    assert "the memory for request bodies is in use; try again" in second.message
    first.send(first.body[-1:], more=False)
    await first_task
    assert first.status == 201
    assert body_memory.manifests.used == 0


@dataclass
class PiecesOfBody:
    """A request whose body consists of `count` pieces of 64 KiB."""

    count: int
    method: str = "PUT"
    is_disconnected: bool = False

    @property
    def length(self) -> int:
        return self.count * 64 * KIB

    async def wait_disconnected(self) -> None:
        await asyncio.Event().wait()

    async def send_whole(self, status: int, body: bytes, *headers: Header) -> None:
        raise AssertionError("no response is expected")

    def take_whole_body(self) -> bytes | None:
        return None

    async def body(self) -> AsyncIterator[bytes]:
        for number in range(self.count):
            yield bytes([number]) * (64 * KIB)


async def test_large_body_is_not_copied() -> None:
    """A large body is in memory only once while it is received. Otherwise the last copy would occupy the event loop for
    5 to 40 ms."""
    request = PiecesOfBody(128)
    tracemalloc.start()
    try:
        async with BodyMemory().receive_body(request, 8 * MIB, lambda: TooManyRequests("too large")) as body:
            peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(body) == request.length
    assert [body[position] for position in range(0, len(body), 64 * KIB)] == list(range(128))
    assert peak < 1.5 * len(body)


@pytest.mark.slow
async def test_request_that_waits_when_the_time_of_another_ends(registry: MemoryRegistry) -> None:
    """In one turn of the event loop, the time allowance of a request ends, and another request begins to wait for its
    memory. The first one is refused, the second one is stored, and no memory stays counted."""
    memory = BodyMemory(
        manifests=budget(200 * KIB, wait_seconds=30, slow_seconds=0.01), stall_seconds=1.0, bytes_per_second=1e12
    )
    patient_memory = BodyMemory(manifests=memory.manifests)  # the same budget, and an allowance that does not end here
    await put_blob(registry, b"{}")
    slow, second = (
        PiecewiseSender(api_of(registry, each), large_image(), name, declared=False)
        for each, name in ((memory, "a"), (patient_memory, "b"))
    )
    tasks = [slow.start()]
    slow.send(slow.body[:-1])
    await wait_until(lambda: memory.manifests.used > LARGE)
    await asyncio.sleep(0.6)
    tasks.append(second.start())
    await asyncio.sleep(0)
    # This turn of the event loop takes longer than the rest of the first allowance. In the next turn, the body of the
    # second request arrives, and the allowance ends. In the turn after that, the second request asks for memory before
    # the first one ends.
    time.sleep(0.5)  # noqa: ASYNC251
    asyncio.get_running_loop().call_soon(second.send_all)
    await asyncio.gather(*tasks)
    assert (slow.status, second.status) == (408, 201)
    assert memory.manifests.used == 0


async def test_waiting_requests_get_memory_in_the_order_of_arrival(registry: MemoryRegistry) -> None:
    """Requests that wait for memory get it in the order of their arrival."""
    body_memory = BodyMemory(manifests=budget(200 * KIB, wait_seconds=30, slow_seconds=60))
    await put_blob(registry, b"{}")
    senders = [PiecewiseSender(api_of(registry, body_memory), large_image(), name) for name in "abc"]
    tasks = [sender.start() for sender in senders]
    for sender, task in zip(senders, tasks, strict=True):
        sender.send_all()
        await task
        assert sender.status == 201


async def test_a_received_small_manifest_need_not_wait_for_memory(registry: MemoryRegistry) -> None:
    """If a manifest of a few KiB arrived together with the request's headers, it is stored even while other bodies use
    the whole budget."""
    memory = BodyMemory(manifests=budget(200 * KIB, wait_seconds=30, slow_seconds=60))
    await put_blob(registry, b"{}")
    share = memory.manifests.new_share()
    assert share.try_grow(200 * KIB)
    small = PiecewiseSender(api_of(registry, memory), image(), "small")
    small.scope["extensions"]["entrepot.body"]["take_whole"] = lambda: [small.body[:9], small.body[9:]]
    await small.start()
    assert small.status == 201
    assert (await registry.get_manifest(RepositoryName(REPO), Tag("small"))).body == small.body


async def test_small_manifests_do_not_wait_for_large_ones(registry: MemoryRegistry) -> None:
    """A part of the budget is reserved for small bodies, so that they need not wait for large ones."""
    body_memory = BodyMemory(manifests=budget(200 * KIB, wait_seconds=30, slow_seconds=60))
    await put_blob(registry, b"{}")
    first, second = (PiecewiseSender(api_of(registry, body_memory), large_image(), name) for name in "ab")
    tasks = [first.start(), second.start()]
    await wait_until(lambda: body_memory.manifests.used > LARGE)
    small = PiecewiseSender(api_of(registry, body_memory), image(), "small")
    small.send_all()
    await small.start()
    assert small.status == 201
    for sender, task in zip((first, second), tasks, strict=True):
        sender.send_all()
        await task


async def test_a_slow_body_is_408(registry: MemoryRegistry) -> None:
    """A body that arrives more slowly than the minimum rate gets 408, even if most of it arrived at once. Its memory is
    released."""
    body_memory = BodyMemory(stall_seconds=0.05, bytes_per_second=1024 * KIB)
    sender = PiecewiseSender(api_of(registry, body_memory), large_image())
    sender.send(sender.body[:-10])
    task = sender.start()

    async def drip() -> None:
        while True:
            sender.send(b"x")
            await asyncio.sleep(0.02)  # the pace of the client; the test does not wait for anything here

    dripping = asyncio.create_task(drip())
    await task
    dripping.cancel()
    assert sender.status == 408
    assert "the body comes too slowly" in sender.message
    assert body_memory.manifests.used == 0


async def test_a_slow_body_is_cut_off_when_another_request_waits(registry: MemoryRegistry) -> None:
    """If a request waits for memory, the slow request that has held memory for the longest time is cut off with 408."""
    body_memory = BodyMemory(manifests=budget(200 * KIB, wait_seconds=30, slow_seconds=0.01))
    await put_blob(registry, b"{}")
    slow, other = (PiecewiseSender(api_of(registry, body_memory), large_image(), name) for name in "ab")
    slow.send(slow.body[:100])
    slow_task = slow.start()
    await wait_until(lambda: body_memory.manifests.used > LARGE)
    other.send_all()
    await other.start()
    await slow_task
    assert (slow.status, other.status) == (408, 201)


async def test_a_body_of_unknown_length_takes_memory_as_it_arrives(registry: MemoryRegistry) -> None:
    """A body in chunked transfer coding has no known length, so its share of the budget grows while it is received."""
    body_memory = BodyMemory(manifests=budget(400 * KIB))
    await put_blob(registry, b"{}")
    sender = PiecewiseSender(api_of(registry, body_memory), large_image(), declared=False)
    task = sender.start()
    sender.send(sender.body[:10])
    await wait_until(lambda: body_memory.manifests.used == 10)
    sender.send(sender.body[10:-1])
    await wait_until(lambda: body_memory.manifests.used >= len(sender.body) - 1)
    sender.send(sender.body[-1:], more=False)
    await task
    assert (sender.status, body_memory.manifests.used) == (201, 0)


async def test_the_manifest_of_a_disconnected_client_is_not_parsed(
    registry: MemoryRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large manifests are parsed one at a time. If the client of a waiting request disconnects, its manifest is not
    parsed."""
    parsed_bodies: list[bytes] = []
    started, go = threading.Event(), threading.Event()
    parse = Manifest.parse.__func__  # type: ignore[attr-defined]

    def parse_when_allowed(
        kind: type[Manifest], body: bytes, media_type: str | None, expected: Digest | None = None
    ) -> Manifest:
        parsed_bodies.append(body)
        started.set()
        go.wait(30)
        manifest: Manifest = parse(kind, body, media_type, expected)
        return manifest

    monkeypatch.setattr(Manifest, "parse", classmethod(parse_when_allowed))
    body_memory = BodyMemory()
    await put_blob(registry, b"{}")
    first, second, third = (PiecewiseSender(api_of(registry, body_memory), large_image(n), n) for n in "abc")
    tasks = []
    for sender in (first, second, third):
        sender.send_all()
        tasks.append(sender.start())
        await wait_until(started.is_set)
    second.leave()
    go.set()
    await asyncio.gather(*tasks)
    assert (first.status, second.status, third.status) == (201, 0, 201)
    assert parsed_bodies == [first.body, third.body]
    assert body_memory.manifests.used == 0


class SlowStore(MemoryRegistry):
    """A registry that stores the manifest of one tag only after `go` is set. It stands for a registry that has to wait
    for an upstream."""

    def __init__(self, tag: str) -> None:
        super().__init__()
        self.tag = tag
        self.began, self.go = asyncio.Event(), asyncio.Event()

    async def put_manifest(
        self,
        repo: RepositoryName,
        manifest: Manifest,
        tags: Sequence[Tag] = (),
        *,
        by: Actor,
        sparse: bool = False,
        condition: Condition | None = None,
    ) -> Descriptor:
        if self.tag in tags:
            self.began.set()
            await self.go.wait()
        return await super().put_manifest(repo, manifest, tags, by=by, sparse=sparse, condition=condition)


async def test_storing_one_manifest_does_not_delay_others() -> None:
    """While one manifest is being stored, others can be parsed and stored. Only parsing runs one at a time, because
    storing may have to wait for an upstream."""
    slow_store, body_memory = SlowStore("a"), BodyMemory()
    await put_blob(slow_store, b"{}")
    first, second = (PiecewiseSender(api_of(slow_store, body_memory), large_image(), name) for name in "ab")
    first.send_all()
    storing = first.start()
    await slow_store.began.wait()
    assert body_memory.manifests.used >= LARGE  # the first manifest is still in memory
    second.send_all()
    async with asyncio.timeout(10):
        await second.start()
    assert second.status == 201
    slow_store.go.set()
    await storing
    assert first.status == 201


async def test_bodies_outside_v2_have_a_budget_of_their_own() -> None:
    """Bodies of requests outside `/v2` (forms and JSON) use a memory budget of their own, and must arrive at the same
    minimum rate. A body that is too slow gets 408."""
    app = create_app(Settings(), MemoryRegistry())
    app.body_memory = BodyMemory(stall_seconds=0.05, bytes_per_second=1024 * KIB)

    @app.post("/form")
    async def form(request: Request) -> int:
        return len(await request.body())

    sender = PiecewiseSender(app, b"a" * 1000)
    sender.scope.update({"path": "/form", "raw_path": b"/form", "method": "POST"})
    sent = asyncio.Event()

    async def receive() -> Message:
        if sent.is_set():
            await asyncio.Event().wait()
        sent.set()
        return {"type": "http.request", "body": b"x" * 100, "more_body": True}

    task = asyncio.create_task(app(sender.scope, receive, sender._send))
    await sent.wait()
    await wait_until(lambda: app.body_memory.forms.used == 100)
    assert app.body_memory.manifests.used == 0
    await task
    assert (sender.status, app.body_memory.forms.used) == (408, 0)


async def test_a_small_form_need_not_wait_for_memory() -> None:
    """A form of up to 16 KiB that arrives in one piece, such as that of a login, is received even while other bodies
    use the whole budget. It does not count against the budget."""
    forms = MemoryBudget(MIB, "forms", wait_seconds=30)
    await forms.new_share().grow(MIB)
    form = b"x" * SMALL_BODY_BYTES

    async with BodyMemory(forms=forms).limit_body(received_at_once(form), discard, "192.0.2.1") as (receive, _):
        assert (await receive())["body"] == form
        assert forms.used == MIB


async def test_one_client_cannot_use_up_the_memory_for_forms() -> None:
    """The forms of one client use at most a quarter of the budget for forms. A further one is refused with 429, while
    another client's form is received. Clients are told apart by their IP address, for IPv6 by the /64 network."""
    app = create_app(Settings(), MemoryRegistry())
    app.body_memory = BodyMemory(forms=MemoryBudget(MIB, "forms", wait_seconds=30))

    @app.post("/form")
    async def form(request: Request) -> int:
        return len(await request.body())

    async def never_complete(first: list[Message]) -> Message:
        return first.pop() if first else await asyncio.Future()

    def post(address: str) -> tuple[PiecewiseSender, asyncio.Task[None]]:
        sender = PiecewiseSender(app, b"")
        sender.scope.update({"path": "/form", "raw_path": b"/form", "method": "POST", "client": (address, 50_000)})
        first: list[Message] = [{"type": "http.request", "body": b"x" * 60 * KIB, "more_body": True}]
        return sender, asyncio.create_task(app(sender.scope, partial(never_complete, first), sender._send))

    tasks = [post(f"2001:db8::{number}")[1] for number in range(4)]
    await wait_until(lambda: app.body_memory.forms.used == 4 * 60 * KIB)
    refused, refused_task = post("2001:db8::5")
    await refused_task
    assert refused.status == 429
    tasks.append(post("2001:db8:0:1::5")[1])
    await wait_until(lambda: app.body_memory.forms.used == 5 * 60 * KIB)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert app.body_memory.forms.used == 0


@pytest.mark.slow
async def test_small_pieces_of_a_form_are_joined() -> None:
    """The application gets a body that arrives byte by byte in a few pieces, because it keeps each piece as an object
    of its own. If the client disconnects, the application gets the message `http.disconnect` instead of the body."""
    received = bytes(number % 251 for number in range(3 * MIN_PIECE_BYTES + 100))
    is_disconnecting = False

    async def send_byte_by_byte() -> AsyncIterator[Message]:
        for number, byte in enumerate(received):
            if is_disconnecting:
                yield {"type": "http.disconnect"}
            yield {"type": "http.request", "body": bytes([byte]), "more_body": number + 1 < len(received)}

    for is_disconnecting in (False, True):
        async with BodyMemory().limit_body(partial(anext, send_byte_by_byte()), discard, None) as (receive, _):
            messages = [await receive()]
            while messages[-1].get("more_body"):
                messages.append(await receive())
        if is_disconnecting:
            assert messages == [{"type": "http.disconnect"}]
        else:
            assert len(messages) == 4  # three full pieces, and the last 100 bytes
            assert b"".join(message["body"] for message in messages) == received


@pytest.mark.parametrize(("size", "status"), [(2 * MIB, 429), (100, 408)])
async def test_the_management_api_says_why_a_body_is_refused(size: int, status: int) -> None:
    """If there is no memory for a body, the management API (`/api`) answers 429. If the body arrives too slowly, it
    answers 408. It does not answer 400, as it would for a body that is not JSON."""
    app = create_app(Settings(), MemoryRegistry())
    app.body_memory = BodyMemory(forms=MemoryBudget(MIB, "forms", wait_seconds=0.05), stall_seconds=0.05)
    await app.body_memory.forms.new_share().grow(MIB - 1000)  # leaves 1000 bytes for the request
    router = APIRouter(route_class=RouteForEveryone)

    @router.post("/json")
    async def read(document: dict[str, int]) -> int:
        return len(document)

    app.include_router(router)
    sender = PiecewiseSender(app, b"")
    sender.scope.update({"path": "/json", "raw_path": b"/json", "method": "POST"})
    sender.scope["headers"] = [(b"content-type", b"application/json")]
    messages = [{"type": "http.request", "body": b"x" * min(size, 60_000), "more_body": True}]

    async def receive() -> Message:
        return messages.pop() if messages else await asyncio.Future()

    await app(sender.scope, receive, sender._send)
    assert sender.status == status
    assert (b"retry-after" in sender.headers) == (status == 429)


def test_the_largest_manifest_leaves_room_for_others() -> None:
    """While a small body is in memory, the budgets still have enough memory for a manifest of the largest size that the
    settings allow. So such a manifest need not wait until no other body is in memory."""
    largest_bytes = 64 * MIB
    app = create_app(Settings.model_validate({"limits": {"manifest": largest_bytes}}), MemoryRegistry())

    async def grow() -> None:
        for memory in (app.body_memory.manifests, app.body_memory.responses):
            await memory.new_share().grow(SMALL_SHARE_BYTES)
            assert memory.new_share().try_grow(largest_bytes)

    asyncio.run(grow())
