"""Bodies that are held in memory: within a budget over all requests, at a least rate, and read one at a time.

Blobs stream to the disk and do not come through here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from typing import Final, TypeVar

from registry.http.errors import BodyTooSlow
from registry.http.exchange import ClientGone, Exchange, Header, Message, Receive, Send
from registry.http.leaving import Leaving
from registry.http.responses import send_whole
from registry.memory import MIB, MemoryBudget, Share
from storage.errors import RegistryError, TooManyRequests

T = TypeVar("T")

BODIES: Final = 16 * MIB
"""Bytes of request bodies that a worker holds at the same time."""
FORMS: Final = 4 * MIB
"""The same for forms and JSON that are no part of the distribution API. Nobody needs an account to send them, so they
take no memory of manifests."""
ANSWERS: Final = 24 * MIB
"""Bytes of answers that a worker holds for clients that have not taken them yet."""
HELD: Final = 256 * 1024
"""Bytes of an answer from which on it counts: the kernel takes smaller ones at once, from nearly every client."""
TAKEN_SECONDS: Final = 30.0
"""While somebody waits for room, an answer that its client has been taking for longer than this is cut off."""
STEP: Final = 64 * 1024
"""Bytes by which the share of a body grows."""
SMALL_BODY: Final = 16 * 1024
"""Bytes up to which a body that has been received with its head is taken as it is."""
GRACE_SECONDS: Final = 20.0
"""How long a body may stop, or fall behind the least rate."""
LEAST_RATE: Final = 8 * 1024
"""Bytes a second that a body has to come at, when it takes longer than the grace."""


class Intake:
    """One worker's. `grace` in seconds, `rate` in bytes a second."""

    def __init__(
        self,
        *,
        bodies: MemoryBudget | None = None,
        forms: MemoryBudget | None = None,
        answers: MemoryBudget | None = None,
        grace: float = GRACE_SECONDS,
        rate: float = LEAST_RATE,
    ) -> None:
        self.bodies = bodies or MemoryBudget(BODIES, "request bodies")
        self.forms = forms or MemoryBudget(FORMS, "forms")
        self.answers = answers or MemoryBudget(ANSWERS, "answers", slow=TAKEN_SECONDS)
        self.grace = grace
        self.rate = rate
        self._turn = asyncio.Semaphore(1)

    @staticmethod
    def small_body(exchange: Exchange) -> bytes | None:
        """Returns the request's whole body if it is small and has been received already, as most manifests are; else
        takes nothing and returns None. Such a body needs no timer, and no share of the budget either: the connection
        has buffered as much anyway."""
        length = exchange.length
        return exchange.take_whole_body() if length and length <= SMALL_BODY else None

    @asynccontextmanager
    async def body(self, exchange: Exchange, most: int, too_large: Callable[[], RegistryError]) -> AsyncIterator[bytes]:
        """The request's whole body, held as long as the block lasts. Raises what `too_large` makes for one of more than
        `most` bytes, BodyTooSlow, TooManyRequests (no memory left for it), ClientGone."""
        share = self.bodies.share()
        try:
            yield await self._read(exchange, share, most, too_large)
        finally:
            share.close()

    async def _read(self, exchange: Exchange, share: Share, most: int, too_large: Callable[[], RegistryError]) -> bytes:
        if exchange.length:
            if exchange.length > most:
                raise too_large()
            await share.grow(exchange.length)
        body = bytearray()
        steady = _Steady(self, share)
        try:
            async with steady:
                async for data in exchange.body():
                    if len(body) + len(data) > most:
                        raise too_large()
                    await steady.take(len(data))
                    body += data
            return bytes(body)
        finally:
            body.clear()  # an error's traceback would keep it until the answer is sent

    @asynccontextmanager
    async def metered(self, receive: Receive, send: Send) -> AsyncIterator[tuple[Receive, Send]]:
        """`receive` and `send` of an application that holds its request's body: the same rules for it, until it
        answers or the block ends. Their errors are raised by what the block is given."""
        share = self.forms.share()

        steady, ended = _Steady(self, share), False

        async def counted() -> Message:
            nonlocal ended
            if ended:  # it only waits for the client's leaving
                return await receive()
            async with steady:
                message = await receive()
                await steady.take(len(message.get("body", b"")))
            ended = not message.get("more_body", False)
            return message

        async def answered(message: Message) -> None:
            share.close()
            await send(message)

        try:
            yield counted, answered
        finally:
            share.close()

    async def in_turn(self, exchange: Exchange, call: Callable[[], Awaitable[T]]) -> T:
        """What `call` gives. One at a time for all requests of the worker: what it does takes much memory, and as much
        of the interpreter as there is. It must not wait for a network. Raises ClientGone: the client left while it
        waited, and nothing was done."""
        with closing(Leaving(exchange)) as leaving:
            await leaving.outlast(self._turn.acquire())
        try:
            if exchange.left:
                raise ClientGone
            return await call()
        finally:
            self._turn.release()

    @property
    def short(self) -> bool:
        """Whether answers wait for memory, or soon will."""
        return self.answers.used > self.answers.size // 2

    def try_room(self, size: int, key: str | None = None) -> Share | None:
        """Room for `room` to go on with, if there is some at once."""
        share = self.answers.share(key)
        return share if share.try_grow(size) else None

    @asynccontextmanager
    async def room(self, size: int, key: str | None = None, share: Share | None = None) -> AsyncIterator[None]:
        """Room for an answer of `size` bytes inside the block. `key` stands for the body, where others send the very
        same; `share`: what `try_room` gave for both. Raises TooManyRequests; also out of the block, when its client
        takes the answer too slowly and others wait."""
        if share is None:
            share = self.answers.share(key)
        taken = asyncio.timeout(None)
        loop = asyncio.get_running_loop()
        try:
            if not share.size:
                await share.grow(size)
            async with taken:
                share.cut = lambda: taken.reschedule(loop.time())
                try:
                    yield
                finally:
                    share.cut = None
        except TimeoutError:
            if not taken.expired():
                raise
            raise TooManyRequests("the client takes the answer too slowly, and others wait for memory") from None
        finally:
            share.close()

    async def answer(self, exchange: Exchange, make: Callable[[], Awaitable[tuple[bytes, list[Header]]]]) -> None:
        """Sends what `make` gives: a body and its headers. A large one is sent when there is room for it; where it
        has to wait for that, it is not held meanwhile but made twice. Raises TooManyRequests."""
        body, headers = await make()
        if len(body) <= HELD or exchange.method == "HEAD":
            await send_whole(exchange, 200, body, *headers)
            return
        length = len(body)
        share = self.try_room(length)
        if share is None:
            body = b""
        async with self.room(length, share=share):
            if share is None:
                body, headers = await make()
            await send_whole(exchange, 200, body, *headers)


