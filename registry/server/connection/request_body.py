"""Passes the body of one request from the connection to the application."""

from __future__ import annotations

import asyncio
from typing import Any

from registry.asgi import Message
from registry.server.connection.context import ConnectionContext
from registry.server.connection.flow_control import ClientDisconnected
from registry.server.connection.receive_buffers import MIN_BUFFER_BYTES, BodyBuffer
from registry.server.http1.body_framing import ChunkedFraming, LengthFraming

_MAX_PIECES = 512
"""Largest number of pieces that wait for the application. If there are more, they are joined into one piece. Each piece
is a memory view, which takes about a hundred bytes of memory in addition to its content."""


class RequestBody:
    """The body of one request. The request reader receives the body into `buffer`, passes the received pieces to
    `add_pieces`, and calls `finish` at the body's end. The application gets the pieces from `receive`.

    While too many received bytes are waiting for the application, no more bytes are read from the client.
    """

    __slots__ = (
        "_change_event",
        "_context",
        "_is_changed",
        "_pieces",
        "buffer",
        "expects_continue",
        "has_more",
        "held_bytes",
        "is_awaited",
        "is_closed",
        "is_disconnected",
        "received_bytes",
        "remaining_bytes",
    )

    def __init__(self, context: ConnectionContext, length: int | None, *, expects_continue: bool) -> None:
        """`length` is the size of the body in bytes; None for a chunked body. `expects_continue` says that the client
        waits for a 100 (Continue) response before it sends the body."""
        self._context = context
        self._is_changed = length == 0
        """Whether the body has changed since the application last took pieces: further pieces or the body's end have
        been received, or the body has been closed. If so, the next call of `receive` returns without waiting."""
        self._change_event: asyncio.Event | None = None
        """Set while `_is_changed` is True. None until `receive` has to wait for the first time."""
        self.is_closed = False
        """Whether the response is complete or the client has disconnected. The application then receives nothing
        more."""
        self._pieces: list[memoryview] = []
        """Received pieces that the application has not got yet."""
        self.buffer: BodyBuffer | None = None
        """The memory into which the body is received. None if the body is empty or complete, or if the client has
        disconnected."""
        if length != 0:
            worker = context.worker
            framing = ChunkedFraming(worker.limits.head_bytes) if length is None else LengthFraming(length)
            self.buffer = BodyBuffer(framing, worker.incoming_bodies)
        self.expects_continue = expects_continue
        """Whether the client still waits for a 100 (Continue) response. Becomes False when the server sends this
        response, or need not send it any more."""
        self.held_bytes = 0
        """Size, in bytes, of the pieces that the application has not got yet."""
        self.is_awaited = False
        """Whether the application is waiting in `receive` for further bytes or the body's end."""
        self.is_disconnected = False
        """Whether the client has disconnected."""
        self.has_more = length != 0
        """Whether the body's end has not been received yet."""
        self.received_bytes = 0
        """Number of bytes received so far, without those received after `close`."""
        self.remaining_bytes = length
        """Number of bytes that were not received yet; None for a chunked body, whose length is unknown."""

    @property
    def can_discard_remainder(self) -> bool:
        """Whether the server can receive and discard the rest of the body, and then use the connection for the next
        request. False in these cases:

        - The rest has more than `drain_bytes` bytes, or an unknown length (a chunked body).
        - The client still waits for a 100 response. It may send the body without this response, or leave the body out.
          So the server cannot tell whether the next bytes are the body or the next request.
        """
        remaining = self.remaining_bytes
        max_bytes = self._context.worker.limits.drain_bytes
        return not self.expects_continue and remaining is not None and remaining <= max_bytes

    def add_pieces(self, pieces: list[memoryview]) -> None:
        """Adds received pieces of the body, or discards them if the body is closed. Pauses reading from the client if
        too many bytes are waiting for the application."""
        size = sum(map(len, pieces))
        if self.remaining_bytes is not None:
            self.remaining_bytes -= size
        if self.is_closed or not size:
            return
        self.received_bytes += size
        self.held_bytes += size
        self._pieces += pieces
        if len(self._pieces) > _MAX_PIECES:
            self._pieces = [memoryview(b"".join(self._pieces))]
        worker = self._context.worker
        must_be_small = worker.incoming_bodies.requires_small_buffers
        max_held_bytes = MIN_BUFFER_BYTES if must_be_small else worker.limits.buffer_bytes
        if self.held_bytes >= max_held_bytes:
            self._context.flow.pause_reading()
        self._set_changed()

    def finish(self) -> None:
        """Called when the whole body has been received. Resumes reading from the socket, because the server does not
        notice a disconnect while reading is paused."""
        self.has_more = False
        self.remaining_bytes = 0
        self.buffer = None
        self._context.flow.resume_reading()
        self._set_changed()

    def close(self) -> None:
        """Called when the response is complete. After this call, `receive` returns `http.disconnect`, and received
        pieces are discarded."""
        self.is_closed = True
        self._pieces = []
        self.held_bytes = 0
        self._set_changed()

    def disconnect(self) -> None:
        """Called when the client has disconnected. After this call, `receive` returns `http.disconnect`."""
        self.is_disconnected = True
        self.buffer = None
        self.close()

    def extension(self) -> dict[str, Any]:
        """Returns the value for the key `BODY_EXTENSION` of the extensions in the ASGI scope: a dict of
        functions. With these functions, the application receives the body without a copy."""
        return {
            "receive": self.receive_pieces,
            "take_whole": self.take_whole,
            "is_disconnected": lambda: self.is_disconnected,
        }

    async def receive(self) -> Message:
        """Waits for further pieces of the body or for its end. Returns an ASGI message: `http.request` with the bytes
        of the pieces, or `http.disconnect` if the client has disconnected or the response is complete."""
        received = await self.receive_pieces()
        if received is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": b"".join(received[0]), "more_body": received[1]}

    async def receive_pieces(self) -> tuple[list[memoryview], bool] | None:
        """Waits for further pieces of the body or for its end. Returns the pieces, without copying them, and whether
        more of the body follows. Returns None if the client has disconnected or the response is complete.

        The application may keep the pieces: their memory is never written again.
        """
        if self.expects_continue:
            self.expects_continue = False
            transport = self._context.transport
            # A client that has sent bytes of the body does not wait for a 100 response.
            if self.has_more and not self.held_bytes and not transport.is_closing():
                transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if not self.is_closed:
            # If the buffer has unparsed bytes, reading is not resumed here: the request reader first parses these bytes
            # and then resumes reading.
            if self.has_more and (self.buffer is None or not self.buffer.has_unparsed):
                self._context.flow.resume_reading()
            self.is_awaited = self.has_more
            try:
                await self._wait_for_change()
            finally:
                self.is_awaited = False
            self._clear_change()
        if self.is_closed:
            return None
        return self._take_pieces(), self.has_more

    def take_whole(self) -> list[memoryview] | None:
        """Returns the pieces of the whole body without waiting. Must not be called after `receive` has returned pieces.
        Returns None and changes nothing in these cases:

        - The body's end has not been received yet.
        - The body is closed.
        - The application has taken the whole body before."""
        if self.has_more or self.is_closed or not self._is_changed:
            return None
        self.expects_continue = False
        self._clear_change()
        return self._take_pieces()

    async def discard_remainder(self) -> bool:
        """Called before a response starts. Receives and discards the rest of the body. Returns False if the rest does
        not arrive within `linger_seconds`, otherwise True. If `can_discard_remainder` is False, does nothing and
        returns True. Raises ClientDisconnected.

        The client containerd 1.6 needs this: it hangs if it gets a response before it has sent the whole body.
        """
        if not self.can_discard_remainder:
            return True
        try:
            async with asyncio.timeout(self._context.worker.limits.linger_seconds):
                while self.has_more:
                    if await self.receive_pieces() is None:
                        raise ClientDisconnected
        except TimeoutError:
            return False
        return True

    def _set_changed(self) -> None:
        self._is_changed = True
        if self._change_event is not None:
            self._change_event.set()

    def _clear_change(self) -> None:
        self._is_changed = False
        if self._change_event is not None:
            self._change_event.clear()

    async def _wait_for_change(self) -> None:
        if not self._is_changed:
            if self._change_event is None:
                self._change_event = asyncio.Event()
            await self._change_event.wait()

    def _take_pieces(self) -> list[memoryview]:
        pieces, self._pieces = self._pieces, []
        self.held_bytes = 0
        return pieces
