"""Bodies and answers that are held in memory: within a budget, at a least rate, and read in turn."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import tracemalloc
from collections.abc import Callable, Sequence
from functools import partial

import pytest
from fastapi import APIRouter, Request

from registry.admin.management_route import ManagementRoute
from registry.app import create_app
from registry.asgi import Message
from registry.config import Settings
from registry.http import DistributionAPI
from registry.http.body_memory import UNCOUNTED_RESPONSE_BYTES, BodyMemory
from registry.http.exchange import RequestLimits
from registry.memory_budget import MAX_WAITING, MIB, SMALL_SHARE_BYTES, MemoryBudget, Share, ShareScope
from storage.content import OCI_MANIFEST, Actor, Condition, Descriptor, Manifest, digest_of
from storage.errors import TooManyRequests
from storage.memory_registry import MemoryRegistry
from storage.names import Digest, Reference, RepositoryName, Tag
from tests.fakes.asgi_client import AsgiClient, scope_of
from tests.unit.registry.conftest import REPO, V2, image, put_blob, put_image

KIB = 1024
PUT = {"content-type": OCI_MANIFEST}
LARGE = 100 * KIB


def large_image(n: str = "") -> bytes:
    return image(annotations={"a": "x" * LARGE, "n": n})


class PiecewiseSender:
    """A client that sends its body piece by piece, when it is told to."""

    def __init__(self, api: object, body: bytes, name: str = "t", declared: bool = True) -> None:
        self.api = api
        headers = {**PUT, **({"content-length": str(len(body))} if declared else {"transfer-encoding": "chunked"})}
        self.scope = scope_of("PUT", f"{V2}/manifests/{name}", headers)
        self.left: bool = False
        self.scope["extensions"] = {"entrepot.body": {"receive": self._receive, "is_disconnected": lambda: self.left}}
        self.body = body
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.answer = b""
        self._pieces: asyncio.Queue[tuple[list[bytes], bool] | None] = asyncio.Queue()

    def start(self) -> asyncio.Task[None]:
        return asyncio.create_task(self.api(self.scope, self._messages, self._send))  # type: ignore[operator]

    def send(self, piece: bytes, *, more: bool = True) -> None:
        self._pieces.put_nowait(([piece], more))

    def send_all(self) -> None:
        self.send(self.body, more=False)

    def leave(self) -> None:
        self.left = True
        self._pieces.put_nowait(None)

    @property
    def message(self) -> str:
        return str(json.loads(self.answer)["errors"][0]["message"])

    async def _receive(self) -> tuple[list[bytes], bool] | None:
        return await self._pieces.get()

    async def _messages(self) -> Message:
        while await self._pieces.get() is not None:
            pass
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], dict(message["headers"])
        else:
            self.answer += message["body"]


def api_of(registry: MemoryRegistry, intake: BodyMemory) -> DistributionAPI:
    return DistributionAPI(registry, body_memory=intake)


def budget(size: int, **more: float) -> MemoryBudget:
    return MemoryBudget(size, "request bodies", **more)


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not true():  # noqa: ASYNC110  nobody tells
            await asyncio.sleep(0.001)


async def test_bodies_beyond_the_budget_are_429(registry: MemoryRegistry) -> None:
    """Whoever finds no memory within the wait is told so, and when to come again; nothing of the body is read."""
    intake = BodyMemory(manifests=budget(200 * KIB, wait_seconds=0.05, slow_seconds=60))
    await put_blob(registry, b"{}")
    first, second = (PiecewiseSender(api_of(registry, intake), large_image(), name) for name in "ab")
    held = first.start()
    first.send(first.body[:-1])
    await until(lambda: intake.manifests.used > LARGE)
    await second.start()
    assert (second.status, second.headers[b"retry-after"]) == (429, b"1")
    assert "holds as many request bodies in memory as it may; try again" in second.message
    first.send(first.body[-1:], more=False)
    await held
    assert first.status == 201
    assert intake.manifests.used == 0


async def test_who_waits_gets_in_when_there_is_room(registry: MemoryRegistry) -> None:
    """In the order of asking."""
    intake = BodyMemory(manifests=budget(200 * KIB, wait_seconds=30, slow_seconds=60))
    await put_blob(registry, b"{}")
    senders = [PiecewiseSender(api_of(registry, intake), large_image(), name) for name in "abc"]
    tasks = [sender.start() for sender in senders]
    for sender, task in zip(senders, tasks, strict=True):
        sender.send_all()
        await task
        assert sender.status == 201


async def test_a_received_small_manifest_needs_no_budget(registry: MemoryRegistry) -> None:
    """A manifest of a few KiB that arrived together with its head is stored while other bodies use the whole budget."""
    memory = BodyMemory(manifests=budget(200 * KIB, wait_seconds=30, slow_seconds=60))
    await put_blob(registry, b"{}")
    share = memory.manifests.share()
    assert share.try_grow(200 * KIB)
    small = PiecewiseSender(api_of(registry, memory), image(), "small")
    small.scope["extensions"]["entrepot.body"]["take_whole"] = lambda: [small.body[:9], small.body[9:]]
    await small.start()
    assert small.status == 201
    assert (await registry.get_manifest(RepositoryName(REPO), Tag("small"))).body == small.body


async def test_small_manifests_get_past_large_ones(registry: MemoryRegistry) -> None:
    """A part of the budget is for bodies that are small, as nearly all manifests are."""
    intake = BodyMemory(manifests=budget(200 * KIB, wait_seconds=30, slow_seconds=60))
    await put_blob(registry, b"{}")
    first, second = (PiecewiseSender(api_of(registry, intake), large_image(), name) for name in "ab")
    tasks = [first.start(), second.start()]
    await until(lambda: intake.manifests.used > LARGE)
    small = PiecewiseSender(api_of(registry, intake), image(), "small")
    small.send_all()
    await small.start()
    assert small.status == 201
    for sender, task in zip((first, second), tasks, strict=True):
        sender.send_all()
        await task


async def test_a_body_that_drips_is_408(registry: MemoryRegistry) -> None:
    """After its grace, however fast the most of it came, and its memory is free again."""
    intake = BodyMemory(stall_seconds=0.05, bytes_per_second=1024 * KIB)
    sender = PiecewiseSender(api_of(registry, intake), large_image())
    sender.send(sender.body[:-10])
    task = sender.start()

    async def drip() -> None:
        while True:
            sender.send(b"x")
            await asyncio.sleep(0.02)  # its pace, not a wait for anything

    dripping = asyncio.create_task(drip())
    await task
    dripping.cancel()
    assert sender.status == 408
    assert "the body comes too slowly" in sender.message
    assert intake.manifests.used == 0


async def test_a_slow_body_is_cut_when_others_wait(registry: MemoryRegistry) -> None:
    """The one that takes longest makes room for the one that waits."""
    intake = BodyMemory(manifests=budget(200 * KIB, wait_seconds=30, slow_seconds=0.01))
    await put_blob(registry, b"{}")
    slow, other = (PiecewiseSender(api_of(registry, intake), large_image(), name) for name in "ab")
    slow.send(slow.body[:100])
    dripping = slow.start()
    await until(lambda: intake.manifests.used > LARGE)
    other.send_all()
    await other.start()
    await dripping
    assert (slow.status, other.status) == (408, 201)


async def test_a_body_of_unknown_length_counts_as_it_comes(registry: MemoryRegistry) -> None:
    """Chunked transfer coding declares nothing."""
    intake = BodyMemory(manifests=budget(400 * KIB))
    await put_blob(registry, b"{}")
    sender = PiecewiseSender(api_of(registry, intake), large_image(), declared=False)
    task = sender.start()
    sender.send(sender.body[:10])
    await until(lambda: intake.manifests.used == 10)
    sender.send(sender.body[10:-1])
    await until(lambda: intake.manifests.used >= len(sender.body) - 1)
    sender.send(sender.body[-1:], more=False)
    await task
    assert (sender.status, intake.manifests.used) == (201, 0)


async def test_who_leaves_the_queue_costs_nothing(registry: MemoryRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large manifests are read one at a time; one whose client has left meanwhile is not read at all."""
    read: list[bytes] = []
    begun, go = threading.Event(), threading.Event()
    parse = Manifest.parse.__func__  # type: ignore[attr-defined]

    def counted(kind: type[Manifest], body: bytes, media_type: str | None, expected: Digest | None = None) -> Manifest:
        read.append(body)
        begun.set()
        go.wait(30)
        found: Manifest = parse(kind, body, media_type, expected)
        return found

    monkeypatch.setattr(Manifest, "parse", classmethod(counted))
    intake = BodyMemory()
    await put_blob(registry, b"{}")
    first, second, third = (PiecewiseSender(api_of(registry, intake), large_image(n), n) for n in "abc")
    tasks = []
    for sender in (first, second, third):
        sender.send_all()
        tasks.append(sender.start())
        await until(begun.is_set)
    second.leave()
    go.set()
    await asyncio.gather(*tasks)
    assert (first.status, second.status, third.status) == (201, 0, 201)
    assert read == [first.body, third.body]
    assert intake.manifests.used == 0


