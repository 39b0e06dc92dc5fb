"""`BodyMemory` limits the memory for those request bodies and responses that are in memory as a whole. It also refuses
request bodies that the client sends too slowly.

The limits are budgets for all requests of a worker together (`registry.memory_budget`). The *share* of a request is the
part of a budget that the request uses. If too little of a budget is free for a request, the request waits. If too
little becomes free within a few seconds, the request is refused. Blobs are never in memory as a whole, so the limits do
not apply to them.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from typing import Final, Protocol, TypeVar

from registry.asgi import Header, Message, Receive, Send
from registry.http.disconnect import ClientGone, DisconnectWatch
from registry.http.error_statuses import BodyTooSlow
from registry.memory_budget import MIB, MemoryBudget, Share
from storage.errors import RegistryError, TooManyRequests

T = TypeVar("T")

MANIFESTS_BUDGET_BYTES: Final = 16 * MIB
"""Size of a worker's budget for the manifests that clients push."""
FORMS_BUDGET_BYTES: Final = 4 * MIB
"""Size of a worker's budget for the bodies of requests outside `/v2`, which are forms and JSON. The budget is separate
because clients without an account can send such requests, and must not use up the memory for manifests. One client gets
at most a quarter of the budget."""
RESPONSES_BUDGET_BYTES: Final = 24 * MIB
"""Size of a worker's budget for the bodies of large responses, which stay in memory until the client has received
them."""
MAX_UNCOUNTED_RESPONSE_BYTES: Final = 256 * 1024
"""Responses up to this size do not count against the budget, because the kernel's socket buffer nearly always takes
the whole response immediately."""
SLOW_CLIENT_SECONDS: Final = 30.0
"""While a request waits for memory, responses that take longer than this to send are cut off (they end early)."""
SHARE_STEP_BYTES: Final = 64 * 1024
"""If the length of a body is unknown, its share grows while the body is received. Once the body is larger than this,
the share grows in steps of this size."""
SMALL_BODY_BYTES: Final = 16 * 1024
"""A body up to this size does not count against a budget in two cases:

- It is a manifest, and all of it has arrived before the handler asks for it.
- It is a form or JSON, and arrives in one piece."""
MIN_PIECE_BYTES: Final = 4 * 1024
"""Smaller pieces of a form or of JSON are joined until they have at least this many bytes together. The application
keeps each piece as a separate object, and the budget does not count the overhead of the objects, about 50 bytes
each."""
BODY_STALL_SECONDS: Final = 20.0
"""The client's time allowance for a body, in seconds (see `_MinimumRate`). A body is refused if it falls behind the
minimum rate by more than this time. So a client that has kept up with the minimum rate may pause for this long."""
MIN_BYTES_PER_SECOND: Final = 8 * 1024
"""Minimum rate at which a client has to send a body that takes longer than `BODY_STALL_SECONDS`."""


class BodyExchange(Protocol):
    """A request and its response: the part of `registry.http.exchange.Exchange` that this module uses."""

    method: str

    @property
    def length(self) -> int | None:
        """The length of the request's body in bytes; None: unknown."""
        ...

    @property
    def is_disconnected(self) -> bool:
        """Whether the client is known to have disconnected."""
        ...

    def body(self) -> AsyncIterator[bytes | memoryview]:
        """Yields the request's body in pieces. Raises ClientGone if the client disconnects before the end of the
        body."""
        ...

    def take_whole_body(self) -> bytes | None:
        """Returns the request's body if all of it was received already; then `body` must not be called. Returns None if
        more has to be received."""
        ...

    async def wait_disconnected(self) -> None:
        """Waits until the client has disconnected."""
        ...

    async def send_whole(self, status: int, body: bytes, *headers: Header) -> None:
        """Sends a whole response."""
        ...


