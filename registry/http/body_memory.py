"""Limits the memory of request bodies and responses that are held whole, and receives bodies at a minimum rate.

The limits are budgets for all requests of a worker together (`registry.memory_budget`). The *share* of a request is the
part of a budget that its body uses. A request waits for memory, and is refused after a while. Blobs are not held whole,
so these limits do not concern them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from typing import Final, Protocol, TypeVar

from registry.asgi import Header, Message, Receive, Send
from registry.http.disconnect import ClientGone, DisconnectWatch
from registry.http.error_statuses import BodyTooSlow
from registry.memory_budget import MIB, MemoryBudget, Share
from storage.errors import RegistryError, TooManyRequests

T = TypeVar("T")

REQUEST_BODY_BYTES: Final = 16 * MIB
"""Budget of a worker for bodies of requests to the distribution API, which are manifests."""
FORM_BYTES: Final = 4 * MIB
"""Budget of a worker for bodies of all other requests, which are forms and JSON. It is separate because clients without
an account can send them, and these must not use up the memory for manifests."""
ANSWER_BYTES: Final = 24 * MIB
"""Budget of a worker for bodies of large responses, until their clients have received them."""
COUNTED_ANSWER_BYTES: Final = 256 * 1024
"""Responses up to this size do not count: nearly always the kernel's socket buffer takes all of one at once."""
SLOW_CLIENT_SECONDS: Final = 30.0
"""While a request waits for memory, responses that take longer than this to send are cut off."""
SHARE_STEP_BYTES: Final = 64 * 1024
"""Step in which the budgeted memory of a body grows while the body is received."""
SMALL_BODY_BYTES: Final = 16 * 1024
"""Bodies up to this size do not count if they were received together with the request's head."""
BODY_STALL_SECONDS: Final = 20.0
"""Seconds that a body may pause, or fall behind the minimum rate."""
LEAST_BYTES_PER_SECOND: Final = 8 * 1024
"""Minimum rate of a body that takes longer than `BODY_STALL_SECONDS`."""


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
        """Yields the request's body in pieces. Raises ClientGone."""
        ...

    def take_whole_body(self) -> bytes | None:
        """Returns the request's body if all of it was received already; otherwise takes nothing and returns None."""
        ...

    async def wait_disconnected(self) -> None:
        """Waits until the client has disconnected."""
        ...

    async def send_whole(self, status: int, body: bytes, *headers: Header) -> None:
        """Sends a whole response."""
        ...


