"""Memory for bodies that are held whole: within budgets over all requests, and received at a minimum rate.

Blobs stream to the disk and do not come through here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from typing import Final, Protocol, TypeVar

from registry.http.asgi import Header, Message, Receive, Send
from registry.http.disconnect import ClientGone, DisconnectWatch
from registry.http.errors import BodyTooSlow
from registry.memory_budget import MIB, MemoryBudget, Share
from storage.errors import RegistryError, TooManyRequests

T = TypeVar("T")

REQUEST_BODY_BYTES: Final = 16 * MIB
"""Bytes of request bodies that a worker holds at the same time."""
FORM_BYTES: Final = 4 * MIB
"""The same for forms and JSON beside the distribution API. Clients can send them without an account, so they must not
take the memory of manifests."""
ANSWER_BYTES: Final = 24 * MIB
"""Bytes of answers that a worker holds until their clients have received them."""
COUNTED_ANSWER_BYTES: Final = 256 * 1024
"""Answers up to this size are not counted: the kernel takes them at once, for nearly every client."""
SLOW_CLIENT_SECONDS: Final = 30.0
"""While a request waits for memory, answers that take longer than this to send are cut off."""
SHARE_STEP_BYTES: Final = 64 * 1024
"""Bytes by which a body's share of the budget grows."""
SMALL_BODY_BYTES: Final = 16 * 1024
"""Bodies up to this size that were received together with the head are not counted."""
BODY_STALL_SECONDS: Final = 20.0
"""Seconds that a body may pause, or fall behind the minimum rate."""
LEAST_BYTES_PER_SECOND: Final = 8 * 1024
"""The minimum rate of a body that takes longer than `BODY_STALL_SECONDS`."""


class BodyExchange(Protocol):
    """What is used of a request here (`registry.http.exchange.Exchange`)."""

    method: str

    @property
    def length(self) -> int | None: ...

    @property
    def is_disconnected(self) -> bool: ...

    def body(self) -> AsyncIterator[bytes | memoryview]: ...

    def take_whole_body(self) -> bytes | None: ...

    async def wait_disconnected(self) -> None: ...

    async def send_whole(self, status: int, body: bytes, *headers: Header) -> None: ...


class BodyMemory:
    """The memory of one worker. `stall_seconds` and `bytes_per_second` are the minimum rate of request bodies."""

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
        self._turn = asyncio.Semaphore(1)

    @staticmethod
    def small_body(exchange: BodyExchange) -> bytes | None:
        """Returns the request's whole body if it is small and was received already, as most manifests are; otherwise
        takes nothing and returns None. Such a body needs no timer, and no share of the budget: the connection has
        buffered as much anyway."""
        length = exchange.length
        return exchange.take_whole_body() if length and length <= SMALL_BODY_BYTES else None

    @asynccontextmanager
    async def body(
        self, exchange: BodyExchange, most: int, too_large: Callable[[], RegistryError]
    ) -> AsyncIterator[bytes]:
        """Yields the request's whole body; its memory counts until the block ends. Raises the error of `too_large` for
        more than `most` bytes, BodyTooSlow, TooManyRequests (no memory left), ClientGone."""
        share = self.bodies.share()
        try:
            yield await self._read(exchange, share, most, too_large)
        finally:
            share.close()

    async def _read(
        self, exchange: BodyExchange, share: Share, most: int, too_large: Callable[[], RegistryError]
    ) -> bytes:
        if exchange.length:
            if exchange.length > most:
                raise too_large()
            await share.grow(exchange.length)
        body = bytearray()
        rate = _MinimumRate(self, share)
        try:
            async with rate:
                async for data in exchange.body():
                    if len(body) + len(data) > most:
                        raise too_large()
                    await rate.count(len(data))
                    body += data
            return bytes(body)
        finally:
            body.clear()  # an error's traceback would keep it until the answer is sent

    @asynccontextmanager
    async def metered(self, receive: Receive, send: Send) -> AsyncIterator[tuple[Receive, Send]]:
        """Yields `receive` and `send` for an application that holds its request's body, with the same limits for it,
        until it answers or the block ends. The yielded callables raise the errors."""
        share = self.forms.share()
        rate, ended = _MinimumRate(self, share), False

        async def metered_receive() -> Message:
            nonlocal ended
            if ended:  # the application only waits for the client to disconnect
                return await receive()
            async with rate:
                message = await receive()
                await rate.count(len(message.get("body", b"")))
            ended = not message.get("more_body", False)
            return message

        async def metered_send(message: Message) -> None:
            share.close()
            await send(message)

        try:
            yield metered_receive, metered_send
        finally:
            share.close()

    async def in_turn(self, exchange: BodyExchange, call: Callable[[], Awaitable[T]]) -> T:
        """Returns the result of `call`, which runs for one request of the worker at a time: it takes much memory and
        holds the interpreter. It must not wait for a network. Raises ClientGone without a call: the client disconnected
        while it waited for its turn."""
        with closing(DisconnectWatch(exchange.wait_disconnected)) as watch:
            await watch.cancel_on_disconnect(self._turn.acquire())
        try:
            if exchange.is_disconnected:
                raise ClientGone
            return await call()
        finally:
            self._turn.release()

    @property
    def is_short(self) -> bool:
        """Whether answers wait for memory, or soon will."""
        return self.answers.used > self.answers.size // 2

    def try_reserve(self, size: int, key: str | None = None) -> Share | None:
        """Returns a share for `reserve`, if there is memory for it at once."""
        share = self.answers.share(key)
        return share if share.try_grow(size) else None

    @asynccontextmanager
    async def reserve(self, size: int, key: str | None = None, share: Share | None = None) -> AsyncIterator[None]:
        """Counts `size` bytes of an answer inside the block. `key`: the same for answers that hold the same bytes.
        `share`: the result of `try_reserve`. Raises TooManyRequests; out of the block as well, where the client
        receives the answer too slowly while other requests wait."""
        if share is None:
            share = self.answers.share(key)
        cut = asyncio.timeout(None)
        loop = asyncio.get_running_loop()
        try:
            if not share.size:
                await share.grow(size)
            async with cut:
                share.on_cut = lambda: cut.reschedule(loop.time())
                try:
                    yield
                finally:
                    share.on_cut = None
        except TimeoutError:
            if not cut.expired():
                raise
            raise TooManyRequests("the client takes the answer too slowly, and others wait for memory") from None
        finally:
            share.close()

    async def send_answer(
        self, exchange: BodyExchange, make: Callable[[], Awaitable[tuple[bytes, list[Header]]]]
    ) -> None:
        """Sends the body and headers that `make` returns. A large answer waits for memory; it is not held meanwhile
        but made again. Raises TooManyRequests."""
        body, headers = await make()
        if len(body) <= COUNTED_ANSWER_BYTES or exchange.method == "HEAD":
            await exchange.send_whole(200, body, *headers)
            return
        length = len(body)
        share = self.try_reserve(length)
        if share is None:
            body = b""
        async with self.reserve(length, share=share):
            if share is None:
                body, headers = await make()
            await exchange.send_whole(200, body, *headers)