class BodyMemory:
    """The memory budgets of one worker, and the minimum rate of request bodies.

    `manifests`: the budget for manifests that clients push. `forms`: the budget for the bodies of requests outside
    `/v2`. `responses`: the budget for large responses. None, for each of the three: a new budget of the default size.
    A request is refused if its body is more than `stall_seconds` behind the rate `bytes_per_second`."""

    def __init__(
        self,
        *,
        manifests: MemoryBudget | None = None,
        forms: MemoryBudget | None = None,
        responses: MemoryBudget | None = None,
        stall_seconds: float = BODY_STALL_SECONDS,
        bytes_per_second: float = MIN_BYTES_PER_SECOND,
    ) -> None:
        self.manifests = manifests or MemoryBudget(MANIFESTS_BUDGET_BYTES, "request bodies")
        self.forms = forms or MemoryBudget(FORMS_BUDGET_BYTES, "forms")
        self.responses = responses or MemoryBudget(RESPONSES_BUDGET_BYTES, "answers", slow_seconds=SLOW_CLIENT_SECONDS)
        self.stall_seconds = stall_seconds
        self.bytes_per_second = bytes_per_second
        self._call_slot = asyncio.Semaphore(1)  # held while `run_one_at_a_time` runs a call

    @staticmethod
    def take_small_body(exchange: BodyExchange) -> bytes | None:
        """Returns the request's whole body if it is small and was received already, as most manifests are. Returns None
        for any other body, which the caller then receives with `receive_body`. The returned body does not count against
        a budget, because the connection has a buffer of that size anyway."""
        length = exchange.length
        return exchange.take_whole_body() if length and length <= SMALL_BODY_BYTES else None

    @asynccontextmanager
    async def receive_body(
        self, exchange: BodyExchange, max_bytes: int, too_large: Callable[[], RegistryError]
    ) -> AsyncIterator[bytes]:
        """A context manager that receives the request's whole body and yields it. The body counts against the budget
        `manifests` until the block ends.

        Raises the error that `too_large` returns if the body is larger than `max_bytes`. Raises TooManyRequests if no
        memory becomes free in time. Raises BodyTooSlow and ClientGone."""
        share = self.manifests.new_share()
        try:
            yield await self._receive(exchange, share, max_bytes, too_large)
        finally:
            share.close()

    async def _receive(
        self, exchange: BodyExchange, share: Share, max_bytes: int, too_large: Callable[[], RegistryError]
    ) -> bytes:
        if exchange.length:
            if exchange.length > max_bytes:
                raise too_large()
            await share.grow(exchange.length)
        body = io.BytesIO()  # its `getvalue` does not copy; a copy of 8 MiB would occupy the event loop for 5 to 40 ms
        rate = _MinimumRate(self, share)
        try:
            async with rate:
                async for data in exchange.body():
                    if body.tell() + len(data) > max_bytes:
                        raise too_large()
                    await rate.count(len(data))
                    body.write(data)
            return body.getvalue()
        finally:
            body.close()  # an error's traceback refers to this frame, which would keep the bytes in memory

    @asynccontextmanager
    async def limit_body(self, receive: Receive, send: Send, client: str | None) -> AsyncIterator[tuple[Receive, Send]]:
        """A context manager for a call of an application that reads the whole body into memory. Yields two ASGI
        callables for the application, which wrap `receive` and `send`. They apply the budget `forms` and the minimum
        rate to the request's body.

        The body counts against the budget until the application starts its response, or until the block ends. The last
        piece of a body does not count if it has at most `SMALL_BODY_BYTES`. So a small body that arrives in one piece,
        such as a login form, does not count at all. After the start of the response, neither the budget nor the minimum
        rate applies: an application that still calls `receive` only waits for the client to disconnect.

        The yielded `receive` joins small pieces of the body. It raises BodyTooSlow. It raises TooManyRequests if no
        memory becomes free in time, or if all bodies of `client` together would use more than a quarter of the budget.

        `client`: the network of the client's address (`registry.client_addresses.network_of`); None: unknown."""
        share = self.forms.new_share(client=client)
        rate, is_body_complete, is_response_started = _MinimumRate(self, share), False, False

        async def metered_receive() -> Message:
            nonlocal is_body_complete
            if is_body_complete or is_response_started:  # the application now waits for the client to disconnect
                return await receive()
            joined = bytearray()
            while True:
                async with rate:
                    message = await receive()
                    body = message.get("body", b"")
                    is_body_complete = not message.get("more_body", False)
                    # A small last piece does not count: the application has the whole body and does not wait for more,
                    # so the client cannot make the server keep the piece for long.
                    if not is_body_complete or len(body) > SMALL_BODY_BYTES:
                        await rate.count(len(body))
                if message["type"] != "http.request":
                    return message
                joined += body
                if is_body_complete or len(joined) >= MIN_PIECE_BYTES:
                    return {"type": "http.request", "body": bytes(joined), "more_body": not is_body_complete}

        async def metered_send(message: Message) -> None:
            nonlocal is_response_started
            is_response_started = True
            share.close()
            await send(message)

        try:
            yield metered_receive, metered_send
        finally:
            share.close()

    async def run_one_at_a_time(self, exchange: BodyExchange, call: Callable[[], Awaitable[T]]) -> T:
        """Waits until all earlier calls of this method have finished, then runs `call` and returns its result.

        This is for work that needs much memory and much processor time. `call` must not wait for a network. Raises
        ClientGone if the client of `exchange` disconnects during the wait, and then does not run `call`."""
        with closing(DisconnectWatch(exchange.wait_disconnected)) as watch:
            await watch.cancel_on_disconnect(self._call_slot.acquire())
        try:
            if exchange.is_disconnected:
                raise ClientGone
            return await call()
        finally:
            self._call_slot.release()

    @property
    def is_response_budget_over_half_used(self) -> bool:
        """Whether more than half of the budget for responses is in use, so that a large response may have to wait."""
        return self.responses.used > self.responses.size // 2

    def response_share(self, key: str | None = None) -> Share:
        """Returns a new share of the budget for responses. The share has size 0 until the caller or `hold_response`
        grows it. `key`: responses with the same key hold the same bytes in memory, so the budget counts these bytes
        only once; None: no other response holds the bytes of this one."""
        return self.responses.new_share(key)

    @asynccontextmanager
    async def hold_response(self, share: Share, size: int) -> AsyncIterator[None]:
        """A context manager that counts a response of `size` bytes against the budget `responses` until the block ends.

        `share`: a share that `response_share` returned. If its size is still 0, this first waits until the share has
        grown to `size`. Raises TooManyRequests if no memory becomes free in time. Cancels the block and raises
        TooManyRequests if the client receives the response too slowly while other requests wait for memory. Closes
        `share` in any case."""
        cut_off = asyncio.timeout(None)  # expires when the response has to be cut off
        loop = asyncio.get_running_loop()
        try:
            if not share.size:
                await share.grow(size)
            async with cut_off:
                # The budget calls `on_cut` when other requests need the memory.
                share.on_cut = lambda: cut_off.reschedule(loop.time())
                try:
                    yield
                finally:
                    share.on_cut = None
        except TimeoutError:
            if not cut_off.expired():
                raise
            raise TooManyRequests(
                "the client receives the response too slowly while other requests wait for memory"
            ) from None
        finally:
            share.close()

    async def send_response(
        self, exchange: BodyExchange, make_response: Callable[[], Awaitable[tuple[bytes, list[Header]]]]
    ) -> None:
        """Sends a response with status 200 and with the body and headers that `make_response` returns.

        If a large response has to wait for memory, its body is released, and `make_response` is called again after the
        wait. Raises TooManyRequests if no memory becomes free in time."""
        body, headers = await make_response()
        if len(body) <= MAX_UNCOUNTED_RESPONSE_BYTES or exchange.method == "HEAD":
            await exchange.send_whole(200, body, *headers)
            return
        share, size = self.response_share(), len(body)
        has_memory = share.try_grow(size)
        if not has_memory:
            body = b""
        async with self.hold_response(share, size):
            if not has_memory:
                body, headers = await make_response()
            await exchange.send_whole(200, body, *headers)


