"""Buffers that the transport receives into, so that the kernel's copy of the bytes is the only one.

All connections of a worker receive the heads of requests into one small buffer: each read is parsed before the next
read begins. A body gets buffers of its own. Each is filled once and never reused: the memory views of its parts keep it
alive, and it is freed with the last of them. So nothing has to be given back, and an idle connection holds no buffer.
"""

from __future__ import annotations

from collections import deque

from registry.server.http1.body_framing import Framing
from registry.server.kernel import uninitialized_bytearray

BODY_EXTENSION = "entrepot.body"
"""Key in `scope["extensions"]` of a request with a body. Its `receive` returns the body without copying it; its `left`
returns whether the client has disconnected."""
HEAD_BUFFER_BYTES = 64 * 1024
MIN_BUFFER_BYTES, MAX_BUFFER_BYTES = 64 * 1024, 1024 * 1024
"""Size of a body's first buffer, and of the largest one. Buffers grow while the body fills them. One read receives at
most `MAX_BUFFER_BYTES`."""
MAX_LARGE_BODIES = 16
"""While more bodies than this come in, all new buffers are small: a client that stops sending keeps its buffer."""
_SMALL_CHUNK_BYTES = 1024
"""A body whose chunks are smaller than this on average counts as fragmented."""


class IncomingBodies:
    """Counts the request bodies that one worker is receiving."""

    def __init__(self) -> None:
        self.count = 0

    @property
    def has_many(self) -> bool:
        """So many that buffers have to be small."""
        return self.count > MAX_LARGE_BODIES


class BodyBuffer:
    """Receives the body of one request, and cuts it out of what is received.

    Counts in `incoming` until the body has ended or nothing refers to this buffer any more.
    """

    def __init__(self, framing: Framing, incoming: IncomingBodies | None = None) -> None:
        self._framing = framing
        self._incoming = incoming or IncomingBodies()
        self._incoming.count += 1
        self._is_counted = True
        self._size = MIN_BUFFER_BYTES
        self._buffer = memoryview(b"")
        self._filled = 0
        self._waiting: deque[memoryview] = deque()
        self.is_fragmented = False
        """The last part came in tiny chunks. They keep the event loop busy, so the next read is to be small."""

    @property
    def ended(self) -> bool:
        """All of the body was received."""
        return self._framing.ended

    @property
    def waiting(self) -> bool:
        """Some received bytes are not parsed yet; `take_waiting`, called in a later turn of the loop, parses them."""
        return bool(self._waiting)

    def room(self) -> memoryview:
        """Returns the memory to receive the next bytes into."""
        if self._filled == len(self._buffer):
            self._buffer = memoryview(uninitialized_bytearray(self._framing.room(self._size)))
            self._filled = 0
            self._size = MIN_BUFFER_BYTES if self._incoming.has_many else min(2 * self._size, MAX_BUFFER_BYTES)
        most = MIN_BUFFER_BYTES if self.is_fragmented else MAX_BUFFER_BYTES
        return self._buffer[self._filled : self._filled + self._framing.room(most)]

    def __del__(self) -> None:
        self._uncount()

    def _uncount(self) -> None:
        if self._is_counted:
            self._is_counted = False
            self._incoming.count -= 1

    def filled(self, count: int) -> tuple[list[memoryview], memoryview]:
        """Parses `count` bytes that were received into `room`; with 0, the bytes that wait.

        Returns the parts of the body in them, and the bytes that follow the body's end. Raises RefusedRequest if the
        body is not framed as it must be.
        """
        if not count:
            return self.take_waiting()
        start = self._filled
        self._filled += count
        return self.take(self._buffer[start : self._filled])

    def take(self, data: memoryview) -> tuple[list[memoryview], memoryview]:
        """Parses `data`, or queues it behind bytes that wait. Returns and raises the same as `filled`."""
        self._waiting.append(data)
        return self.take_waiting() if len(self._waiting) == 1 else ([], memoryview(b""))

    def take_waiting(self) -> tuple[list[memoryview], memoryview]:
        """Parses some of the bytes that wait. Returns and raises the same as `filled`."""
        pieces: list[memoryview] = []
        data = self._waiting.popleft()
        used = self._framing.take(data, pieces)
        if self._framing.ended:
            self._uncount()
        self.is_fragmented = len(pieces) > 1 and used < _SMALL_CHUNK_BYTES * len(pieces)
        if self.is_fragmented:
            pieces = [memoryview(b"".join(pieces))]  # a view takes more memory than a tiny chunk
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
