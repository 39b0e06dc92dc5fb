"""Sends events to one client as a stream (`EventStream`, `EventStreamResponse`), in the format Server-Sent Events of
the HTML standard (9.2).

While the stream is open, it checks the client's rights again in each of these cases:

- There are events to send, and the store has changed since the last check. The stream checks first, so that it sends no
  event that the client may no longer see.
- `RECHECK_SECONDS` have passed since the last check, and there are events to send or the store has changed.
- `KEEP_ALIVE_SECONDS` have passed since the last check, because a credential can expire without a change of the store.

The stream ends:

- if a check finds that the account no longer exists or the credential has expired.
- when the server stops, reloads its settings or replaces this process, because the server first waits until all
  responses are complete.
- when the server notices that the client has disconnected.

A client can then connect again and send the number of the last event that it received.

To limit its memory, the stream reads one page of events at a time, and the next page only when the client has received
most of the last one. The server closes the connection of a client that has stopped reading
(`registry.server.connection.timeouts`).
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Final

from fastapi import Request
from fastapi.responses import StreamingResponse

from registry.admin.caller import Caller, identify_again, require_login
from registry.asgi import ENDS_ON_HALF_CLOSE, STOPPING_STATE, Message, Receive, Scope, Send, client_address
from registry.events.event_feed import POLL_SECONDS, follow
from storage.errors import RegistryError, TooManyRequests
from storage.outbox import Event, EventAction

EVENT_STREAM_TYPE: Final = "text/event-stream"
MAX_STREAMS: Final = 64
"""Largest number of open streams in one process."""
MAX_STREAMS_PER_VISITOR: Final = 4
"""Largest number of open streams of one *visitor* in one process. A visitor is an account or, for clients without a
login, the network of the client's IP address. So a program that forgets to close its streams cannot use up all
streams."""
_RETRY_SECONDS: Final = 30
"""The value of the header `Retry-After` when the server refuses a stream."""
KEEP_ALIVE_SECONDS: Final = 15.0
"""After this time without events, the stream checks the client's rights, and sends a comment so that proxies do not
close the connection."""
RECHECK_SECONDS: Final = 1.0
"""Seconds between two checks of the client's rights while the stream sends events or the store changes."""
RECONNECT_MILLISECONDS: Final = 2000
"""How long a client waits before it connects again. The stream tells the client this time."""

EventToJSON = Callable[[Event, Caller], tuple[str, str] | None]
"""A function that converts an event for a caller. Returns the event's action and the event as JSON text. Returns None
if the caller may not see the event."""