class _Steady:
    """Around reading a body: its share of memory, and its pace. Each byte buys time, up to the grace, so a body that
    came fast at first may not stop for longer than any other."""

    def __init__(self, intake: Intake, share: Share) -> None:
        self._intake = intake
        self._share = share
        self._received = 0
        self._left = intake.grace
        self._entered = 0.0
        self._timeout: asyncio.Timeout | None = None

    async def __aenter__(self) -> None:
        self._entered = asyncio.get_running_loop().time()
        self._timeout = asyncio.timeout_at(self._entered + self._left)
        await self._timeout.__aenter__()
        self._share.cut = self._cut

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        assert self._timeout is not None
        self._share.cut = None
        self._left -= asyncio.get_running_loop().time() - self._entered
        try:
            await self._timeout.__aexit__(kind, error, trace)  # type: ignore[arg-type]
        except TimeoutError:
            raise BodyTooSlow(
                f"the body comes too slowly: after {self._intake.grace:g} s at least {self._intake.rate:g} bytes a "
                "second are expected, and more while other requests wait for memory"
            ) from None

    async def take(self, count: int) -> None:
        """So many bytes have come. Raises TooManyRequests."""
        self._received += count
        wanted = self._received - self._share.size
        if wanted > 0:
            step = wanted if self._received <= STEP else -(-wanted // STEP) * STEP
            if not self._share.try_grow(step):
                await self._wait_for_room(step)
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._left = min(self._left - (now - self._entered) + count / self._intake.rate, self._intake.grace)
        self._entered = now
        if self._timeout is not None:
            self._timeout.reschedule(now + self._left)

    async def _wait_for_room(self, step: int) -> None:
        """The client cannot help that: the time does not count."""
        assert self._timeout is not None
        loop = asyncio.get_running_loop()
        began = loop.time()
        cut, self._share.cut = self._share.cut, None
        self._timeout.reschedule(None)
        try:
            await self._share.grow(step)
        finally:
            self._share.cut = cut
            self._entered += loop.time() - began
            self._timeout.reschedule(self._entered + self._left)

    def _cut(self) -> None:
        if self._timeout is not None:
            self._timeout.reschedule(asyncio.get_running_loop().time())
