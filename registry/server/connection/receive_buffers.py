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

from registry.server.http1.body_framing import Framing
from registry.server.kernel import uninitialized_bytearray

if TYPE_CHECKING:
    from registry.server.connection.protocol import RegistryProtocol

BODY_EXTENSION = "entrepot.body"
"""In `scope["extensions"]`, of a request with a body: its `receive` gives the body without copying it."""
HEAD_BUFFER_BYTES = 64 * 1024
MIN_BUFFER_BYTES, MAX_BUFFER_BYTES = 64 * 1024, 1024 * 1024
"""Bytes a body's buffers have: the first one, and those of a body that keeps filling them. The larger is the most that
is received at once."""
MAX_LARGE_BODIES = 16
"""Bodies that come in at the same time up to which each may have large buffers. Of more, all new ones are small: a
client that stops sending keeps what it has."""
_SMALL_CHUNK_BYTES = 1024


class IncomingBodies:
    """How many bodies come in at the same time, over all connections of a worker."""

    def __init__(self) -> None:
        self.bodies = 0

    @property
    def crowded(self) -> bool:
        return self.bodies > MAX_LARGE_BODIES


class BodyBuffer:
    """A request's body while it comes. It counts in `receiving` until it has ended, or nobody waits for it any more."""

    def __init__(self, framing: Framing, receiving: IncomingBodies | None = None) -> None:
        self._framing = framing
        self._receiving = receiving or IncomingBodies()
        self._receiving.bodies += 1
        self._counts = True
        self._size = MIN_BUFFER_BYTES
        self._buffer = memoryview(b"")
        self._filled = 0
        self._waiting: deque[memoryview] = deque()
        self.is_fragmented = False
        """It came in tiny chunks. They keep the event loop busy, so fewer are to be received in a turn."""

    @property
    def ended(self) -> bool:
        return self._framing.ended

    @property
    def waiting(self) -> bool:
        """Some of what was received has not been looked at: `take_waiting` does, in another turn of the loop."""
        return bool(self._waiting)

    def room(self) -> memoryview:
        """Where to receive what comes next."""
        if self._filled == len(self._buffer):
            self._buffer = memoryview(uninitialized_bytearray(self._framing.room(self._size)))
            self._filled = 0
            self._size = MIN_BUFFER_BYTES if self._receiving.crowded else min(2 * self._size, MAX_BUFFER_BYTES)
        most = MIN_BUFFER_BYTES if self.is_fragmented else MAX_BUFFER_BYTES
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
            return self.take_waiting()
        start = self._filled
        self._filled += count
        return self.take(self._buffer[start : self._filled])

    def take(self, data: memoryview) -> tuple[list[memoryview], memoryview]:
        """The same for bytes that came another way."""
        self._waiting.append(data)
        return self.take_waiting() if len(self._waiting) == 1 else ([], memoryview(b""))

    def take_waiting(self) -> tuple[list[memoryview], memoryview]:
        """The same for some of the bytes that wait."""
        pieces: list[memoryview] = []
        data = self._waiting.popleft()
        used = self._framing.take(data, pieces)
        if self._framing.ended:
            self._count_no_more()
        self.is_fragmented = len(pieces) > 1 and used < _SMALL_CHUNK_BYTES * len(pieces)
        if self.is_fragmented:
            pieces = [memoryview(b"".join(pieces))]  # each view is larger than what it shows
            self._size = MIN_BUFFER_BYTES
        rest = data[used:]
        if not self.ended:
            if rest:
                self._waiting.appendleft(rest)
            return pieces, memoryview(b"")
        if self._waiting:
            rest = memoryview(b"".join([rest, *self._waiting]))
            self._waiting.clear()
        return pieces, rest


class BufferedReceiver(asyncio.BufferedProtocol):
    """What the transport knows of a connection. (uvicorn's class is an asyncio.Protocol, which excludes the other.)"""

    def __init__(
        self, connection: RegistryProtocol, heads: memoryview, on_lost: Callable[[], None] | None = None
    ) -> None:
        """`heads` is the buffer the worker's connections share. `on_lost` is called when the connection is."""
        self.connection = connection
        self._heads = heads
        self._on_lost = on_lost
        self._body: BodyBuffer | None = None

    def get_buffer(self, sizehint: int) -> memoryview:
        self._body = self.connection.body_to_receive()
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
