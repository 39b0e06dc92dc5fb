"""Separates the bytes received on one connection into the heads and bodies of requests.

Heads are received into a buffer that all connections of the worker share, and bodies into buffers of their own.
"""

from __future__ import annotations

from typing import Protocol

from registry.asgi import Scope
from registry.server.connection.context import ConnectionContext
from registry.server.connection.head_parser import HeadParser, RequestAfterLast, RequestHead
from registry.server.connection.receive_buffers import BodyBuffer
from registry.server.connection.request_body import RequestBody
from registry.server.http1.error_responses import RefusedRequest
from registry.server.server_log import log


class RequestHandler(Protocol):
    """The object to which the reader reports requests: the connection's protocol object."""

    def on_request_start(self) -> None:
        """Called when the first byte of a request was received. Raises RequestAfterLast if the reader must ignore this
        request and all bytes after it."""
        ...

    def on_request(self, head: RequestHead) -> RequestBody | None:
        """Called when a head is complete. Returns the object to which the reader adds the request's body; None if the
        request has no body."""
        ...

    def on_body_end(self) -> None:
        """Called when the body that `on_request` returned last was received completely."""
        ...

    def refuse(self, refused: RefusedRequest) -> None:
        """Called when the request that is being received is malformed or too large. The reader has stopped parsing."""
        ...


