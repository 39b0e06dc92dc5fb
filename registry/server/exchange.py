"""One request and its response: what ASGI's `receive` and `send` do, on top of uvicorn's cycle."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from uvicorn._types import ASGI3Application, ASGIReceiveEvent, ASGISendEvent
from uvicorn.protocols.http.httptools_impl import HEADER_RE, HEADER_VALUE_RE, STATUS_LINE, RequestResponseCycle
from uvicorn.protocols.utils import ClientDisconnected

from registry.server.logs import log
from registry.server.refusal import error_body, error_headers

if TYPE_CHECKING:
    from registry.server.protocol import RegistryProtocol

_BODYLESS = (204, 304)


class Exchange(RequestResponseCycle):
    """Differs from uvicorn's cycle in what a registry cannot do without:

    - `send` raises ClientDisconnected (an OSError) once the client is gone, as ASGI 2.4 has it: nobody reads a 40 GiB
      blob from the disk for a client that left;
    - the body is handed over in the pieces it came in, not through one more buffer;
    - a response that starts before the request's body was read decides what becomes of the rest, and says so;
    - errors of ours have the spec's shape; HEAD, 204 and 304 may declare a length; HTTP/1.0 gets no chunks.

    `send` is where a response takes another way to the socket (a file the kernel sends), `take_body` where a body
    comes in; both count in `moved`, which is all the time limits look at.
    """

    def __init__(self, protocol: RegistryProtocol, scope: Any, *, keep_alive: bool, length: int | None) -> None:
        super().__init__(
            scope=scope,
            transport=protocol.transport,
            flow=protocol.flow,
            logger=log,
            access_logger=log,
            access_log=False,
            default_headers=protocol.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=protocol.expect_100_continue and scope["http_version"] == "1.1",
            keep_alive=keep_alive,
            on_response=protocol.on_response_complete,
        )
        self.protocol = protocol
        self.rest = length  # of the body, in bytes, still to come; None where only its end will tell
        self.pieces: list[bytes] = []
        self.held = 0  # bytes in pieces
        self.moved = 0  # bytes of body taken in, and of response given out
        self.receiving = False  # the application waits for the body
        self.sent_headers = False

    async def run_asgi(self, app: ASGI3Application) -> None:
        try:
            await app(self.scope, self.receive, self.send)
        except BaseException as error:
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                self.transport.abort()  # the grace of a shutdown is over
            elif isinstance(error, ClientDisconnected) and self.disconnected:
                log.debug("%s: the client left", self._asked())
            else:
                self._failed("the application failed", error)
        else:
            if not self.response_complete and not self.disconnected:
                self._failed("the application returned without a complete response", None)

    def _failed(self, what: str, error: BaseException | None) -> None:
        log.error("%s: %s", self._asked(), what, exc_info=error)
        if self.disconnected or self.response_complete:
            return
        if self.sent_headers:
            self.transport.abort()  # a body that breaks off is the only way left to tell
            return
        body = error_body("the registry failed; its log says how", code="UNKNOWN")
        self.chunked_encoding = None
        self.keep_alive = False
        self._start(500, error_headers(body))
        self._give(body, more=False)

    def _asked(self) -> str:
        return f"{self.scope['method']} {self.scope['raw_path'].decode('ascii')}"  # as sent: no line breaks in the log

    # Coming in

    def take_body(self, piece: bytes) -> None:
        if self.rest is not None:
            self.rest -= len(piece)
        if self.response_complete or self.disconnected:
            return
        self.moved += len(piece)
        self.held += len(piece)
        self.pieces.append(piece)
        if self.held >= self.protocol.limits.buffer_bytes:
            self.flow.pause_reading()
        self.message_event.set()

    def end_body(self) -> None:
        self.more_body = False
        self.rest = 0
        self.message_event.set()

    def hang_up(self) -> None:
        """Tells the application that the client is gone."""
        self.disconnected = True
        self.message_event.set()

    async def receive(self) -> ASGIReceiveEvent:
        if self.waiting_for_100_continue:
            self.waiting_for_100_continue = False
            if self.more_body and not self.held and not self.transport.is_closing():
                self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if not self.disconnected and not self.response_complete:
            if self.more_body:
                self.flow.resume_reading()
            self.receiving = self.more_body
            try:
                await self.message_event.wait()
            finally:
                self.receiving = False
            self.message_event.clear()
        if self.disconnected or self.response_complete:
            return {"type": "http.disconnect"}
        body = self.pieces[0] if len(self.pieces) == 1 else b"".join(self.pieces)
        self.pieces.clear()
        self.held = 0
        return {"type": "http.request", "body": body, "more_body": self.more_body}

    # Going out

    async def send(self, message: ASGISendEvent) -> None:
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            raise ClientDisconnected
        if not self.response_started:
            if message["type"] != "http.response.start":
                raise RuntimeError(f"expected http.response.start, not {message['type']}")
            self._start(message["status"], list(message.get("headers", [])))
        elif not self.response_complete:
            if message["type"] != "http.response.body":
                raise RuntimeError(f"expected http.response.body, not {message['type']}")
            self._give(message.get("body", b""), more=message.get("more_body", False))
        else:
            raise RuntimeError(f"{message['type']} after the response was complete")

    def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.response_started = True
        self._decide_on_the_rest()
        lines = [STATUS_LINE[status]]
        closes = False
        for name, value in self.protocol.server_state.default_headers + headers:
            if HEADER_RE.search(name) or HEADER_VALUE_RE.search(value):
                raise RuntimeError(f"not a valid header: {name!r}: {value!r}")
            lowered = name.lower()
            if lowered == b"content-length":
                self.expected_content_length = int(value)
                self.chunked_encoding = False
            elif lowered == b"transfer-encoding":
                continue  # framing is decided here
            elif lowered == b"connection":
                closes = b"close" in value.lower()
                self.keep_alive = self.keep_alive and not closes
            lines += (name, b": ", value, b"\r\n")
        if self.scope["method"] == "HEAD" or status in _BODYLESS:
            self.chunked_encoding = None  # neither frames nor bytes: see _give
        elif self.chunked_encoding is None:
            self.chunked_encoding = self.scope["http_version"] == "1.1"
            if self.chunked_encoding:
                lines.append(b"transfer-encoding: chunked\r\n")
            else:
                self.keep_alive = False
                self.expected_content_length = -1  # until the connection closes
        if not self.keep_alive and not closes:
            lines.append(b"connection: close\r\n")
        lines.append(b"\r\n")
        self.sent_headers = True
        self.transport.write(b"".join(lines))

    def _decide_on_the_rest(self) -> None:
        """An answer before the request's end: a short rest is worth a connection, any other is not.

        After `Expect` without a 100 the client may or may not send its body, so what comes next could be either.
        """
        if not self.more_body:
            return
        if self.waiting_for_100_continue or self.rest is None or self.rest > self.protocol.limits.drain_bytes:
            self.keep_alive = False
        self.waiting_for_100_continue = False

    def _give(self, body: bytes, *, more: bool) -> None:
        self.moved += len(body) + 1
        if self.chunked_encoding:
            frames = [b"%x\r\n" % len(body), body, b"\r\n"] if body else []
            if not more:
                frames.append(b"0\r\n\r\n")
            self.transport.write(b"".join(frames))
        elif self.chunked_encoding is False:
            if self.expected_content_length >= 0:
                self.expected_content_length -= len(body)
                if self.expected_content_length < 0:
                    raise RuntimeError("the response is longer than its content-length")
            self.transport.write(body)
            if not more and self.expected_content_length > 0:
                raise RuntimeError("the response is shorter than its content-length")
        if not more:
            self.response_complete = True
            self.message_event.set()
            self.on_response()