class _MinimumRate:
    """A context manager around reading a body: counts its memory and enforces the minimum rate. Each byte earns time,
    up to the stall limit, so a body that was fast at first may not pause for longer than any other."""

    def __init__(self, memory: BodyMemory, share: Share) -> None:
        self._memory = memory
        self._share = share
        self._received = 0
        self._seconds_left = memory.stall_seconds
        self._entered = 0.0
        self._timeout: asyncio.Timeout | None = None

    async def __aenter__(self) -> None:
        self._entered = asyncio.get_running_loop().time()
        self._timeout = asyncio.timeout_at(self._entered + self._seconds_left)
        await self._timeout.__aenter__()
        self._share.on_cut = self._cut

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        assert self._timeout is not None
        self._share.on_cut = None
        self._seconds_left -= asyncio.get_running_loop().time() - self._entered
        try:
            await self._timeout.__aexit__(kind, error, trace)  # type: ignore[arg-type]
        except TimeoutError:
            raise BodyTooSlow(
                f"the body comes too slowly: after {self._memory.stall_seconds:g} s at least "
                f"{self._memory.bytes_per_second:g} bytes a second are expected, and more while other requests wait "
                "for memory"
            ) from None

    async def count(self, received: int) -> None:
        """Counts bytes that were received. Raises TooManyRequests."""
        self._received += received
        wanted = self._received - self._share.size
        if wanted > 0:
            step = wanted if self._received <= SHARE_STEP_BYTES else -(-wanted // SHARE_STEP_BYTES) * SHARE_STEP_BYTES
            if not self._share.try_grow(step):
                await self._wait_for_memory(step)
        now = asyncio.get_running_loop().time()
        earned = received / self._memory.bytes_per_second
        self._seconds_left = min(self._seconds_left - (now - self._entered) + earned, self._memory.stall_seconds)
        self._entered = now
        if self._timeout is not None:
            self._timeout.reschedule(now + self._seconds_left)

    async def _wait_for_memory(self, step: int) -> None:
        """Waits for the share to grow. The client cannot speed that up, so the time does not count against it."""
        assert self._timeout is not None
        loop = asyncio.get_running_loop()
        began = loop.time()
        on_cut, self._share.on_cut = self._share.on_cut, None
        self._timeout.reschedule(None)
        try:
            await self._share.grow(step)
        finally:
            self._share.on_cut = on_cut
            self._entered += loop.time() - began
            self._timeout.reschedule(self._entered + self._seconds_left)

    def _cut(self) -> None:
        if self._timeout is not None:
            self._timeout.reschedule(asyncio.get_running_loop().time())