class UnreadPut(PiecewiseSender):
    """A client that reads nothing of its answer until `reads` is set."""

    def __init__(self, api: object, body: bytes, name: str = "t") -> None:
        super().__init__(api, body, name)
        self.reads = asyncio.Event()

    async def _send(self, message: Message) -> None:
        await super()._send(message)
        await self.reads.wait()


@pytest.mark.parametrize("body", [large_image(), b"{" * LARGE], ids=["201", "400"])
async def test_who_does_not_read_the_answer_holds_nobody_up(registry: MemoryRegistry, body: bytes) -> None:
    """The turn and the body's memory are given back before the answer is sent, whether it is a 201 or a 400."""
    await put_blob(registry, b"{}")
    intake = BodyMemory()
    silent, other = (
        UnreadPut(api_of(registry, intake), body, "a"),
        PiecewiseSender(api_of(registry, intake), large_image(), "b"),
    )
    silent.send_all()
    waiting = silent.start()
    await until(lambda: silent.status)
    assert intake.manifests.used == 0
    other.send_all()
    async with asyncio.timeout(10):
        await other.start()
    assert other.status == 201
    silent.reads.set()
    await waiting


async def test_an_error_that_is_not_read_keeps_no_body(registry: MemoryRegistry) -> None:
    """What went wrong refers to the body: that is let go before the answer is sent."""
    size = 4 * 1024 * KIB
    silent = UnreadPut(api_of(registry, BodyMemory()), b"{" * size)
    silent.send_all()
    tracemalloc.start()
    try:
        waiting = silent.start()
        await until(lambda: silent.status)
        await until(lambda: tracemalloc.get_traced_memory()[0] < size // 2)
    finally:
        tracemalloc.stop()
    assert silent.status == 400
    silent.reads.set()
    await waiting


class SlowStore(MemoryRegistry):
    """A registry that stores the manifest of one tag only after `go`: it waits for an upstream."""

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


async def test_storing_holds_no_other_manifest_up() -> None:
    """Only the reading goes one at a time: to store one may take as long as an upstream takes to send its blobs."""
    far, intake = SlowStore("a"), BodyMemory()
    await put_blob(far, b"{}")
    first, second = (PiecewiseSender(api_of(far, intake), large_image(), name) for name in "ab")
    first.send_all()
    storing = first.start()
    await far.began.wait()
    assert intake.manifests.used >= LARGE  # it is still in memory
    second.send_all()
    async with asyncio.timeout(10):
        await second.start()
    assert second.status == 201
    far.go.set()
    await storing
    assert first.status == 201


async def test_large_answers_wait_for_memory(registry: MemoryRegistry) -> None:
    """What a client does not take is held; beyond the budget the next one waits, then it is 429. The same manifest for
    several is held once."""
    intake = BodyMemory(responses=MemoryBudget(4 * UNCOUNTED_RESPONSE_BYTES, "answers", wait_seconds=0.05))
    await put_image(registry, "a", annotations={"a": "x" * 2 * UNCOUNTED_RESPONSE_BYTES})
    await put_image(registry, "b", annotations={"a": "y" * 2 * UNCOUNTED_RESPONSE_BYTES})
    api = api_of(registry, intake)
    taken = asyncio.Event()

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

    slow = [asyncio.create_task(get("a", taken)) for _ in range(5)]
    await until(lambda: intake.responses.used > 2 * UNCOUNTED_RESPONSE_BYTES)
    assert intake.responses.used < 3 * UNCOUNTED_RESPONSE_BYTES
    assert await get("b", None) == 429
    assert await get("a", None) == 200
    taken.set()
    assert await asyncio.gather(*slow) == [200] * 5
    assert await get("b", None) == 200
    assert intake.responses.used == 0


async def test_forms_and_json_count_too() -> None:
    """Bodies for what is not the distribution API: a budget of its own, which anybody may fill, the same
    least rate, and an answer that says so."""
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
    await until(lambda: app.body_memory.forms.used == 100)
    assert app.body_memory.manifests.used == 0
    await task
    assert (sender.status, app.body_memory.forms.used) == (408, 0)


class UnreadGet:
    """A client's GET of a manifest that reads nothing of the answer until `reads` is set."""

    def __init__(
        self, api: DistributionAPI, name: str, headers: dict[str, str] | None = None, part: str = "body"
    ) -> None:
        """`part` of the answer is where it stops: the start, or the body."""
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
async def test_who_takes_an_answer_too_slowly_is_cut_when_others_wait(registry: MemoryRegistry, part: str) -> None:
    """Those who hold one manifest together are cut together; whether they have taken the headers or not."""
    intake = BodyMemory(
        responses=MemoryBudget(4 * UNCOUNTED_RESPONSE_BYTES, "answers", wait_seconds=30, slow_seconds=0.0)
    )
    await put_image(registry, "a", annotations={"a": "x" * 2 * UNCOUNTED_RESPONSE_BYTES})
    await put_image(registry, "b", annotations={"a": "y" * 2 * UNCOUNTED_RESPONSE_BYTES})
    slow = [UnreadGet(api_of(registry, intake), "a", part=part) for _ in range(5)]
    await until(lambda: intake.responses.used > 2 * UNCOUNTED_RESPONSE_BYTES)
    other = UnreadGet(api_of(registry, intake), "b")
    other.reads.set()
    async with asyncio.timeout(10):
        await other.task
    assert other.status == 200
    for each in slow:
        with pytest.raises(TooManyRequests):  # the server cuts the connection
            await each.task
    assert intake.responses.used == 0


async def test_an_answer_without_a_body_needs_no_room(registry: MemoryRegistry) -> None:
    """If-None-Match is looked at first."""
    intake = BodyMemory(responses=MemoryBudget(4 * UNCOUNTED_RESPONSE_BYTES, "answers", wait_seconds=0.05))
    await put_image(registry, "a", annotations={"a": "x" * 2 * UNCOUNTED_RESPONSE_BYTES})
    await put_image(registry, "b", annotations={"a": "y" * 2 * UNCOUNTED_RESPONSE_BYTES})
    slow = UnreadGet(api_of(registry, intake), "a")
    await until(lambda: intake.responses.used > 2 * UNCOUNTED_RESPONSE_BYTES)
    digest = (await registry.resolve_manifest(REPO, Tag("b"))).digest
    for headers, status in (({"if-none-match": f'"{digest}"'}, 304), ({}, 429)):
        other = UnreadGet(api_of(registry, intake), "b", headers)
        other.reads.set()
        await other.task
        assert other.status == status
    slow.reads.set()
    await slow.task


async def test_a_large_manifest_is_read_once() -> None:
    """Where there is room for it: a second read would be a second line in the log."""
    read: list[Reference] = []

    class Counted(MemoryRegistry):
        async def get_manifest(self, repo: RepositoryName, reference: Reference) -> Manifest:
            read.append(reference)
            return await super().get_manifest(repo, reference)

    registry = Counted()
    await put_image(registry, "a", annotations={"a": "x" * 2 * UNCOUNTED_RESPONSE_BYTES})
    answer = await AsgiClient(DistributionAPI(registry))("GET", f"{V2}/manifests/a")
    assert (answer.status, read) == (200, ["a"])


@pytest.mark.parametrize(("size", "status"), [(2 * MIB, 429), (100, 408)])
async def test_the_management_api_says_why_a_body_is_refused(size: int, status: int) -> None:
    """No memory for it, or too slow: not a 400 as for a body that is no JSON."""
    app = create_app(Settings(), MemoryRegistry())
    app.body_memory = BodyMemory(forms=MemoryBudget(MIB, "forms", wait_seconds=0.05), stall_seconds=0.05)
    await app.body_memory.forms.share().grow(MIB - 1000)
    router = APIRouter(route_class=ManagementRoute)

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
    """Also where the settings take larger ones: it need not wait until nobody else sends or is sent anything."""
    most = 64 * MIB
    app = create_app(Settings.model_validate({"limits": {"manifest": most}}), MemoryRegistry())

    async def grow() -> None:
        for memory in (app.body_memory.manifests, app.body_memory.responses):
            await memory.share().grow(SMALL_SHARE_BYTES)
            assert memory.share().try_grow(most)

    asyncio.run(grow())


async def test_the_answer_to_a_form_holds_nothing_of_it() -> None:
    """A client that does not read it keeps no memory of the form."""
    app = create_app(Settings(), MemoryRegistry())
    app.body_memory = BodyMemory()

    @app.post("/form")
    async def form(request: Request) -> int:
        return len(await request.body())

    silent = UnreadPut(app, b"")
    silent.scope.update({"path": "/form", "raw_path": b"/form", "method": "POST"})
    messages = [{"type": "http.request", "body": b"x" * 100, "more_body": False}]

    async def receive() -> Message:
        return messages.pop() if messages else await asyncio.Future()

    task = asyncio.create_task(app(silent.scope, receive, silent._send))
    await until(lambda: silent.status)
    assert (silent.status, app.body_memory.forms.used) == (200, 0)
    silent.reads.set()
    await task


async def test_what_is_kept_in_a_block_is_held_until_it_ends() -> None:
    """A share that comes after the end is closed at once."""
    memory = budget(SMALL_SHARE_BYTES)

    async def fetch(scope: ShareScope) -> None:
        share = memory.share()
        await share.grow(10)
        scope.hold(share)

    with ShareScope() as scope:
        await fetch(scope)
        await fetch(scope)
        assert memory.used == 20
    assert memory.used == 0
    await fetch(scope)
    assert memory.used == 0


async def test_a_cancelled_wait_leaves_no_trace() -> None:
    """Those behind it get in."""
    memory = budget(4 * SMALL_SHARE_BYTES, wait_seconds=30)
    first, second, third = memory.share(), memory.share(), memory.share()
    await first.grow(3 * SMALL_SHARE_BYTES)
    waiting = [asyncio.create_task(share.grow(2 * SMALL_SHARE_BYTES)) for share in (second, third)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await asyncio.wait([waiting[0]])
    first.close()
    await waiting[1]
    assert memory.used == 2 * SMALL_SHARE_BYTES


async def test_small_shares_do_not_starve_a_large_one() -> None:
    """While a large one waits, small ones get the last quarter only, so what others give back goes to it."""
    memory = budget(16 * SMALL_SHARE_BYTES, wait_seconds=30, slow_seconds=60)
    small = [memory.share() for _ in range(16)]
    for share in small:
        await share.grow(SMALL_SHARE_BYTES)
    large = memory.share()
    waiting = asyncio.create_task(large.grow(8 * SMALL_SHARE_BYTES))
    await asyncio.sleep(0)
    for share in small:  # each leaves, and comes again at once
        share.close()
        share.try_grow(SMALL_SHARE_BYTES)
        await asyncio.sleep(0)
    assert waiting.done()
    assert large.size == 8 * SMALL_SHARE_BYTES
    assert memory.used <= memory.size


async def test_slow_bodies_make_way_together() -> None:
    """As many as the one that waits needs are cut off at once, those that have come in for longest."""
    memory = budget(16 * SMALL_SHARE_BYTES, wait_seconds=1, slow_seconds=0.0)  # one at a look would need two seconds
    small = [memory.share() for _ in range(16)]
    cut: list[Share] = []

    def end(share: Share) -> None:
        cut.append(share)
        share.close()

    for share in small:
        await share.grow(SMALL_SHARE_BYTES)
        share.on_cut = partial(end, share)
        await asyncio.sleep(0.001)  # they have to differ in age
    async with asyncio.timeout(10):
        await memory.share().grow(4 * SMALL_SHARE_BYTES)
    assert cut == small[:8]


@pytest.mark.slow
async def test_many_who_wait_do_not_hold_the_loop() -> None:
    """A bounded number waits, the others are refused at once; those who wait are not looked at one by one."""
    memory = budget(16 * SMALL_SHARE_BYTES, wait_seconds=1, slow_seconds=60)
    held = [memory.share() for _ in range(16)]
    for share in held:
        await share.grow(SMALL_SHARE_BYTES)
        share.on_cut = share.close
    began = time.thread_time()

    async def come() -> bool:
        try:
            await memory.share().grow(SMALL_SHARE_BYTES)
        except TooManyRequests:
            return False
        return True

    tasks = [asyncio.create_task(come()) for _ in range(2000)]
    await until(lambda: sum(task.done() for task in tasks) >= 2000 - MAX_WAITING)
    assert sum(task.done() for task in tasks) == 2000 - MAX_WAITING
    assert not any(await asyncio.gather(*tasks))
    assert time.thread_time() - began < 1.0
    assert memory.used == 16 * SMALL_SHARE_BYTES


async def test_a_put_of_many_tags_is_answered_in_few_header_lines(registry: MemoryRegistry) -> None:
    """As many as are taken give an answer of fewer than the 100 lines that common clients read; more are 414."""
    client = AsgiClient(DistributionAPI(registry))
    await put_blob(registry, b"{}")
    most = RequestLimits().tags_per_put
    body = image()

    def path(count: int) -> str:
        return f"{V2}/manifests/{digest_of(body)}?" + "&".join(f"tag=t{number}" for number in range(count))

    answer = await client("PUT", path(most), PUT, body)
    assert answer.status == 201
    assert len(answer.all("oci-tag")) == most
    assert len(answer.fields) < 90
    refused = await client("PUT", path(most + 1), PUT, body)
    assert refused.status == 414
    assert f"at most {most} are accepted" in refused.json["errors"][0]["message"]


async def test_a_long_type_is_400(registry: MemoryRegistry) -> None:
    """It would be held for every list and every HEAD."""
    client = AsgiClient(DistributionAPI(registry))
    await put_blob(registry, b"{}")
    for more in ({"artifactType": "a" * 300}, {"subject": _typed("a" * 300)}):
        answer = await client("PUT", f"{V2}/manifests/1", PUT, image(**more))
        assert (answer.status, answer.code) == (400, "MANIFEST_INVALID")
        assert "at most 255 are taken" in answer.json["errors"][0]["message"]


def _typed(kind: str) -> dict[str, object]:
    return Descriptor(kind, digest_of(b"{}"), 2).as_json()
