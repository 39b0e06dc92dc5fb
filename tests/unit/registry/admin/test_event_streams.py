"""The limits on streams of events (`registry.admin.event_stream`)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack, aclosing
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from fastapi import Request

from registry.admin import event_stream
from registry.admin.caller import Caller, identify_caller
from registry.admin.event_stream import (
    EVENT_STREAM_TYPE,
    KEEP_ALIVE_SECONDS,
    MAX_STREAMS_PER_VISITOR,
    EventStream,
    EventToJSON,
)
from registry.asgi import Message
from registry.events.event_feed import PAGE_EVENTS, follow
from registry.server.connection.flow_control import ClientDisconnected
from storage.access import AccountName, Action, Grantee
from storage.composition import open_registry, prepare_data_dir
from storage.errors import TooManyRequests, Unauthorized
from storage.outbox import LIST_READER, MAX_ADDED_EVENTS, Event, EventAction, EventPage, EventReader, NewEvent
from storage.patterns import NamePattern
from tests.fakes.app_in_process import AppInProcess, running_app, until
from tests.fakes.asgi_client import scope_of
from tests.fakes.store_accounts import BY, add_grant


async def stream_of(
    site: AppInProcess, login: str, after: int | None = None, as_json: EventToJSON = lambda event, caller: None
) -> EventStream:
    """Returns a stream for the account with this Authorization header. The stream is not open yet."""
    headers = [(b"host", b"registry.test"), (b"authorization", login.encode())]
    scope = {"type": "http", "method": "GET", "path": "/api/v1/events", "headers": headers, "app": site.app}
    request = Request(scope | {"client": ("192.0.2.1", 1), "query_string": b"", "scheme": "https"})
    return EventStream(request, after, as_json, await identify_caller(request))


async def test_an_account_has_a_largest_number_of_streams(tmp_path: Path) -> None:
    """One account gets only a few streams at the same time. A further stream is refused, with a time to wait, until one
    of them is closed. Other accounts still get streams."""
    async with running_app(tmp_path) as site, AsyncExitStack() as stack:
        alice, bob = await site.user("alice"), await site.user("bob")
        streams = [await (await stream_of(site, alice)).open() for _ in range(MAX_STREAMS_PER_VISITOR)]
        for stream in streams:
            await stack.enter_async_context(aclosing(stream))
        with pytest.raises(TooManyRequests, match="close one of them") as refused:
            await (await stream_of(site, alice)).open()
        assert refused.value.retry_after > 0
        await stack.enter_async_context(aclosing(await (await stream_of(site, bob)).open()))
        await streams[0].aclose()
        await stack.enter_async_context(aclosing(await (await stream_of(site, alice)).open()))
        await stack.aclose()
        assert not site.app.event_streams


class StreamClient:
    """A client that requests the stream of events, sends `body` with its request, and disconnects when `leaves` is set.
    `received`: the messages that it has received. `refuses`: the server cannot send further messages, although it has
    not noticed that the client has disconnected."""

    def __init__(self, site: AppInProcess, login: str, body: Sequence[bytes] = ()) -> None:
        self.leaves = asyncio.Event()
        self.refuses = False
        self.received: list[Message] = []
        self._app = site.app
        self._scope = scope_of("GET", "/api/v1/events", {"authorization": login, "accept": EVENT_STREAM_TYPE})
        self._parts = [*body, b""]

    async def receive(self) -> Message:
        if self._parts:
            return {"type": "http.request", "body": self._parts.pop(0), "more_body": bool(self._parts)}
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if self.refuses:
            raise ClientDisconnected
        self.received.append(message)

    async def run(self) -> None:
        await self._app(self._scope, self.receive, self.send)


async def test_a_stream_ends_when_its_client_disconnects(tmp_path: Path) -> None:
    """When a client disconnects, its stream ends at once, although there is no event, and leaves its place to another
    one."""
    async with running_app(tmp_path, events={"keep": "1h"}) as site, asyncio.TaskGroup() as tasks:
        client = StreamClient(site, await site.user("alice"))
        request = tasks.create_task(client.run())
        await until(lambda: len(client.received) == 2)  # the headers, and the first message
        assert site.app.event_streams.total() == 1
        client.leaves.set()
        async with asyncio.timeout(KEEP_ALIVE_SECONDS / 2):
            await request
        assert not site.app.event_streams
        assert len(client.received) == 2


async def test_the_disconnect_of_a_client_is_no_failure(tmp_path: Path) -> None:
    """If a part of a stream cannot be sent because the client has disconnected, the application raises the error of the
    server, which knows it. The server would log any other error as a failure, with a traceback."""
    async with running_app(tmp_path, events={"keep": "1h"}) as site:
        client = StreamClient(site, await site.user("alice"))
        client.refuses = True
        with pytest.raises(ClientDisconnected):
            await client.run()
        assert not site.app.event_streams


async def test_a_stream_discards_the_body_of_its_request(tmp_path: Path) -> None:
    """If the client sends a body with its request, the stream discards the body: it counts in no budget. The stream
    ends when the client disconnects."""
    async with running_app(tmp_path, events={"keep": "1h"}) as site, asyncio.TaskGroup() as tasks:
        client = StreamClient(site, await site.user("alice"), [b"x" * (1 << 20)] * 8)
        request = tasks.create_task(client.run())
        await until(lambda: len(client.received) == 2)
        await until(lambda: not client._parts)
        assert (site.app.event_streams.total(), site.app.body_memory.forms.used) == (1, 0)
        client.leaves.set()
        await request
        assert not site.app.event_streams


async def test_an_open_stream_checks_the_credential_again(tmp_path: Path) -> None:
    """A stream authenticates its request again while it is open. After the account was disabled, this fails."""
    async with running_app(tmp_path) as site:
        stream = await stream_of(site, await site.user("alice"))
        assert (await stream.authenticate_again()).principal.name == "alice"
        await site.accounts.set_enabled(AccountName("alice"), False, by=BY)
        with pytest.raises(Unauthorized):
            await stream.authenticate_again()


@pytest.mark.slow
async def test_no_event_is_sent_after_the_right_to_it_has_ended(tmp_path: Path) -> None:
    """The rights of the client are checked after each look-up that has found events. So the next event after a change
    of rights, however soon, is not sent if the client may not pull from its repository any more."""
    shown: dict[str | None, bool] = {}

    def show(event: Event, caller: Caller) -> None:
        shown[event.content.tag] = caller.principal.may(Action.PULL, event.content.repository)

    async def read(stream: EventStream) -> None:
        async for _ in await stream.open():
            pass

    async with running_app(tmp_path) as site, open_registry(tmp_path) as store:
        await store.outbox.configure([EventReader(LIST_READER, frozenset(EventAction), ("**",))])

        async def add_event(tag: str) -> None:
            await store.outbox.add([NewEvent(EventAction.PULL, "team/app", 1.0, BY, tag=tag)])
            await until(lambda: tag in shown)

        login = await site.user("alice")
        await add_grant(site.accounts, "user:alice", "team/app", "pull")
        reading = asyncio.create_task(read(await stream_of(site, login, 0, show)))
        await add_event("before")
        await site.accounts.remove_grant(Grantee.parse("user:alice"), NamePattern("team/app"), by=BY)
        await add_event("after")
        await add_grant(site.accounts, "user:alice", "team/app", "pull")
        await add_event("again")
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    assert shown == {"before": True, "after": False, "again": True}


async def test_a_stream_of_old_events_does_not_block_the_event_loop(tmp_path: Path) -> None:
    """A client requests the events from the first one on, but lacks the rights to see any of them. So the stream reads
    all of them and sends none. It reads them in pages, and other tasks run after each page."""
    async with running_app(tmp_path) as site:
        async with open_registry(tmp_path) as store:
            # The store keeps only events that a reader wants. By default, the list of events wants no pulls.
            await store.outbox.configure([EventReader(LIST_READER, frozenset(EventAction), ("**",))])
            for _ in range(4):
                await store.outbox.add([NewEvent(EventAction.PULL, "secret/app", 1.0, BY)] * MAX_ADDED_EVENTS)
            newest = await store.outbox.newest_number()
        read_events, most_read_at_once = 0, 0
        has_read_all = asyncio.Event()

        def hide(event: Event, caller: Caller) -> None:
            nonlocal read_events
            read_events += 1
            if event.number == newest:
                has_read_all.set()

        async def watch() -> None:
            nonlocal read_events, most_read_at_once
            while not has_read_all.is_set():
                most_read_at_once, read_events = max(most_read_at_once, read_events), 0
                await asyncio.sleep(0)

        async def read(stream: EventStream) -> None:
            async for _ in await stream.open():
                pass

        reading = asyncio.create_task(read(await stream_of(site, await site.user("alice"), 0, hide)))
        async with asyncio.timeout(60):
            await watch()
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        assert 0 < max(most_read_at_once, read_events) <= PAGE_EVENTS


async def test_a_stream_waits_after_each_lookup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that has read all events waits before it reads again, even if the store changes during every look-up."""
    monkeypatch.setattr(event_stream, "POLL_SECONDS", 3600.0)
    lookups = 0
    prepare_data_dir(tmp_path)
    async with open_registry(tmp_path) as store:
        find = store.outbox.after

        async def counted(*arguments: Any, **options: Any) -> EventPage:
            nonlocal lookups
            lookups += 1
            return await find(*arguments, **options)

        monkeypatch.setattr(store.outbox, "after", counted)
        pages = follow(store.outbox, count().__next__, 0, idle_seconds=3600.0)
        waiting = asyncio.ensure_future(anext(pages))
        # These look-ups run in the thread that also reads for the stream, one after the other. So a stream that did not
        # wait would have made several look-ups by the end of the loop.
        for _ in range(20):
            await find(0, 1)
        assert lookups == 1
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
