"""Separates the bytes received on one connection into the heads and bodies of requests.

Heads are received into a buffer that all connections of the worker share, and bodies into buffers of their own.

A client can send further requests before it has the response to the first (pipelining). While a request is being
answered, the bytes of the further requests are *held*: they are not parsed until the response is complete. While bytes
are held, the reader reads nothing from the socket, so the server holds at most `MAX_HELD_BYTES` for each connection.
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
        """Whether a request is being answered. While it is, the reader holds the bytes of further requests."""
        ...

    def end_after_response(self) -> None:
        """Called when the connection must end after the response to the request that is being answered."""
        ...

    def on_request_start(self) -> None:
        """Called when the first byte of a request is parsed."""
        ...

    def on_request(self, head: RequestHead, *, is_followed: bool) -> RequestBody | None:
        """Called when a head is complete. Returns the object to which the reader adds the request's body; None if the
        request has no body. `is_followed` says whether the client has sent the head of another request already. It is
        False if the request has a chunked body, because the end of this body is not known yet."""
        ...

    def on_body_end(self) -> None:
        """Called when the body of the latest request was received completely."""
        ...

    def refuse(self, refused: RefusedRequest) -> None:
        """Called when the request that is being received is malformed or too large. The reader parses nothing
        afterwards."""
        ...


class RequestReader:
    """Reads the requests of one connection. Reading from the socket stops in two cases (`FlowControl`): it is *blocked*
    while bytes are held, and *paused* for other reasons, for example until the application has taken the received bytes
    of a body."""

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
        """The buffer whose memory `get_memory` returned last; None if this was the head buffer."""
        self._held = b""
        """The bytes that are held. They begin with the beginning of a head, or with empty lines before a head."""
        self._parsed_parts = 0
        """Grows by 1 whenever a head is complete, and whenever bytes of a body were parsed. If it does not grow while
        `_parse` parses bytes, all of these bytes belong to an incomplete head."""
        self._incomplete_head_bytes = 0
        """Number of parsed bytes of an incomplete head, including empty lines before the head. The limit `header_bytes`
        applies to this number."""
        self.is_finished = False
        """Whether the reader parses nothing more, and discards all bytes that it still receives."""
        self.reads = 0
        """Number of reads so far that could contain a head."""
        self.discarded_bytes = 0
        """Number of bytes that were discarded since `is_finished` became True, or since the call of
        `discard_input`."""

    @property
    def is_in_head(self) -> bool:
        """Whether a part of a head was received. Empty lines count as the beginning of a head. The head parser ignores
        such lines, so its own `is_in_head` stays False after them."""
        return self._head_parser.is_in_head or self._incomplete_head_bytes > 0

    @property
    def has_held_bytes(self) -> bool:
        """Whether any bytes are held."""
        return bool(self._held)

    @property
    def has_held_head(self) -> bool:
        """Whether the held bytes include a complete head."""
        return HEAD_END in self._held

    def partial_scope(self) -> Scope:
        """Returns what is known of the request whose head is being received (see `HeadParser.partial_scope`)."""
        return self._head_parser.partial_scope()

    def get_memory(self) -> memoryview:
        """Returns the memory into which the transport is to receive the next bytes: the buffer of the body that is
        being received, or the head buffer if a head is expected. The head buffer also receives all bytes that will be
        discarded:

        - the rest of a *closed* body: a body is closed when the response to its request is complete,
        - everything after `is_finished` has become True.
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
            self.reads += 1
            self._parse(bytes(self._head_buffer[:count]))
        else:
            self._parse_body_buffer(buffer, count)

    def continue_parsing(self) -> None:
        """Called when a response is complete. Parses the held bytes up to the end of the first request that is not
        answered from the cache, and still holds the bytes after this request. If no bytes are held any more, resumes
        reading from the socket."""
        # The body of the answered request may have paused reading. From now on, the rest of this body is discarded.
        self._context.flow.resume_reading()
        held, self._held = self._held, b""
        if held:
            self._parse(held)
        if not self._held and not self._context.transport.is_closing():
            self._context.flow.unblock_reading()

    def discard_input(self) -> None:
        """Stops parsing, and discards all bytes that are still received. Call it before the connection is closed, if
        the client could still be sending: if a socket is closed with unread data, the kernel resets the connection, and
        the client could lose the last response."""
        self.is_finished = True
        self.discarded_bytes = 0
        self._held = b""
        self._context.flow.resume_reading()
        self._context.flow.unblock_reading()

    def close(self) -> None:
        """Called when the connection is lost. The reader parses nothing afterwards."""
        self.is_finished = True
        self._body = self._body_buffer = self._current_buffer = None
        self._held = b""
        self._head_parser.close()
        del self._handler  # breaks the reference cycle with the connection

    def _parse(self, data: bytes) -> None:
        """Parses bytes that were received into the head buffer, or that follow a body's end in the body's buffer. The
        bytes can contain several requests. They can begin in the middle of a body that is closed (`get_memory`). While
        a request is being answered, holds the bytes of the next requests."""
        parts_before, offset, is_held = self._parsed_parts, 0, False
        while offset < len(data) and not self.is_finished and not is_held:
            if self._body_buffer is not None:
                offset = self._parse_body(data, offset)
            elif self._handler.is_answering:
                is_held = self._hold(data[offset:])
            else:
                offset = self._parse_head(data, offset)
        if offset < len(data) and not is_held:
            self._discard(len(data) - offset)
        if self._parsed_parts != parts_before:
            self._incomplete_head_bytes = 0
            return
        if is_held:
            return
        self._incomplete_head_bytes += len(data)
        if self._incomplete_head_bytes > self._limits.header_bytes and not self.is_finished:
            self._refuse(self._head_parser.too_large_error())

    def _hold(self, data: bytes) -> bool:
        """Holds `data` until the current response is complete, stops reading from the socket, and returns True. If more
        than `MAX_HELD_BYTES` would be held, returns False: the held requests and all later ones are discarded, and the
        connection ends after the current response.

        Only the bytes after a chunked body can be too many. The server does not know where such a body ends, so it can
        receive them into a buffer of the body, which is larger than `MAX_HELD_BYTES`. All other held bytes come from
        the head buffer, whose size is `MAX_HELD_BYTES`."""
        if len(self._held) + len(data) > MAX_HELD_BYTES:
            self._held = b""
            self.is_finished = True
            self._handler.end_after_response()
            return False
        self._held += data
        self._context.flow.block_reading()
        return True

    def _parse_head(self, data: bytes, offset: int) -> int:
        """Parses the bytes of one head, which begin at `offset` in `data`. Passes the head to the handler if it is
        complete. Returns the offset after the bytes of the head."""
        try:
            end_offset, head = self._head_parser.feed(data, offset)
            if head is not None:
                self._parsed_parts += 1
                # Where a chunked body ends is not known here, and its last chunk ends with the same bytes as a head.
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
            pieces, bytes_after_body = self._body_buffer.parse(memoryview(data)[offset:])
        except RefusedRequest as refused:
            self._refuse(refused)
            return offset
        self._add_to_body(self._body_buffer, pieces)
        return len(data) - len(bytes_after_body)

    def _parse_body_buffer(self, buffer: BodyBuffer, count: int) -> None:
        """Parses `count` bytes that were received into `buffer`, or some of the buffer's unparsed bytes if `count` is
        0. Then parses the bytes after the body's end, if there are any."""
        try:
            pieces, bytes_after_body = buffer.parse_received(count)
        except RefusedRequest as refused:
            self._refuse(refused)
            return
        self._add_to_body(buffer, pieces)
        if bytes_after_body:
            self.reads += 1
            self._parse(bytes(bytes_after_body))

    def _add_to_body(self, buffer: BodyBuffer, pieces: list[memoryview]) -> None:
        """Adds pieces to the body, and reports the body's end if the body is complete. If the buffer has unparsed bytes
        (`BodyBuffer.has_unparsed`), pauses reading and parses them in the next iteration of the event loop."""
        self._parsed_parts += 1
        body = self._body
        if body is None:
            return
        body.add_pieces(pieces)
        if buffer.has_unparsed:
            self._context.flow.pause_reading()
            self._context.worker.loop.call_soon(self._parse_unparsed, body, buffer)
        elif buffer.is_fragmented and body.held_bytes:
            # The body comes in tiny chunks, which take much time to parse. The pause limits how many chunks are parsed
            # in one iteration of the event loop. `RequestBody.receive_pieces` resumes reading.
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
        """Adds `count` to `discarded_bytes`. Pauses reading when the sum is more than `linger_bytes`."""
        self.discarded_bytes += count
        if self.discarded_bytes > self._limits.linger_bytes:
            self._context.flow.pause_reading()

    def _refuse(self, refused: RefusedRequest) -> None:
        self.is_finished = True
        self._handler.refuse(refused)
