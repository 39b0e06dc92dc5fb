"""Memory into which the transport receives request bodies. The kernel writes the bytes of a body to this memory, and
the application gets them from there without another copy. Only tiny chunks are copied, to join them.

A body has buffers of its own. Each buffer is written once and never reused. The application gets memory views of parts
of a buffer, and the buffer is freed when the last view is freed. So the application does not have to return buffers.

Heads of requests need no such buffers: all connections of a worker receive heads into one shared buffer, which is
parsed after each read. So an idle connection has no buffer.
"""

from __future__ import annotations

from collections import deque

from registry.server.http1.body_framing import Framing
from registry.server.kernel import uninitialized_bytearray

BODY_EXTENSION = "entrepot.body"
"""Key in `scope["extensions"]` of a request with a body. The value is a dictionary of functions:

- `receive` waits for the next part of the body, and returns it without copying it.
- `take_whole` returns the whole body without copying it, if the whole body was received already.
- `is_disconnected` returns whether the client has disconnected."""
HEAD_BUFFER_BYTES = 16 * 1024
"""Size of the buffer for the heads of requests. A read can contain several requests (pipelining), and the server keeps
the bytes after the first request until it has answered the first request. A small buffer limits this memory."""
MIN_BUFFER_BYTES, MAX_BUFFER_BYTES = 64 * 1024, 1024 * 1024
"""Size of a body's first buffer, and the maximum for its other buffers.

- Each new buffer of a body is usually twice as large as the previous buffer, up to the maximum.
- While the body comes in tiny chunks, or the worker receives more than `MAX_LARGE_BODIES` bodies, new buffers have
  `MIN_BUFFER_BYTES`.
- If the length of a body is declared, no buffer is larger than the rest of the body."""
MAX_LARGE_BODIES = 16
"""While a worker receives more bodies than this, new buffers have `MIN_BUFFER_BYTES`, so that clients that send many
bodies slowly do not keep too much memory in use."""
_SMALL_CHUNK_BYTES = 1024
"""A body is fragmented if its chunks are smaller than this on average."""


class IncomingBodies:
    """Counts the request bodies that one worker is receiving."""

    def __init__(self) -> None:
        self.count = 0

    @property
    def requires_small_buffers(self) -> bool:
        """True if the worker receives more than `MAX_LARGE_BODIES` bodies. Each body may then take only about
        `MIN_BUFFER_BYTES`."""
        return self.count > MAX_LARGE_BODIES


class BodyBuffer:
    """The memory into which the body of one request is received: one buffer after the other. Separates the body from
    its *framing*, such as the sizes of chunks, and from the bytes after the body's end.

    If a read contains many tiny chunks, they are parsed in several steps, so that other connections get their turn
    between two steps. The bytes that wait for the next step are the *unparsed* bytes.
    """

    def __init__(self, framing: Framing, incoming: IncomingBodies | None = None) -> None:
        """`framing` parses the framing of the body. `incoming` is the worker's count of bodies; if it is None, the body
        is not counted. The count includes this body until the body is complete or this object is freed."""
        self._framing = framing
        self._incoming = incoming or IncomingBodies()
        self._incoming.count += 1
        self._is_counted = True
        self._next_buffer_bytes = MIN_BUFFER_BYTES
        self._buffer = memoryview(b"")
        self._filled_bytes = 0  # how many bytes of `_buffer` were received
        self._unparsed: deque[memoryview] = deque()
        self.is_fragmented = False
        """Whether the bytes parsed last contained tiny chunks. Tiny chunks take much time to parse, so the next reads
        are small while this is True."""

    @property
    def is_complete(self) -> bool:
        """Whether the whole body was parsed."""
        return self._framing.is_complete

    @property
    def has_unparsed(self) -> bool:
        """Whether there are unparsed bytes. To parse them, call `parse_unparsed`, or `parse_received` with 0, in a
        later iteration of the event loop."""
        return bool(self._unparsed)

    def get_memory(self) -> memoryview:
        """Returns the memory into which the next bytes are to be received. It is a part of the current buffer, or of a
        new buffer if the current one is full."""
        if self._filled_bytes == len(self._buffer):
            self._buffer = memoryview(uninitialized_bytearray(self._framing.bytes_to_receive(self._next_buffer_bytes)))
            self._filled_bytes = 0
            self._next_buffer_bytes = min(2 * self._next_buffer_bytes, MAX_BUFFER_BYTES)
            if self._incoming.requires_small_buffers:
                self._next_buffer_bytes = MIN_BUFFER_BYTES
        max_bytes = MIN_BUFFER_BYTES if self.is_fragmented else MAX_BUFFER_BYTES
        return self._buffer[self._filled_bytes : self._filled_bytes + self._framing.bytes_to_receive(max_bytes)]

    def __del__(self) -> None:
        self._uncount()

    def _uncount(self) -> None:
        if self._is_counted:
            self._is_counted = False
            self._incoming.count -= 1

    def parse_received(self, count: int) -> tuple[list[memoryview], memoryview]:
        """Parses `count` bytes that were received into the memory that `get_memory` returned. If `count` is 0, parses
        some of the unparsed bytes; call it with 0 only if there are any.

        Returns the parts of the body in the parsed bytes, and the bytes after the body's end. If the body is not
        complete, there are no bytes after its end. Raises RefusedRequest if the framing is malformed.
        """
        if not count:
            return self.parse_unparsed()
        start = self._filled_bytes
        self._filled_bytes += count
        return self.parse(self._buffer[start : self._filled_bytes])

    def parse(self, data: memoryview) -> tuple[list[memoryview], memoryview]:
        """Parses `data`, which may be in any memory. If there are unparsed bytes, only adds `data` to them. Returns and
        raises the same as `parse_received`."""
        self._unparsed.append(data)
        return self.parse_unparsed() if len(self._unparsed) == 1 else ([], memoryview(b""))

    def parse_unparsed(self) -> tuple[list[memoryview], memoryview]:
        """Parses some of the unparsed bytes; call it only if there are any. Returns and raises the same as
        `parse_received`."""
        pieces: list[memoryview] = []
        data = self._unparsed.popleft()
        parsed_bytes = self._framing.parse(data, pieces)
        if self._framing.is_complete:
            self._uncount()
        self.is_fragmented = len(pieces) > 1 and parsed_bytes < _SMALL_CHUNK_BYTES * len(pieces)
        if self.is_fragmented:
            pieces = [memoryview(b"".join(pieces))]  # because a memory view takes more memory than a tiny chunk
            self._next_buffer_bytes = MIN_BUFFER_BYTES
        remaining_data = data[parsed_bytes:]
        if not self.is_complete:
            if remaining_data:
                self._unparsed.appendleft(remaining_data)
            return pieces, memoryview(b"")
        if self._unparsed:
            remaining_data = memoryview(b"".join([remaining_data, *self._unparsed]))
            self._unparsed.clear()
        return pieces, remaining_data
