"""Cuts the bytes received on one connection into the heads and bodies of requests."""

from __future__ import annotations

from typing import Protocol

from registry.server.connection.context import ConnectionContext
from registry.server.connection.head_parser import HeadParser, RequestAfterLast, RequestHead
from registry.server.connection.receive_buffers import BodyBuffer
from registry.server.connection.request_body import RequestBody
from registry.server.http1.error_responses import RefusedRequest
from registry.server.server_log import log


class RequestHandler(Protocol):
    """What the reader calls."""

    def on_request_begin(self) -> None:
        """A request's first byte was received. May raise RequestAfterLast, which ends the reading."""
        ...

    def on_request(self, head: RequestHead) -> RequestBody | None:
        """A head is complete. Returns the body that follows it; None: no body follows."""
        ...

    def on_body_end(self) -> None:
        """The body that was received last is complete."""
        ...

    def refuse(self, refused: RefusedRequest) -> None:
        """The request being received is malformed or too large."""
        ...


class RequestReader:
    """Reads one connection. Once `is_finished` is set nothing more is parsed: what still comes is dropped."""

    def __init__(self, context: ConnectionContext, handler: RequestHandler) -> None:
        self._context = context
        self._handler = handler
        self._limits = context.worker.limits
        self._head_parser = HeadParser(context, handler.on_request_begin)
        self._head_buffer = context.worker.head_buffer
        self._body: RequestBody | None = None
        """The body that is being received, and what it is received into."""
        self._body_buffer: BodyBuffer | None = None
        self._read_into: BodyBuffer | None = None
        """Where the read in progress goes; None: into the head buffer."""
        self._parsed_parts = 0
        """Heads and parts of bodies that were received."""
        self._unparsed_bytes = 0
        """Bytes received since the last of them."""
        self.is_finished = False
        self.reads = 0
        """Reads into the head buffer so far."""
        self.discarded_bytes = 0

    @property
    def is_in_head(self) -> bool:
        """Bytes were received that are no complete head yet."""
        return self._head_parser.is_in_head or self._unparsed_bytes > 0

    def room(self) -> memoryview:
        """Returns the memory to receive the next bytes into."""
        body = self._body
        if body is None or self._body_buffer is None or body.is_closed or self.is_finished:
            self._read_into = None
            return self._head_buffer
        self._read_into = self._body_buffer
        return self._body_buffer.room()

    def received(self, count: int) -> None:
        """Parses `count` bytes that were received into `room`."""
        buffer, self._read_into = self._read_into, None
        if buffer is None:
            self._parse(bytes(self._head_buffer[:count]))
        else:
            self._parse_body(buffer, count)

    def discard_input(self) -> None:
        """Parses nothing more, and goes on reading for a while, so that the client can read its last response."""
        self.is_finished = True
        self.discarded_bytes = 0
        self._context.flow.resume_reading()

    def close(self) -> None:
        """Ends the reading. To be called when the connection is lost."""
        self.is_finished = True
        self._body = self._body_buffer = self._read_into = None
        self._head_parser.close()
        del self._handler  # it refers to this object, and is not called any more

    def _parse(self, data: bytes) -> None:
        self.reads += 1
        parts, at = self._parsed_parts, 0
        while at < len(data) and not self.is_finished:
            at = self._parse_head(data, at) if self._body_buffer is None else self._parse_body_in(data, at)
        if at < len(data):
            self._drop(len(data) - at)
        if self._parsed_parts != parts:
            self._unparsed_bytes = 0
            return
        self._unparsed_bytes += len(data)
        if self._unparsed_bytes > self._limits.header_bytes and not self.is_finished:
            self._refuse(self._head_parser.too_large())

    def _parse_head(self, data: bytes, at: int) -> int:
        """Parses bytes of one head, and passes it on if it is complete. Returns where they end."""
        try:
            stop, head = self._head_parser.feed(data, at)
            if head is not None:
                self._parsed_parts += 1
                self._body = body = self._handler.on_request(head)
                self._body_buffer = None if body is None else body.buffer
            return stop
        except RefusedRequest as refused:
            self._refuse(refused)
        except RequestAfterLast:
            self.is_finished = True
        except Exception:
            log.exception("a request's head cannot be processed")
            self.is_finished = True
            self._context.transport.abort()
        return at

    def _parse_body_in(self, data: bytes, at: int) -> int:
        """Parses bytes of a body that were received with its head. Returns where they end."""
        assert self._body_buffer is not None
        try:
            pieces, rest = self._body_buffer.take(memoryview(data)[at:])
        except RefusedRequest as refused:
            self._refuse(refused)
            return at
        self._take(self._body_buffer, pieces)
        return len(data) - len(rest)

    def _parse_body(self, buffer: BodyBuffer, count: int) -> None:
        """Parses `count` bytes that were received into `buffer`; with 0, those that wait there."""
        try:
            pieces, rest = buffer.filled(count)
        except RefusedRequest as refused:
            self._refuse(refused)
            return
        self._take(buffer, pieces)
        if rest:
            self._parse(bytes(rest))

    def _take(self, buffer: BodyBuffer, pieces: list[memoryview]) -> None:
        self._parsed_parts += 1
        body = self._body
        if body is None:
            return
        body.take(pieces)
        if buffer.waiting:
            self._context.flow.pause_reading()
            self._context.worker.loop.call_soon(self._take_waiting, body, buffer)
        elif buffer.is_fragmented and body.held_bytes:
            self._context.flow.pause_reading()
        if buffer.ended:
            self._body = self._body_buffer = None
            body.end()
            self._handler.on_body_end()

    def _take_waiting(self, body: RequestBody, buffer: BodyBuffer) -> None:
        if buffer is self._body_buffer and buffer.waiting and not self.is_finished:
            self._parse_body(buffer, 0)
            if not buffer.waiting and not body.held_bytes:
                self._context.flow.resume_reading()

    def _drop(self, count: int) -> None:
        self.discarded_bytes += count
        if self.discarded_bytes > self._limits.linger_bytes:
            self._context.flow.pause_reading()

    def _refuse(self, refused: RefusedRequest) -> None:
        self.is_finished = True
        self._handler.refuse(refused)