class RequestReader:
    """Reads the requests of one connection."""

    def __init__(self, context: ConnectionContext, handler: RequestHandler) -> None:
        self._context = context
        self._handler = handler
        self._limits = context.worker.limits
        self._head_parser = HeadParser(context, handler.on_request_start)
        self._head_buffer = context.worker.head_buffer
        self._body: RequestBody | None = None
        """The body that is being received; None while the reader expects a head."""
        self._body_buffer: BodyBuffer | None = None
        """The memory of `_body`."""
        self._current_buffer: BodyBuffer | None = None
        """The buffer whose memory `get_memory` returned last; None: the head buffer."""
        self._completed_parts = 0
        """Grows by 1 whenever a head is complete, and whenever bytes of a body were parsed. If it does not grow while
        bytes are parsed, these bytes belong to an incomplete head."""
        self._incomplete_bytes = 0
        """Number of bytes of an incomplete head, for the limit `header_bytes`. `_parse` adds the bytes of each of its
        calls in which `_completed_parts` does not grow, and sets the number to 0 in a call in which it grows. Empty
        lines before a head count too."""
        self.is_finished = False
        """Whether the reader parses nothing more, and discards all bytes that it still receives."""
        self.reads = 0
        """Number of reads so far that could contain a head."""
        self.discarded_bytes = 0
        """Number of bytes that were discarded since `is_finished` became True. `discard_input` sets the number to 0
        again."""

    @property
    def is_in_head(self) -> bool:
        """Whether a head was received in part. The head parser ignores empty lines before a head, and is not in a head
        after them. Here a read with nothing but such lines counts as the beginning of a head."""
        return self._head_parser.is_in_head or self._incomplete_bytes > 0

    def partial_scope(self) -> Scope:
        """Returns what is known of the request whose head is being received (see `HeadParser.partial_scope`)."""
        return self._head_parser.partial_scope()

    def get_memory(self) -> memoryview:
        """Returns the memory into which the transport is to receive the next bytes: the buffer of the body that is
        being received, or else the head buffer. The rest of a closed body is discarded, so it gets no memory of its own
        and is received into the head buffer. So are all bytes after `is_finished` has become True."""
        body = self._body
        if body is None or self._body_buffer is None or body.is_closed or self.is_finished:
            self._current_buffer = None
            return self._head_buffer
        self._current_buffer = self._body_buffer
        return self._body_buffer.get_memory()

    def parse_received(self, count: int) -> None:
        """Parses `count` bytes that were received into the memory that `get_memory` returned."""
        buffer, self._current_buffer = self._current_buffer, None
        if buffer is None:
            self._parse(bytes(self._head_buffer[:count]))
        else:
            self._parse_body_buffer(buffer, count)

    def discard_input(self) -> None:
        """Stops parsing, goes on reading, and discards what is received. Call it before the connection is closed if the
        client could still be sending: if a socket is closed with unread data, the kernel resets the connection, and the
        client could lose the last response."""
        self.is_finished = True
        self.discarded_bytes = 0
        self._context.flow.resume_reading()

    def close(self) -> None:
        """Called when the connection is lost. The reader parses nothing afterwards."""
        self.is_finished = True
        self._body = self._body_buffer = self._current_buffer = None
        self._head_parser.close()
        del self._handler  # breaks the reference cycle with the connection

    def _parse(self, data: bytes) -> None:
        """Parses bytes that were received into the head buffer, or that follow a body's end in that body's buffer. The
        bytes can contain heads and the bodies after these heads. They can also begin in the middle of a body: once the
        response to a request is complete (`body.is_closed`), the rest of its body goes into the head buffer too."""
        self.reads += 1
        parts_before, offset = self._completed_parts, 0
        while offset < len(data) and not self.is_finished:
            offset = self._parse_head(data, offset) if self._body_buffer is None else self._parse_body(data, offset)
        if offset < len(data):
            self._discard(len(data) - offset)
        if self._completed_parts != parts_before:
            self._incomplete_bytes = 0
            return
        self._incomplete_bytes += len(data)
        if self._incomplete_bytes > self._limits.header_bytes and not self.is_finished:
            self._refuse(self._head_parser.too_large())

    def _parse_head(self, data: bytes, offset: int) -> int:
        """Parses the bytes of one head in `data`, which begin at `offset`. Reports the head if it is complete. Returns
        the offset after its bytes."""
        try:
            end_offset, head = self._head_parser.feed(data, offset)
            if head is not None:
                self._completed_parts += 1
                self._body = body = self._handler.on_request(head)
                self._body_buffer = None if body is None else body.buffer
            return end_offset
        except RefusedRequest as refused:
            self._refuse(refused)
        except RequestAfterLast:
            self.is_finished = True
        except Exception:
            log.exception("unexpected error while processing the head of a request; closing the connection")
            self.is_finished = True
            self._context.transport.abort()
        return offset

    def _parse_body(self, data: bytes, offset: int) -> int:
        """Parses the bytes of a body in `data`, which begin at `offset`. Returns the offset after the body's end, or
        the length of `data` if the body does not end in `data`."""
        assert self._body_buffer is not None
        try:
            pieces, rest = self._body_buffer.parse(memoryview(data)[offset:])
        except RefusedRequest as refused:
            self._refuse(refused)
            return offset
        self._add_to_body(self._body_buffer, pieces)
        return len(data) - len(rest)

    def _parse_body_buffer(self, buffer: BodyBuffer, count: int) -> None:
        """Parses `count` bytes that were received into `buffer`. If `count` is 0, parses bytes that were received into
        it earlier and are not parsed yet. Then parses the bytes after the body's end, if there are any."""
        try:
            pieces, rest = buffer.parse_received(count)
        except RefusedRequest as refused:
            self._refuse(refused)
            return
        self._add_to_body(buffer, pieces)
        if rest:
            self._parse(bytes(rest))

    def _add_to_body(self, buffer: BodyBuffer, pieces: list[memoryview]) -> None:
        """Adds pieces to the body, and reports the body's end if the body is complete. If the buffer has bytes that are
        not parsed yet, pauses reading, and has them parsed in the next iteration of the event loop."""
        self._completed_parts += 1
        body = self._body
        if body is None:
            return
        body.add_pieces(pieces)
        if buffer.has_unparsed:
            self._context.flow.pause_reading()
            self._context.worker.loop.call_soon(self._parse_unparsed, body, buffer)
        elif buffer.is_fragmented and body.held_bytes:
            # The body comes in tiny chunks, which take much time to parse. The pause limits how many are parsed in one
            # iteration of the event loop. `RequestBody.receive_pieces` resumes reading.
            self._context.flow.pause_reading()
        if buffer.is_complete:
            self._body = self._body_buffer = None
            body.finish()
            self._handler.on_body_end()

    def _parse_unparsed(self, body: RequestBody, buffer: BodyBuffer) -> None:
        if buffer is self._body_buffer and buffer.has_unparsed and not self.is_finished:
            self._parse_body_buffer(buffer, 0)
            if not buffer.has_unparsed and not body.held_bytes:
                self._context.flow.resume_reading()

    def _discard(self, count: int) -> None:
        """Counts discarded bytes, and pauses reading when there are more than `linger_bytes`."""
        self.discarded_bytes += count
        if self.discarded_bytes > self._limits.linger_bytes:
            self._context.flow.pause_reading()

    def _refuse(self, refused: RefusedRequest) -> None:
        self.is_finished = True
        self._handler.refuse(refused)
