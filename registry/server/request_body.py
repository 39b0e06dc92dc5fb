"""The body of a request, from the connection to the application: the part of an exchange that receives."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uvicorn._types import ASGIReceiveEvent
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
from uvicorn.protocols.utils import ClientDisconnected

from registry.server.receiving import LEAST
from registry.server.sending import FileSending

if TYPE_CHECKING:
    from registry.server.protocol import RegistryProtocol

_CRUMBS = 512
"""Pieces that are kept as they are. A view of one byte takes a hundred bytes of memory."""


class RequestBody(RequestResponseCycle):
    """The connection calls `take_body` and `end_body`; the application awaits `receive`."""

    protocol: RegistryProtocol
    rest: int | None
    """Bytes of the body that are still to come. None: only its end will tell."""
    pieces: list[memoryview]
    """Bytes that the application has not taken yet."""
    held: int = 0
    """Bytes in `pieces`."""
    moved: int = 0
    """Bytes of the body that were received, and of the response that were sent."""
    receiving: bool = False
    """The application waits for the body."""
    sending: FileSending | None = None

    @property
    def extension(self) -> dict[object, object]:
        """What the application finds in `scope["extensions"]` of a request that has a body."""
        return {"receive": self.receive_pieces, "take_whole": self.take_whole, "left": self.left}

    def take_body(self, pieces: list[memoryview]) -> None:
        size = sum(map(len, pieces))
        if self.rest is not None:
            self.rest -= size
        if self.response_complete or self.disconnected or not size:
            return
        self.moved += size
        self.held += size
        self.pieces += pieces
        if len(self.pieces) > _CRUMBS:
            self.pieces = [memoryview(b"".join(self.pieces))]
        most = LEAST if self.protocol.receiving.crowded else self.protocol.limits.buffer_bytes
        if self.held >= most:
            self.flow.pause_reading()
        self.message_event.set()

    def end_body(self) -> None:
        self.more_body = False
        self.rest = 0
        self.message_event.set()

    def left(self) -> bool:
        """Whether the client is known to be gone."""
        return self.disconnected

    def hang_up(self) -> None:
        """Tells the application that the client is gone."""
        self.disconnected = True
        self.message_event.set()
        if self.sending is not None:
            self.sending.end(ClientDisconnected())

    async def receive(self) -> ASGIReceiveEvent:
        came = await self.receive_pieces()
        if came is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": b"".join(came[0]), "more_body": came[1]}

    async def receive_pieces(self) -> tuple[list[memoryview], bool] | None:
        """`receive` without a copy: what has come of the body, and whether there is more; None is the disconnect.

        Nobody writes to this memory again: it stays as it is for as long as a view of it is held.
        """
        if self.waiting_for_100_continue:
            self.waiting_for_100_continue = False
            if self.more_body and not self.held and not self.transport.is_closing():
                self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if not self.disconnected and not self.response_complete:
            body = self.protocol.body
            if self.more_body and (body is None or not body.waiting):
                self.flow.resume_reading()
            self.receiving = self.more_body
            try:
                await self.message_event.wait()
            finally:
                self.receiving = False
            self.message_event.clear()
        if self.disconnected or self.response_complete:
            return None
        return self._take_pieces(), self.more_body

    def take_whole(self) -> list[memoryview] | None:
        """Takes the whole body, as `receive_pieces` would, if all of it has come already; else takes nothing and
        returns None. Never waits."""
        if self.more_body or self.disconnected or self.response_complete or not self.message_event.is_set():
            return None
        self.waiting_for_100_continue = False
        self.message_event.clear()
        return self._take_pieces()

    def _take_pieces(self) -> list[memoryview]:
        pieces, self.pieces = self.pieces, []
        self.held = 0
        return pieces
