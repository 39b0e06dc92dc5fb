"""Memory into which the transport receives request bodies. The kernel writes the bytes of a body to this memory, and
the application reads the bytes there without another copy. Only tiny chunks are copied: the server joins them.

Each body has its own buffers. A buffer is written once and never reused. The application gets memory views of a buffer,
and Python frees the buffer when the last view is freed.

All connections of a worker receive the heads of requests into one shared buffer. An idle connection has no buffer.
"""

from __future__ import annotations

from collections import deque

from registry.server.http1.body_framing import Framing
from registry.server.kernel import uninitialized_bytearray

BODY_EXTENSION = "entrepot.body"
"""Key in `scope["extensions"]` of a request with a body. The value is a dictionary of functions:

- `receive` waits for the next part of the body, and returns this part without copying it.
- `take_whole` returns the whole body without copying it; None if bytes of the body are still missing.
- `is_disconnected` returns whether the client has disconnected."""
HEAD_BUFFER_BYTES = 16 * 1024
"""Size of the buffer for the heads of requests. One read can contain several requests (pipelining). The server keeps
the bytes after the first request until it has answered the first request, and this size limits how many it keeps."""
MIN_BUFFER_BYTES, MAX_BUFFER_BYTES = 64 * 1024, 1024 * 1024
"""The smallest and the largest usual size of a buffer for a body:

- The first buffer of a body has `MIN_BUFFER_BYTES`. Each further buffer is twice as large as the previous one, up to
  `MAX_BUFFER_BYTES`.
- While the body is fragmented, or the worker receives more than `MAX_BODIES_WITH_LARGE_BUFFERS` bodies, new buffers
  have `MIN_BUFFER_BYTES`.
- If the request declares the length of its body, no buffer is larger than the bytes that are still missing."""
MAX_BODIES_WITH_LARGE_BUFFERS = 16
"""While a worker receives more bodies than this, new buffers have `MIN_BUFFER_BYTES`. This limits the memory of a
worker whose clients send slowly."""
_SMALL_CHUNK_BYTES = 1024
"""A body is *fragmented* if the chunks that were parsed last are smaller than this on average."""


class IncomingBodies:
    """Counts the request bodies that one worker is receiving."""

    def __init__(self) -> None:
        self.count = 0

    @property
    def requires_small_buffers(self) -> bool:
        """True while the worker receives more than `MAX_BODIES_WITH_LARGE_BUFFERS` bodies. New buffers must then have
        the size `MIN_BUFFER_BYTES`."""
        return self.count > MAX_BODIES_WITH_LARGE_BUFFERS


class BodyBuffer:
    """The memory into which the body of one request is received. Separates the body from its *framing*, such as the
    sizes of chunks, and from the bytes after the body's end.

    One call parses only a limited number of chunks, so that other connections get their turn between two calls. The
    bytes that remain for the next call are the *unparsed* bytes.
    """

    def __init__(self, framing: Framing, incoming: IncomingBodies | None = None) -> None:
        """`framing`: parses the framing of the body. `incoming`: counts this body until the body is complete or this
        object is freed; None: nothing counts the body."""
        self._framing = framing
        self._incoming = incoming or IncomingBodies()
        self._incoming.count += 1
        self._is_counted = True
        self._next_buffer_bytes = MIN_BUFFER_BYTES
        self._buffer = memoryview(b"")
        self._filled_bytes = 0  # how many bytes of `_buffer` were received
        self._unparsed: deque[memoryview] = deque()
        self.is_fragmented = False
        """Whether the body is fragmented (see `_SMALL_CHUNK_BYTES`). If so, the next reads are small, because tiny
        chunks take much time to parse."""

    @property
    def is_complete(self) -> bool:
        """Whether the whole body was parsed."""
        return self._framing.is_complete

    @property
    def has_unparsed(self) -> bool:
        """Whether there are unparsed bytes. To parse some of them, call `parse_unparsed` in a later iteration of the
        event loop."""
        return bool(self._unparsed)

    def get_memory(self) -> memoryview:
        """Returns the memory for the next received bytes: a part of the current buffer, or a part of a new buffer if
        the current buffer is full."""
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
        """Parses `count` bytes that were received into the memory that `get_memory` returned. If `count` is 0, does the
        same as `parse_unparsed`.

        Returns two values: the parts of the body that were parsed, and the bytes after the body's end. While the body
        is not complete, the second value is empty. Raises RefusedRequest if the framing is malformed.
        """
        if not count:
            return self.parse_unparsed()
        start = self._filled_bytes
        self._filled_bytes += count
        return self.parse_other_memory(self._buffer[start : self._filled_bytes])

    def parse_other_memory(self, data: memoryview) -> tuple[list[memoryview], memoryview]:
        """Parses `data`, which may be in other memory than `get_memory` returned: for example, bytes of the body that
        arrived together with the head. If there are unparsed bytes, adds `data` to them and parses nothing. Returns and
        raises the same as `parse_received`."""
        self._unparsed.append(data)
        return self.parse_unparsed() if len(self._unparsed) == 1 else ([], memoryview(b""))

    def parse_unparsed(self) -> tuple[list[memoryview], memoryview]:
        """Parses some of the unparsed bytes. Call it only if `has_unparsed` is True. Returns and raises the same as
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