class BodyMemory:
    """The memory budgets of one worker, and the minimum rate of request bodies.

    `bodies`, `forms` and `answers`: the budgets for manifests that are pushed, for other request bodies, and for large
    responses; None: one of the default size. A body is refused if it is more than `stall_seconds` behind
    `bytes_per_second`."""

    def __init__(
        self,
        *,
        bodies: MemoryBudget | None = None,
        forms: MemoryBudget | None = None,
        answers: MemoryBudget | None = None,
        stall_seconds: float = BODY_STALL_SECONDS,
        bytes_per_second: float = LEAST_BYTES_PER_SECOND,
    ) -> None:
        self.bodies = bodies or MemoryBudget(REQUEST_BODY_BYTES, "request bodies")
        self.forms = forms or MemoryBudget(FORM_BYTES, "forms")
        self.answers = answers or MemoryBudget(ANSWER_BYTES, "answers", slow_seconds=SLOW_CLIENT_SECONDS)
        self.stall_seconds = stall_seconds
        self.bytes_per_second = bytes_per_second
        self._heavy_call = asyncio.Semaphore(1)  # held while `run_one_at_a_time` runs a call

    @staticmethod
    def take_small_body(exchange: BodyExchange) -> bytes | None:
        """Returns the request's whole body if it is small and was received already, as most manifests are; otherwise
        takes nothing and returns None. Such a body needs no timer and does not count against the budget, because the
        connection has a buffer of that size anyway."""
        length = exchange.length
        return exchange.take_whole_body() if length and length <= SMALL_BODY_BYTES else None

    @asynccontextmanager
    async def receive_body(
        self, exchange: BodyExchange, max_bytes: int, too_large: Callable[[], RegistryError]
    ) -> AsyncIterator[bytes]:
        """A context manager that receives the request's whole body and yields it. The body's memory counts until the
        block ends. Raises the error that `too_large` returns for more than `max_bytes`; BodyTooSlow; TooManyRequests if
        no memory becomes free in time; ClientGone."""
        share = self.bodies.share()
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
        body = bytearray()
        rate = _MinimumRate(self, share)
        try:
            async with rate:
                async for data in exchange.body():
                    if len(body) + len(data) > max_bytes:
                        raise too_large()
                    await rate.count(len(data))
                    body += data
            return bytes(body)
        finally:
            body.clear()  # the traceback of an error refers to this frame, and would keep the bytes in memory

    @asynccontextmanager
    async def metered(self, receive: Receive, send: Send) -> AsyncIterator[tuple[Receive, Send]]:
        """A context manager that yields ASGI callables for an application which holds the request's whole body.

        They call `receive` and `send`, and apply the budget `forms` and the minimum rate to the body. Its memory counts
        until the application sends its response, or until the block ends. The yielded `receive` raises BodyTooSlow and
        TooManyRequests."""
        share = self.forms.share()
        rate, is_body_complete = _MinimumRate(self, share), False

        async def metered_receive() -> Message:
            nonlocal is_body_complete
            if is_body_complete:  # the application now waits for the client to disconnect
                return await receive()
            async with rate:
                message = await receive()
                await rate.count(len(message.get("body", b"")))
            is_body_complete = not message.get("more_body", False)
            return message

        async def metered_send(message: Message) -> None:
            share.close()
            await send(message)

        try:
            yield metered_receive, metered_send
        finally:
            share.close()

    async def run_one_at_a_time(self, exchange: BodyExchange, call: Callable[[], Awaitable[T]]) -> T:
        """Waits until no other such call of the worker runs, then makes `call` and returns its result.

        This is for calls that take much memory and much time of the interpreter. `call` must not wait for a network.
        Raises ClientGone, without making the call, if the client disconnects during the wait."""
        with closing(DisconnectWatch(exchange.wait_disconnected)) as watch:
            await watch.cancel_on_disconnect(self._heavy_call.acquire())
        try:
            if exchange.is_disconnected:
                raise ClientGone
            return await call()
        finally:
            self._heavy_call.release()

    @property
    def is_nearly_full(self) -> bool:
        """Whether more than half of the budget for responses is in use, so that large ones may have to wait."""
        return self.answers.used > self.answers.size // 2

    def try_reserve(self, size: int, key: str | None = None) -> Share | None:
        """Reserves `size` bytes for a response and returns the share of the budget, to be passed to `reserve`. Returns
        None if there is no room now. `key`: as in `reserve`."""
        share = self.answers.share(key)
        return share if share.try_grow(size) else None

    @asynccontextmanager
    async def reserve(self, size: int, key: str | None = None, share: Share | None = None) -> AsyncIterator[None]:
        """A context manager that reserves `size` bytes of the budget for a response until the block ends.

        `key`: responses with the same key hold the same bytes in memory, which count once. `share`: the result of
        `try_reserve` for the same response; None: waits for memory. Raises TooManyRequests if no memory becomes free in
        time. Cancels the block and raises TooManyRequests if the client receives the response too slowly while other
        requests wait for memory."""
        if share is None:
            share = self.answers.share(key)
        cut_off = asyncio.timeout(None)  # expires when the response has to be cut off
        loop = asyncio.get_running_loop()
        try:
            if not share.size:
                await share.grow(size)
            async with cut_off:
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

    async def send_answer(
        self, exchange: BodyExchange, make_answer: Callable[[], Awaitable[tuple[bytes, list[Header]]]]
    ) -> None:
        """Sends a response with status 200 and the body and headers that `make_answer` returns.

        A large response waits for memory. Its body is dropped during the wait, and `make_answer` is called again after
        it. Raises TooManyRequests if no memory becomes free in time."""
        body, headers = await make_answer()
        if len(body) <= COUNTED_ANSWER_BYTES or exchange.method == "HEAD":
            await exchange.send_whole(200, body, *headers)
            return
        length = len(body)
        share = self.try_reserve(length)
        if share is None:
            body = b""
        async with self.reserve(length, share=share):
            if share is None:
                body, headers = await make_answer()
            await exchange.send_whole(200, body, *headers)


class _MinimumRate:
    """A context manager around receiving a body. It counts the body's memory and enforces the minimum rate.

    A body has `stall_seconds` to begin with. Time that passes uses them up, and each received byte adds to them, but
    never beyond `stall_seconds`: a body that was fast at first may not pause for longer than any other. The context
    manager raises BodyTooSlow when no time is left. It may be entered again for the next piece of the body."""

    def __init__(self, memory: BodyMemory, share: Share) -> None:
        self._memory = memory
        self._share = share
        self._received = 0  # bytes
        self._seconds_left = memory.stall_seconds  # as of the loop's time `_counted_at`
        self._counted_at = 0.0
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
                f"{self._memory.bytes_per_second:g} bytes a second are expected, and more while other requests wait "
                "for memory"
            ) from None

    async def count(self, received: int) -> None:
        """Counts `received` bytes against the budget, and adds their time. Waits for memory where needed. Raises
        TooManyRequests if none becomes free in time."""
        self._received += received
        missing = self._received - self._share.size
        if missing > 0:
            step = missing
            if self._received > SHARE_STEP_BYTES:  # rounds up to whole steps
                step = -(-missing // SHARE_STEP_BYTES) * SHARE_STEP_BYTES
            if not self._share.try_grow(step):
                await self._wait_for_memory(step)
        now = asyncio.get_running_loop().time()
        earned = received / self._memory.bytes_per_second
        self._seconds_left = min(self._seconds_left - (now - self._counted_at) + earned, self._memory.stall_seconds)
        self._counted_at = now
        if self._timeout is not None:
            self._timeout.reschedule(now + self._seconds_left)

    async def _wait_for_memory(self, step: int) -> None:
        """Waits until the share has grown by `step` bytes. The wait does not count as slowness of the client. Raises
        TooManyRequests."""
        assert self._timeout is not None
        loop = asyncio.get_running_loop()
        began = loop.time()
        on_cut, self._share.on_cut = self._share.on_cut, None
        self._timeout.reschedule(None)
        try:
            await self._share.grow(step)
        finally:
            self._share.on_cut = on_cut
            self._counted_at += loop.time() - began
            self._timeout.reschedule(self._counted_at + self._seconds_left)

    def _cut(self) -> None:
        """Ends the receiving at once, with BodyTooSlow, because other requests need the memory."""
        if self._timeout is not None:
            self._timeout.reschedule(asyncio.get_running_loop().time())
