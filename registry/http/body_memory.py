"""`BodyMemory` limits the memory for those request bodies and responses that are in memory as a whole. It also refuses
request bodies that the client sends too slowly.

The limits are budgets for all requests of a worker together (`registry.memory_budget`). The *share* of a request is the
part of a budget that the request uses. If a budget has too little free memory for a request, the request waits. If the
budget still has too little free memory after a few seconds, the request is refused. Blobs are never in memory as a
whole, so the limits do not apply to blobs.
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
"""Size of a worker's budget for the bodies of requests outside `/v2`, which are forms and JSON. The budget is separate,
so that clients without an account cannot use up the memory for manifests. One client gets at most a quarter of the
budget."""
RESPONSES_BUDGET_BYTES: Final = 24 * MIB
"""Size of a worker's budget for the bodies of large responses, which stay in memory until the client has received
them."""
MAX_UNCOUNTED_RESPONSE_BYTES: Final = 256 * 1024
"""Responses up to this size do not count against the budget: the kernel's socket buffer nearly always takes them
immediately."""
SLOW_CLIENT_SECONDS: Final = 30.0
"""While another request waits for memory, a response that takes longer than this to send is cut off: it ends early."""
SHARE_STEP_BYTES: Final = 64 * 1024
"""The share of a body of unknown length grows while the body is received: at first by the received bytes, and in steps
of this size once the body is larger than one step."""
SMALL_BODY_BYTES: Final = 16 * 1024
"""A manifest up to this size does not count against a budget if it has arrived completely before the handler asks for
it. A form or JSON up to this size does not count if it arrives in one piece."""
MIN_PIECE_BYTES: Final = 4 * 1024
"""Pieces of a form or of JSON are joined until they have at least this many bytes together. The application keeps each
piece as an object, and the budget does not count the memory that an object needs besides its bytes."""
BODY_STALL_SECONDS: Final = 20.0
"""The *time allowance* of a body at its beginning, and the largest allowance, in seconds. The allowance decreases while
the server receives the body. `MIN_BYTES_PER_SECOND` received bytes add one second to the allowance. When the allowance
is used up, the body is refused."""
MIN_BYTES_PER_SECOND: Final = 8 * 1024
"""Minimum rate at which a client has to send a body."""


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
        """Returns the request's whole body if it was received already. The caller must not call `body` afterwards.
        Returns None if a part of the body was not received yet."""
        ...

    async def wait_disconnected(self) -> None:
        """Waits until the client has disconnected."""
        ...

    async def send_whole(self, status: int, body: bytes, *headers: Header) -> None:
        """Sends a whole response."""
        ...


class BodyMemory:
    """The memory budgets of one worker, and the minimum rate of request bodies.

    - `manifests`: the budget for manifests that clients push; None: a new budget of the default size.
    - `forms`: the budget for the bodies of requests outside `/v2`; None: a new budget of the default size.
    - `responses`: the budget for large responses; None: a new budget of the default size.
    - `bytes_per_second`: the minimum rate of a request body.
    - `stall_seconds`: the time allowance of a body (`BODY_STALL_SECONDS`)."""

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
        """Returns the request's whole body if it has at most `SMALL_BODY_BYTES` and was received already. The returned
        body does not count against a budget, because the connection has a buffer of that size anyway. Returns None for
        any other body; the caller then calls `receive_body`."""
        length = exchange.length
        return exchange.take_whole_body() if length and length <= SMALL_BODY_BYTES else None

    @asynccontextmanager
    async def receive_body(
        self, exchange: BodyExchange, max_bytes: int, too_large: Callable[[], RegistryError]
    ) -> AsyncIterator[bytes]:
        """A context manager that receives the request's whole body and yields it. The body counts against the budget
        `manifests` until the block ends.

        - Raises the error that `too_large` returns if the body is larger than `max_bytes`.
        - Raises TooManyRequests if the budget does not get enough free memory in time.
        - Raises BodyTooSlow if the time allowance of the body is used up, or if the request is cut off because it
          takes too long while another request waits for memory.
        - Raises ClientGone if the client disconnects."""
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
            body.close()  # frees the bytes even if the traceback of an error keeps a reference to this frame

    @asynccontextmanager
    async def limit_body(self, receive: Receive, send: Send, client: str | None) -> AsyncIterator[tuple[Receive, Send]]:
        """A context manager that limits the request body of an application which reads the whole body into memory.
        Yields two ASGI callables for the application, which wrap `receive` and `send`.

        - The body counts against the budget `forms` until the application starts its response, or until the block ends.
        - The last piece of the body does not count if it has at most `SMALL_BODY_BYTES`.
        - The minimum rate applies to the body until the application starts its response.
        - The yielded `receive` joins small pieces of the body.
        - The yielded `receive` raises BodyTooSlow if the time allowance of the body is used up, or if the request is
          cut off because it takes too long while another request waits for memory.
        - The yielded `receive` raises TooManyRequests if the budget does not get enough free memory in time, or if all
          bodies of `client` together would use more than a quarter of the budget.

        `client`: the network of the client's address (`registry.client_addresses.network_of`); None: unknown."""
        share = self.forms.new_share(client=client)
        rate, is_body_complete, is_response_started = _MinimumRate(self, share), False, False

        async def metered_receive() -> Message:
            nonlocal is_body_complete
            if is_body_complete or is_response_started:  # the application only waits for the client to disconnect
                return await receive()
            joined = bytearray()
            while True:
                async with rate:
                    message = await receive()
                    body = message.get("body", b"")
                    is_body_complete = not message.get("more_body", False)
                    # A small last piece does not count: the application no longer waits for the client, so the client
                    # cannot make the server keep the piece for long.
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
        """Runs `call`, which needs much memory and processor time, and returns its result. First waits until all
        earlier calls of this method have finished. `call` must not wait for a network. If the client of `exchange`
        disconnects before `call` starts, raises ClientGone and does not run `call`."""
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
        """Whether more than half of the budget for responses is in use. A large response may then have to wait."""
        return self.responses.used > self.responses.size // 2

    def response_share(self, key: str | None = None) -> Share:
        """Returns a new share of the budget for responses. Its size is 0 until the caller or `hold_response` grows it.
        `key`: responses with the same key hold the same bytes in memory, and the budget counts these bytes only once.
        None: no other response holds the same bytes."""
        return self.responses.new_share(key)

    @asynccontextmanager
    async def hold_response(self, share: Share, size: int) -> AsyncIterator[None]:
        """A context manager that counts a response of `size` bytes against the budget `responses` until the block ends.

        `share`: a share that `response_share` returned. A share of size 0 first grows to `size`, and waits for free
        memory if necessary. Always closes `share` at the end. Raises TooManyRequests in two cases:

        - The budget does not get enough free memory in time.
        - The client receives the response too slowly while other requests wait for memory. The block is cancelled."""
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

        If a large response has to wait for memory, releases its body, and calls `make_response` again after the wait.
        Raises TooManyRequests in the cases of `hold_response`."""
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
    """A context manager for a block that receives a body or a piece of a body. It enforces the minimum rate, and grows
    the request's share of the budget with the body.

    The client has a time allowance, at first `stall_seconds`. The allowance shrinks while a block runs, and grows with
    each received byte, but never to more than `stall_seconds`. When the allowance is used up, the context manager
    cancels its block and raises BodyTooSlow. The context manager may be entered again for the next piece of the same
    body."""

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
        """Counts `received` more bytes of the body. Grows the share if it is smaller than the received part of the
        body, and adds to the time allowance. Waits if the budget has too little free memory. Raises TooManyRequests if
        the budget does not get enough free memory in time."""
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
        """Waits until the share has grown by `added_bytes`. During the wait, the time allowance stays unchanged, and
        the request cannot be cut off. Raises TooManyRequests if the budget does not get enough free memory in time."""
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
        """Cuts off the request, because other requests need its memory: the block ends now with BodyTooSlow. Does
        nothing if the block is already ending because the time allowance is used up."""
        if self._timeout is not None and not self._timeout.expired():
            self._timeout.reschedule(asyncio.get_running_loop().time())
