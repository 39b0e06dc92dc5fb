"""From the socket to whoever wants the bytes, with one copy: the kernel's, into the memory they stay in.

Heads are received into one small buffer that all connections of a worker share: a read is over before the next begins.
A body gets memory of its own, which is filled once and never again: whoever holds a view of it keeps it alive, and what
nobody holds any more is free. So nothing has to be given back, and an idle connection holds nothing.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from registry.server.framing import Framing
from registry.server.kernel import fresh_memory

if TYPE_CHECKING:
    from registry.server.protocol import RegistryProtocol

PIECES = "entrepot.body"
"""In `scope["extensions"]`, of a request with a body: its `receive` gives the body without copying it."""
HEADS = 64 * 1024
LEAST, MOST = 64 * 1024, 1024 * 1024
"""Bytes a body's buffers have: the first one, and those of a body that keeps filling them. The larger is the most that
is received at once."""
FEW = 16
"""Bodies that come in at the same time up to which each may have large buffers. Of more, all new ones are small: a
client that stops sending keeps what it has."""
_SMALL = 1024


class Receiving:
    """How many bodies come in at the same time, over all connections of a worker."""

    def __init__(self) -> None:
        self.bodies = 0

    @property
    def crowded(self) -> bool:
        return self.bodies > FEW


class Body:
    """A request's body while it comes. It counts in `receiving` until it has ended, or nobody waits for it any more."""

    def __init__(self, framing: Framing, receiving: Receiving | None = None) -> None:
        self._framing = framing
        self._receiving = receiving or Receiving()
        self._receiving.bodies += 1
        self._counts = True
        self._size = LEAST
        self._buffer = memoryview(b"")
        self._filled = 0
        self._waiting: deque[memoryview] = deque()
        self.crumbled = False
        """It came in tiny chunks. They keep the event loop busy, so fewer are to be received in a turn."""

    @property
    def ended(self) -> bool:
        return self._framing.ended

    @property
    def waiting(self) -> bool:
        """Some of what was received has not been looked at: `go_on` does, in another turn of the loop."""
        return bool(self._waiting)

    def room(self) -> memoryview:
        """Where to receive what comes next."""
        if self._filled == len(self._buffer):
            self._buffer = memoryview(fresh_memory(self._framing.room(self._size)))
            self._filled = 0
            self._size = LEAST if self._receiving.crowded else min(2 * self._size, MOST)
        most = LEAST if self.crumbled else MOST
        return self._buffer[self._filled : self._filled + self._framing.room(most)]

    def __del__(self) -> None:
        self._count_no_more()

    def _count_no_more(self) -> None:
        if self._counts:
            self._counts = False
            self._receiving.bodies -= 1

    def filled(self, count: int) -> tuple[list[memoryview], memoryview]:
        """Takes what was received into `room`; with 0, what waits. Returns the body's parts in it, and what follows the
        body's end. Raises Refused."""
        if not count:
            return self.go_on()
        start = self._filled
        self._filled += count
        return self.take(self._buffer[start : self._filled])

    def take(self, data: memoryview) -> tuple[list[memoryview], memoryview]:
        """The same for bytes that came another way."""
        self._waiting.append(data)
        return self.go_on() if len(self._waiting) == 1 else ([], memoryview(b""))

    def go_on(self) -> tuple[list[memoryview], memoryview]:
        """The same for some of the bytes that wait."""
        pieces: list[memoryview] = []
        data = self._waiting.popleft()
        used = self._framing.take(data, pieces)
        if self._framing.ended:
            self._count_no_more()
        self.crumbled = len(pieces) > 1 and used < _SMALL * len(pieces)
        if self.crumbled:
            pieces = [memoryview(b"".join(pieces))]  # each view is larger than what it shows
            self._size = LEAST
        rest = data[used:]
        if not self.ended:
            if rest:
                self._waiting.appendleft(rest)
            return pieces, memoryview(b"")
        if self._waiting:
            rest = memoryview(b"".join([rest, *self._waiting]))
            self._waiting.clear()
        return pieces, rest


class Receiver(asyncio.BufferedProtocol):
    """What the transport knows of a connection. (uvicorn's class is an asyncio.Protocol, which excludes the other.)"""

    def __init__(
        self, connection: RegistryProtocol, heads: memoryview, on_lost: Callable[[], None] | None = None
    ) -> None:
        """`heads` is the buffer the worker's connections share. `on_lost` is called when the connection is."""
        self.connection = connection
        self._heads = heads
        self._on_lost = on_lost
        self._body: Body | None = None

    def get_buffer(self, sizehint: int) -> memoryview:
        self._body = self.connection.wanted_body()
        return self._heads if self._body is None else self._body.room()

    def buffer_updated(self, nbytes: int) -> None:
        body, self._body = self._body, None
        if body is None:
            self.connection.data_received(bytes(self._heads[:nbytes]))
        else:
            self.connection.body_received(body, nbytes)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.connection.connection_made(transport)  # type: ignore[arg-type]

    def eof_received(self) -> bool | None:
        return self.connection.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._body = None
        if self._on_lost is not None:
            self._on_lost()
        self.connection.connection_lost(exc)

    def pause_writing(self) -> None:
        self.connection.pause_writing()

    def resume_writing(self) -> None:
        self.connection.resume_writing()
