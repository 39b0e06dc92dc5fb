"""Separates the bytes received on one connection into the heads and bodies of requests.

Heads are received into the *head buffer*, which all connections of the worker share. Each body has a buffer of its own.

A client can send the next requests before it has the response to the first (pipelining). While a request is being
answered, the reader *holds* the bytes of the next requests: it parses them when the response is complete. While the
reader holds bytes, it reads nothing from the socket. It holds at most `MAX_HELD_BYTES` for each connection.
"""

from __future__ import annotations

from typing import Protocol

from registry.asgi import Scope
from registry.server.connection.context import ConnectionContext
from registry.server.connection.head_parser import HeadParser, RequestHead
from registry.server.connection.receive_buffers import HEAD_BUFFER_BYTES, BodyBuffer
from registry.server.connection.request_body import RequestBody
from registry.server.http1.error_responses import RefusedRequest
from registry.server.http1.request_head import HEAD_END
from registry.server.server_log import log

MAX_HELD_BYTES = HEAD_BUFFER_BYTES
"""Largest number of bytes that are held for one connection."""


class RequestHandler(Protocol):
    """The object to which the reader reports requests: the connection's protocol object."""

    @property
    def is_answering(self) -> bool:
        """True while the connection answers a request. The reader then holds the bytes of the next requests."""
        ...

    def end_after_response(self) -> None:
        """Called if the connection must end after the current response."""
        ...

    def on_request_start(self) -> None:
        """Called when the first byte of a request is parsed."""
        ...

    def on_request(self, head: RequestHead, *, is_followed: bool) -> RequestBody | None:
        """Called when a head is complete. Returns the object to which the reader adds the request's body; None if the
        request has no body. `is_followed`: whether the head of the next request has been received; always False for a
        request with a chunked body."""
        ...

    def on_body_end(self) -> None:
        """Called when the whole body of the latest request has been received."""
        ...

    def refuse(self, refused: RefusedRequest) -> None:
        """Called when the reader receives a request that is malformed or too large. The reader parses nothing more."""
        ...


