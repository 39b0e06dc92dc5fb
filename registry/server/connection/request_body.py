"""The body of one request, on its way from the connection to the application."""

from __future__ import annotations

import asyncio
from typing import Any

from registry.asgi import Message
from registry.server.connection.context import ConnectionContext
from registry.server.connection.receive_buffers import MIN_BUFFER_BYTES, BodyBuffer
from registry.server.http1.body_framing import ChunkedFraming, LengthFraming

_MAX_PIECES = 512
"""The most pieces that are kept as they are; more are joined. A view of one byte takes a hundred bytes of memory."""


class RequestBody:
    """Receives a body from the connection, which calls `take` and `end`, for the application, which awaits `receive`.

    Pauses reading while the application is too slow.
    """

    __slots__ = (
        "_context",
        "_event",
        "_pieces",
        "buffer",
        "expects_continue",
        "held_bytes",
        "is_awaited",
        "is_closed",
        "is_disconnected",
        "more",
        "received_bytes",
        "remaining_bytes",
    )

    def __init__(self, context: ConnectionContext, length: int | None, *, expects_continue: bool) -> None:
        """`length` is in bytes; None for a chunked body."""
        self._context = context
        self._event = asyncio.Event()
        self.is_closed = False
        """The application receives nothing more: the response is complete, or the client is gone."""
        self._pieces: list[memoryview] = []
        self.buffer: BodyBuffer | None = None
        """What the body is received into, until it has ended or the client is gone."""
        if length != 0:
            worker = context.worker
            framing = ChunkedFraming(worker.limits.header_bytes) if length is None else LengthFraming(length)
            self.buffer = BodyBuffer(framing, worker.incoming_bodies)
        self.expects_continue = expects_continue
        """The client waits for a 100 (Continue) before it sends the body."""
        self.held_bytes = 0
        """Bytes received that the application has not taken yet."""
        self.is_awaited = False
        """The application waits for the body."""
        self.is_disconnected = False
        """The client is gone."""
        self.more = length != 0
        """Not all of the body was received."""
        self.received_bytes = 0
        self.remaining_bytes = length
        """Bytes not received yet; None: only the body's end will tell."""
        if not self.more:
            self._event.set()

    def take(self, pieces: list[memoryview]) -> None:
        """Adds received parts of the body."""
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
        most = MIN_BUFFER_BYTES if worker.incoming_bodies.has_many else worker.limits.buffer_bytes
        if self.held_bytes >= most:
            self._context.flow.pause_reading()
        self._event.set()

    def end(self) -> None:
        """Marks the body as received to its end."""
        self.more = False
        self.remaining_bytes = 0
        self.buffer = None
        self._event.set()

    def close(self) -> None:
        """Ends `receive` since the response is complete: what still comes of the body is dropped."""
        self.is_closed = True
        self._pieces = []
        self.held_bytes = 0
        self._event.set()

    def disconnect(self) -> None:
        """Tells the application that the client is gone."""
        self.is_disconnected = True
        self.buffer = None
        self.close()

    def extension(self) -> dict[str, Any]:
        """Returns what the application finds in its scope under `BODY_EXTENSION`."""
        return {
            "receive": self.receive_pieces,
            "take_whole": self.take_whole,
            "left": lambda: self.is_disconnected,
        }

    async def receive(self) -> Message:
        """Returns the next ASGI message: `http.request`, or `http.disconnect`."""
        received = await self.receive_pieces()
        if received is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": b"".join(received[0]), "more_body": received[1]}

    async def receive_pieces(self) -> tuple[list[memoryview], bool] | None:
        """Returns what `receive` returns, without copying it: the received parts of the body and whether there is more;
        None once the client has disconnected or the response is complete.

        The application finds it in `scope["extensions"]`. The memory is never written again.
        """
        if self.expects_continue:
            self.expects_continue = False
            transport = self._context.transport
            if self.more and not self.held_bytes and not transport.is_closing():
                transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if not self.is_closed:
            if self.more and (self.buffer is None or not self.buffer.waiting):
                self._context.flow.resume_reading()
            self.is_awaited = self.more
            try:
                await self._event.wait()
            finally:
                self.is_awaited = False
            self._event.clear()
        if self.is_closed:
            return None
        return self._take_pieces(), self.more

    def take_whole(self) -> list[memoryview] | None:
        """Returns the whole body, as `receive_pieces` would, if it was received to its end and nothing of it was taken;
        otherwise takes nothing and returns None. Never waits."""
        if self.more or self.is_closed or not self._event.is_set():
            return None
        self.expects_continue = False
        self._event.clear()
        return self._take_pieces()

    def _take_pieces(self) -> list[memoryview]:
        pieces, self._pieces = self._pieces, []
        self.held_bytes = 0
        return pieces