class _MinimumRate:
    """A context manager for a block that receives a body. It enforces the minimum rate, and makes the request's share
    of the budget grow with the body.

    The client has a time allowance for the body, at first `stall_seconds`. Time that passes uses up the allowance, and
    each received byte adds to it. The allowance never becomes larger than `stall_seconds`, so even a client that was
    fast at first cannot pause for longer. When the allowance is used up, the context manager cancels its block and
    raises BodyTooSlow. The context manager may be entered again for the next piece of the body."""

    def __init__(self, memory: BodyMemory, share: Share) -> None:
        self._memory = memory
        self._share = share
        self._received = 0  # bytes
        self._seconds_left = memory.stall_seconds  # the allowance at `_counted_at`
        self._counted_at = 0.0  # the event loop's time when `_seconds_left` was updated last
        self._timeout: asyncio.Timeout | None = None

    async def __aenter__(self) -> None:
        self._counted_at = asyncio.get_running_loop().time()
        self._timeout = asyncio.timeout_at(self._counted_at + self._seconds_left)
        await self._timeout.__aenter__()
        self._share.on_cut = self._cut

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        assert self._timeout is not None
        self._share.on_cut = None
        self._seconds_left -= asyncio.get_running_loop().time() - self._counted_at
        try:
            await self._timeout.__aexit__(kind, error, trace)  # type: ignore[arg-type]
        except TimeoutError:
            raise BodyTooSlow(
                f"the body comes too slowly: after {self._memory.stall_seconds:g} s at least "
                f"{self._memory.bytes_per_second:g} bytes a second are expected; while other requests wait for memory, "
                "the client has less time"
            ) from None

    async def count(self, received: int) -> None:
        """Counts `received` more bytes of the body: makes the share grow if it is smaller than the body so far, and
        adds to the time allowance. Waits for memory if too little of the budget is free. Raises TooManyRequests if no
        memory becomes free in time."""
        self._received += received
        missing = self._received - self._share.size
        if missing > 0:
            added_bytes = missing
            if self._received > SHARE_STEP_BYTES:  # rounds up to whole steps
                added_bytes = -(-missing // SHARE_STEP_BYTES) * SHARE_STEP_BYTES
            if not self._share.try_grow(added_bytes):
                await self._wait_for_memory(added_bytes)
        now = asyncio.get_running_loop().time()
        gained = received / self._memory.bytes_per_second
        self._seconds_left = min(self._seconds_left - (now - self._counted_at) + gained, self._memory.stall_seconds)
        self._counted_at = now
        if self._timeout is not None:
            self._timeout.reschedule(now + self._seconds_left)

    async def _wait_for_memory(self, added_bytes: int) -> None:
        """Waits until the share has grown by `added_bytes`. During the wait, no time allowance is used up, and the
        request cannot be cut off. Raises TooManyRequests if no memory becomes free in time."""
        assert self._timeout is not None
        loop = asyncio.get_running_loop()
        wait_start = loop.time()
        on_cut, self._share.on_cut = self._share.on_cut, None
        self._timeout.reschedule(None)
        try:
            await self._share.grow(added_bytes)
        finally:
            self._share.on_cut = on_cut
            self._counted_at += loop.time() - wait_start
            self._timeout.reschedule(self._counted_at + self._seconds_left)

    def _cut(self) -> None:
        """Makes the block that receives the body raise BodyTooSlow now, because other requests need the memory. Does
        nothing if the time allowance has just been used up: the block is about to end."""
        if self._timeout is not None and not self._timeout.expired():
            self._timeout.reschedule(asyncio.get_running_loop().time())