class EventStream:
    """The stream for one request.

    - `after`: the number of the last event that the client has received; None: the stream begins with the next event.
    - `as_json`: converts the events for the client.
    - `caller`: the account or anonymous client that sent the request.
    - `action`, `repository`: the stream has only events with this action, and only events of this repository. None: the
      stream has events with any action, or of any repository."""

    def __init__(
        self,
        request: Request,
        after: int | None,
        as_json: EventToJSON,
        caller: Caller,
        *,
        action: EventAction | None = None,
        repository: str | None = None,
    ) -> None:
        self._request = request
        self._after = after
        self._as_json = as_json
        self._action = action
        self._repository = repository
        principal = caller.principal
        self._visitor = principal.visitor_key_at(client_address(request.scope))
        self._streams: Counter[str] = request.app.event_streams
        self._stopping: asyncio.Event | None = request.scope.get("state", {}).get(STOPPING_STATE)

    async def open(self) -> AsyncGenerator[bytes, None]:
        """Returns the iterator over the stream's bytes. Raises TooManyRequests if `MAX_STREAMS_PER_VISITOR` or
        `MAX_STREAMS` is reached."""
        if self._streams[self._visitor] >= MAX_STREAMS_PER_VISITOR:
            raise TooManyRequests(
                f"you have {MAX_STREAMS_PER_VISITOR} streams of events open; close one of them first",
                retry_after=_RETRY_SECONDS,
            )
        if self._streams.total() >= MAX_STREAMS:
            raise TooManyRequests("there are too many streams of events", retry_after=_RETRY_SECONDS)
        stream = self._counted_parts()
        await anext(stream)
        return stream

    async def _counted_parts(self) -> AsyncGenerator[bytes, None]:
        """Yields an empty part and then the parts of the stream. Counts the stream until the iterator is closed."""
        self._streams[self._visitor] += 1
        try:
            # `open` reads this part to start the generator, because a generator that has not started does not run its
            # `finally` when it is closed.
            yield b""
            with suppress(RegistryError):  # ends the stream, for example if the credential is no longer valid
                async for part in self._parts():
                    yield part
        finally:
            self._streams[self._visitor] -= 1
            if not self._streams[self._visitor]:
                del self._streams[self._visitor]

    async def _parts(self) -> AsyncIterator[bytes]:
        """Yields the parts of the stream. Raises RegistryError, for example if the credential is no longer valid."""
        caller = await self.authenticate_again()
        store = caller.upkeep.store
        # The number of the newest event is read before the first byte is sent. So a client that has received the first
        # byte receives every later event.
        newest = await store.outbox.newest_number()
        after = newest if self._after is None else min(self._after, newest)
        yield b"retry: %d\n\n" % RECONNECT_MILLISECONDS
        # Tells the client that it misses events. Either events after its last one are no longer kept, or a restore from
        # a backup has made the newest number lower than the client's number.
        first_complete = await store.outbox.first_complete_number()
        if after + 1 < first_complete or after < (self._after or 0):
            yield b"event: gap\ndata: %b\n\n" % json.dumps({"oldest": first_complete}).encode()
        checked_version, checked_at = store.metadata.version(), self._now()
        pages = follow(
            store.outbox,
            store.metadata.version,
            after,
            idle_seconds=POLL_SECONDS,  # so that the loop below also runs while there are no events
            action=self._action,
            repository=self._repository,
        )
        sent_at = self._now()
        async with aclosing(pages):
            async for page in pages:
                if self._request.app.is_retiring or (self._stopping is not None and self._stopping.is_set()):
                    return
                now = self._now()
                is_changed = store.metadata.version() != checked_version
                # Without a change of the store, the rights can still end, for example when the credential expires.
                interval = RECHECK_SECONDS if is_changed or page else KEEP_ALIVE_SECONDS
                if (page and is_changed) or now - checked_at >= interval:
                    checked_version, checked_at = store.metadata.version(), now
                    caller = await self.authenticate_again()
                if messages := self._format_messages(page, caller):
                    yield messages
                    sent_at = self._now()
                elif now - sent_at >= KEEP_ALIVE_SECONDS:
                    yield b": still here\n\n"
                    sent_at = now

    def _format_messages(self, page: Sequence[Event], caller: Caller) -> bytes:
        """Returns the messages for the events of the page that the caller may see; empty: it may see none."""
        messages = []
        for event in page:
            if (action_and_data := self._as_json(event, caller)) is not None:
                action, data = action_and_data
                messages.append(f"id: {event.number}\nevent: {action}\ndata: {data}\n\n")
        return "".join(messages).encode()

    async def authenticate_again(self) -> Caller:
        """Authenticates the request again, and returns its caller. Raises the errors that a new request would get."""
        return await require_login(await identify_again(self._request))

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


class EventStreamResponse(StreamingResponse):
    """Sends the bytes of a stream (`EventStream.open`) to its client. Then closes the stream, even after an error."""

    def __init__(self, stream: AsyncGenerator[bytes, None]) -> None:
        headers = {"x-accel-buffering": "no"}  # nginx must not buffer the events
        super().__init__(stream, headers=headers, media_type=EVENT_STREAM_TYPE)
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the response. Returns when the stream has ended, or when the client has disconnected. If `send` fails
        because the client has disconnected, raises the error of `send`, which the server recognizes. The base class
        would replace this error with an error of Starlette."""
        async with aclosing(self._stream):
            start: Message = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            start[ENDS_ON_HALF_CLOSE] = True  # the server ends the response when the client shuts down its sending side
            await send(start)
            async with _until_disconnected(receive):
                async for part in self._stream:
                    await send({"type": "http.response.body", "body": part, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})


@asynccontextmanager
async def _until_disconnected(receive: Receive) -> AsyncIterator[None]:
    """A context manager that cancels its block when the client disconnects. The `with` statement then ends without an
    error. Discards everything that the client sends."""
    loop, cancellation = asyncio.get_running_loop(), asyncio.timeout(None)

    async def wait_disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        cancellation.reschedule(loop.time())  # the timeout expires now, which cancels the block

    try:
        async with cancellation:
            watch = asyncio.create_task(wait_disconnected())
            try:
                yield
            finally:
                watch.cancel()
    except TimeoutError:
        if not cancellation.expired():
            raise