class RequestReader:
    """Reads the requests of one connection. Reading from the socket stops in two cases (`FlowControl`):

    - It is *blocked* while the reader holds bytes.
    - It is *paused* for other reasons, for example until the application has taken the received bytes of a body.
    """

    def __init__(self, context: ConnectionContext, handler: RequestHandler) -> None:
        self._context = context
        self._handler = handler
        self._limits = context.worker.limits
        self._head_parser = HeadParser(context, handler.on_request_start)
        self._head_buffer = context.worker.head_buffer
        self._body: RequestBody | None = None
        """The body that is being received; None while the reader expects a head."""
        self._body_buffer: BodyBuffer | None = None
        """The buffer of `_body`; None if `_body` is None."""
        self._current_buffer: BodyBuffer | None = None
        """The body buffer whose memory the last call of `get_memory` returned; None if it returned the head buffer."""
        self._held = b""
        """The bytes that the reader holds. They begin at the start of a head, or with empty lines before a head."""
        self._progress_count = 0
        """Number of complete heads, plus the number of times that bytes of a body were parsed. If a call of `_parse`
        leaves the number unchanged, all bytes of the call belong to an incomplete head."""
        self._incomplete_head_bytes = 0
        """Number of parsed bytes of an incomplete head, including empty lines before the head. The limit `head_bytes`
        applies to this number."""
        self.is_finished = False
        """Whether the reader parses nothing more. It then discards all bytes that it receives."""
        self.read_count = 0
        """Number of reads from the socket that may have received a part of a head."""
        self.discarded_bytes = 0
        """Number of bytes that the reader has discarded. `discard_input` sets it to 0."""

    @property
    def is_in_head(self) -> bool:
        """Whether a part of a head has been received. Empty lines before a head count as a part of it."""
        return self._head_parser.is_in_head or self._incomplete_head_bytes > 0

    @property
    def has_held_bytes(self) -> bool:
        """Whether the reader holds any bytes."""
        return bool(self._held)

    @property
    def has_held_head(self) -> bool:
        """Whether the held bytes include a complete head."""
        return HEAD_END in self._held

    def partial_scope(self) -> Scope:
        """Returns what is known of the request whose head is being received (see `HeadParser.partial_scope`)."""
        return self._head_parser.partial_scope()

    def get_memory(self) -> memoryview:
        """Returns the memory into which the transport is to receive the next bytes.

        - While a body is being received: the memory of its buffer.
        - While a head is expected: the head buffer.
        - For bytes that will be discarded: the head buffer. These bytes are the rest of a *closed* body (the response
          to its request is complete), and everything after `is_finished` has become True.
        """
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
            self.read_count += 1
            self._parse(bytes(self._head_buffer[:count]))
        else:
            self._parse_body_buffer(buffer, count)

    def continue_parsing(self) -> None:
        """Called when a response is complete. Parses the held bytes until a request is being answered again, and holds
        the bytes after this request. If the reader holds no bytes after that, resumes reading from the socket."""
        # The body of the answered request may have paused reading.
        self._context.flow.resume_reading()
        held, self._held = self._held, b""
        if held:
            self._parse(held)
        if not self._held and not self._context.transport.is_closing():
            self._context.flow.unblock_reading()

    def discard_input(self) -> None:
        """Stops parsing, and discards all bytes that are received from now on. Call it before the connection is closed
        if the client may still be sending. Without it, unread bytes would make the kernel reset the connection, and the
        client could lose the last response."""
        self.is_finished = True
        self.discarded_bytes = 0
        self._held = b""
        self._context.flow.resume_reading()
        self._context.flow.unblock_reading()

    def close(self) -> None:
        """Called when the connection is lost. The reader parses nothing more."""
        self.is_finished = True
        self._body = self._body_buffer = self._current_buffer = None
        self._held = b""
        self._head_parser.close()
        del self._handler  # breaks the reference cycle with the connection

    def _parse(self, data: bytes) -> None:
        """Parses `data`, which is one of these:

        - Bytes that were received into the head buffer.
        - Bytes that were received into the buffer of a body, after the body's end.
        - Bytes that the reader has held until now.

        `data` can contain several requests, and can begin inside a closed body (`get_memory`). While a request is being
        answered, holds the bytes of the next requests."""
        count_before, offset, is_held = self._progress_count, 0, False
        while offset < len(data) and not self.is_finished and not is_held:
            if self._body_buffer is not None:
                offset = self._parse_body(data, offset)
            elif self._handler.is_answering:
                is_held = self._hold(data[offset:])
            else:
                offset = self._parse_head(data, offset)
        if offset < len(data) and not is_held:
            self._discard(len(data) - offset)
        if self._progress_count != count_before:
            self._incomplete_head_bytes = 0
            return
        if is_held:
            return
        self._incomplete_head_bytes += len(data)
        if self._incomplete_head_bytes > self._limits.head_bytes and not self.is_finished:
            self._refuse(self._head_parser.too_large_error())

    def _hold(self, data: bytes) -> bool:
        """Holds `data` until the current response is complete, blocks reading from the socket, and returns True.

        If the reader would hold more than `MAX_HELD_BYTES`, returns False. The reader then discards the held bytes and
        all later bytes, and the connection ends after the current response. This can happen only after a chunked body:
        its buffer is larger than `MAX_HELD_BYTES`, and also receives bytes after the body's end."""
        if len(self._held) + len(data) > MAX_HELD_BYTES:
            self._held = b""
            self.is_finished = True
            self._handler.end_after_response()
            return False
        self._held += data
        self._context.flow.block_reading()
        return True

    def _parse_head(self, data: bytes, offset: int) -> int:
        """Parses the bytes of one head, which begin at `offset` in `data`. If the head is complete, passes it to the
        handler. Returns the offset after the parsed bytes."""
        try:
            end_offset, head = self._head_parser.feed(data, offset)
            if head is not None:
                self._progress_count += 1
                # For a chunked body, the search would be wrong: its last chunk ends with the same bytes as a head.
                is_followed = head.body_length is not None and (data.find(HEAD_END, end_offset + head.body_length) >= 0)
                self._body = body = self._handler.on_request(head, is_followed=is_followed)
                self._body_buffer = None if body is None else body.buffer
            return end_offset
        except RefusedRequest as refused:
            self._refuse(refused)
        except Exception:
            log.exception("unexpected error while processing the head of a request; closing the connection")
            self.is_finished = True
            self._context.transport.abort()
        return offset

    def _parse_body(self, data: bytes, offset: int) -> int:
        """Parses the bytes of a body, which begin at `offset` in `data`. Returns the offset after the body's end, or
        the length of `data` if the body does not end in `data`."""
        assert self._body_buffer is not None
        try:
            # These bytes of the body are in other memory than the body's buffer: for example, they came with the head.
            pieces, bytes_after_body = self._body_buffer.parse_other_memory(memoryview(data)[offset:])
        except RefusedRequest as refused:
            self._refuse(refused)
            return offset
        self._add_to_body(self._body_buffer, pieces)
        return len(data) - len(bytes_after_body)

    def _parse_body_buffer(self, buffer: BodyBuffer, count: int) -> None:
        """Parses `count` bytes that were received into `buffer`; if `count` is 0, some of the bytes that the buffer has
        not parsed yet (`BodyBuffer.has_unparsed`). Then parses the bytes after the body's end, if there are any."""
        try:
            pieces, bytes_after_body = buffer.parse_received(count)
        except RefusedRequest as refused:
            self._refuse(refused)
            return
        self._add_to_body(buffer, pieces)
        if bytes_after_body:
            self.read_count += 1
            self._parse(bytes(bytes_after_body))

    def _add_to_body(self, buffer: BodyBuffer, pieces: list[memoryview]) -> None:
        """Adds the parsed pieces to the body. If the body is complete, reports its end. If the buffer still has
        unparsed bytes, pauses reading and parses these bytes in the next iteration of the event loop."""
        self._progress_count += 1
        body = self._body
        if body is None:
            return
        body.add_pieces(pieces)
        if buffer.has_unparsed:
            self._context.flow.pause_reading()
            self._context.worker.loop.call_soon(self._parse_unparsed, body, buffer)
        elif buffer.is_fragmented and body.held_bytes:
            # Tiny chunks take much time to parse. The pause limits how many of them are parsed in one iteration of the
            # event loop. `RequestBody.receive_pieces` resumes reading.
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
        """Adds `count` to `discarded_bytes`. If the sum is more than the limit `linger_bytes`, pauses reading."""
        self.discarded_bytes += count
        if self.discarded_bytes > self._limits.linger_bytes:
            self._context.flow.pause_reading()

    def _refuse(self, refused: RefusedRequest) -> None:
        self.is_finished = True
        self._handler.refuse(refused)
