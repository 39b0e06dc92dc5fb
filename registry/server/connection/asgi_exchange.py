"""One request and its response: what ASGI's `receive` and `send` do, on top of uvicorn's cycle."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, cast

from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import STATUS_LINE
from uvicorn.protocols.utils import ClientDisconnected

from registry.log_output import mark_logged, was_logged
from registry.server.connection.file_sender import FileSender, FileTruncated
from registry.server.connection.request_body import RequestBody
from registry.server.connection.timeouts import make_room_for_response
from registry.server.http1.error_responses import error_body, error_headers
from registry.server.http1.request_head import check_response_headers
from registry.server.server_log import log

if TYPE_CHECKING:
    from registry.server.connection.protocol import RegistryProtocol

_BODYLESS = (204, 304)
_LARGE = 64 * 1024
RESPONSE_SLICE_BYTES = 256 * 1024
"""Bytes of a large body that are written at once. They may be encrypted: so long the other connections wait for each
that sends."""


class AsgiExchange(RequestBody):
    """Differs from uvicorn's cycle in what a registry cannot do without:

    - `send` raises ClientDisconnected (an OSError) once the client is gone, as ASGI 2.4 has it: nobody reads a 40 GiB
      blob from the disk for a client that left;
    - the body is handed over in the memory it was received into, to whoever asks for it that way;
    - a response that starts before the request's body was read decides what becomes of the rest, and says so;
    - errors of ours have the spec's shape; HEAD, 204 and 304 may declare a length; HTTP/1.0 gets no chunks.

    `send` takes files too (ASGI's zero-copy extension), which the kernel sends: see
    `registry.server.connection.file_sender`. It and `take_body` count in `moved`, which is all the time limits look at.
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
        self.rest = length
        self.pieces = []
        self.sent_headers = False
        self._head = b""  # of the response, until its first body message

    async def run_asgi(self, app: ASGI3Application) -> None:
        try:
            await app(self.scope, self.receive, self.send)
        except BaseException as error:  # the request's task ends here: nobody above could act on it
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                self.transport.abort()  # the grace of a shutdown is over
            elif isinstance(error, ClientDisconnected):
                log.debug("%s: the client left", self._asked())
                self.transport.abort()  # who sends a file may learn of it before the transport does
            else:
                self._failed("the application failed", error)
        else:
            if not self.response_complete and not self.disconnected:
                self._failed("the application returned without a complete response", None)

    def _failed(self, what: str, error: BaseException | None) -> None:
        no_files = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)
        if no_files:
            log.error("%s: %s", self._asked(), error)
        elif not was_logged(error):
            log.error("%s: %s", self._asked(), what, exc_info=error)
        if self.disconnected or self.response_complete:
            return
        if self.sent_headers:
            self.transport.abort()  # a body that breaks off is the only way left to tell
            return
        if no_files:
            body = self._start_error(503, "the registry has as many files open as it may; try again", "UNAVAILABLE")
        else:
            body = self._start_error(500, "the registry failed; its log says how", "UNKNOWN")
        self._write_part(body, more=False)

    def _start_error(self, status: int, message: str, code: str) -> bytes:
        """Starts an answer of ours in place of one of which nothing was sent; its body."""
        body = error_body(message, code=code)
        self.chunked_encoding = None
        self.expected_content_length = 0
        self.keep_alive = False
        self._start(status, error_headers(body) + ([(b"retry-after", b"1")] if status == 503 else []))
        return body

    def _within_memory(self, body: bytes, *, more: bool) -> bytes:
        """The body to be sent: another one in place of a large whole body, where too many wait for their clients."""
        protocol = self.protocol
        if len(body) <= _LARGE:
            if protocol.held_unsent_bytes and not self.transport.get_write_buffer_size():
                protocol.held_unsent_bytes = 0
            return body
        if more or not self._head:  # it streams: a piece at a time, and whoever sends it waits for the client
            protocol.held_unsent_bytes = 0
            return body
        held = min(
            len(body), RESPONSE_SLICE_BYTES
        )  # the rest is the application's to count: it may give the same to many
        connections = cast("set[RegistryProtocol]", protocol.connections)
        if not make_room_for_response(connections, held, protocol.limits.unsent_bytes, protocol.loop.time()):
            log.warning("%s: answered 503, since too many answers wait for their clients", self._asked())
            return self._start_error(503, "too many answers wait for their clients; try again", "UNAVAILABLE")
        protocol.held_unsent_bytes = held
        return body

    def _asked(self) -> str:
        return f"{self.scope['method']} {self.scope['raw_path'].decode('ascii')}"  # as sent: no line breaks in the log

    # Going out

    async def send(self, message: Any) -> None:
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            raise ClientDisconnected
        if not self.response_started:
            if message["type"] != "http.response.start":
                raise RuntimeError(f"expected http.response.start, not {message['type']}")
            if self.more_body:
                await self._pass_over_a_short_rest()
            self._start(message["status"], list(message.get("headers", [])))
        elif not self.response_complete:
            if self.transport.is_closing():
                # A write that failed is told in a later turn of the loop, which who sends on never lets come.
                self.hang_up()
                raise ClientDisconnected
            kind = message["type"]
            if kind == "http.response.body":
                body, more = message.get("body", b""), message.get("more_body", False)
                body = self._within_memory(body, more=more)
                whole = bool(self._head) and not more
                if len(body) > RESPONSE_SLICE_BYTES and whole:
                    await self._write_whole(memoryview(body))
                elif self.protocol.secret and len(body) > _LARGE:
                    await self._write_slices(memoryview(body), more=more)
                else:
                    self._write_part(body, more=more)
            elif kind == "http.response.zerocopysend":
                await self._write_file(message)
            else:
                raise RuntimeError(f"expected http.response.body, not {kind}")
        else:
            raise RuntimeError(f"{message['type']} after the response was complete")

    async def _pass_over_a_short_rest(self) -> None:
        """What is short, announced, and comes without being asked for is taken in before an early answer, as servers
        written in Go do it: containerd 1.6 waits for ever where the answer comes before it has sent a manifest."""
        short = self.rest is not None and self.rest <= self.protocol.limits.drain_bytes
        if not short or self.waiting_for_100_continue:
            return
        try:
            async with asyncio.timeout(self.protocol.limits.linger_seconds):
                while self.more_body:
                    if await self.receive_pieces() is None:
                        raise ClientDisconnected
        except TimeoutError:
            self.keep_alive = False  # it drips; the answer need not wait for that

    def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.response_started = True
        self._decide_on_the_rest()
        lines = [STATUS_LINE[status]]
        closes = False
        check_response_headers(headers)
        for name, value in self.protocol.server_state.default_headers + headers:
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
        self._head = b"".join(lines)

    def _decide_on_the_rest(self) -> None:
        """An answer before the request's end: a short rest is worth a connection, any other is not.

        After `Expect` without a 100 the client may or may not send its body, so what comes next could be either.
        """
        if not self.more_body:
            return
        if self.waiting_for_100_continue or self.rest is None or self.rest > self.protocol.limits.drain_bytes:
            self.keep_alive = False
        self.waiting_for_100_continue = False

    async def _write_whole(self, body: memoryview) -> None:
        """All of a body that is held in memory for it."""
        try:
            await self._write_slices(body, more=False, within=self.protocol.limits.slice_seconds)
        finally:
            if not self.protocol.secret:  # where nothing is left to be taken; TLS may keep the last slice
                self.protocol.held_unsent_bytes = 0

    async def _write_slices(self, body: memoryview, *, more: bool, within: float | None = None) -> None:
        """A large body, slice by slice, so that whoever holds it for us does so until the client has taken it. `within`
        so many seconds it has to take each: of an answer that is whole in memory, other than of a blob that streams.

        Over TLS all that is written at once is encrypted at once, and kept until the client takes it. A turn of the
        loop for each slice lets others have theirs, and this connection learn that the client is gone: what is written
        then is dropped without a word."""
        for start in range(0, len(body), RESPONSE_SLICE_BYTES):
            if self.flow.write_paused:
                await self._taken(self.flow.drain(), within)
            else:
                await asyncio.sleep(0)
            if self.disconnected:
                raise ClientDisconnected
            self._write_part(body[start : start + RESPONSE_SLICE_BYTES], more=True)
        if not self.protocol.secret:
            await self._taken(self._flush(), within)  # the transport would keep a view of all of it
        if self.disconnected:
            raise ClientDisconnected
        self._write_part(b"", more=more)

    async def _taken(self, drained: Coroutine[Any, Any, None], within: float | None) -> None:
        """Waits until the client has taken a slice. One that takes too long is cut off: each holds memory of ours."""
        try:
            async with asyncio.timeout(within):
                await drained
        except TimeoutError:
            log.info("%s: cut off, since the client takes its answer too slowly", self._asked())
            self.transport.abort()
            self.hang_up()
            raise ClientDisconnected from None

    def _write_part(self, body: bytes | memoryview, *, more: bool) -> None:
        if self.chunked_encoding is None:
            body = b""
        self._count(len(body))
        before, after = self._frame(len(body), more=more)
        if len(body) > _LARGE:  # not worth a copy
            self._write(before)
            self._write(body)
            self._write(after)
        else:
            self._write(b"".join((before, body, after)))
        self._go_on(more=more)

    async def _write_file(self, message: Any) -> None:
        """ASGI's zero-copy extension: `count` bytes of an open `file` from `offset` on, which the kernel sends.

        Without an offset from where the file stands, without a count to its end. The application closes the file."""
        file = message["file"] if isinstance(message["file"], int) else message["file"].fileno()
        offset, count, more = message.get("offset"), message.get("count"), message.get("more_body", False)
        start = os.lseek(file, 0, os.SEEK_CUR) if offset is None else offset
        if count is None:
            count = max(os.fstat(file).st_size - start, 0)
        self._count(count)
        before, after = self._frame(count, more=more)
        if count == 0 or self.chunked_encoding is None:
            self._write(before + after)
        else:
            await self._send_file(before, file, start, count)
            self._write(after)
        if offset is None:
            os.lseek(file, start + count, os.SEEK_SET)
        self._go_on(more=more)

    async def _send_file(self, before: bytes, file: int, start: int, count: int) -> None:
        if self.protocol.socket is None:
            raise RuntimeError("files cannot be sent on this connection: the extension is not in its scope")
        await self._flush()
        if self.transport.is_closing():
            self.hang_up()
            raise ClientDisconnected
        self.sending = FileSender(self.protocol.loop, self.protocol.socket, file, self._progress)
        try:
            await self.sending.run(before, start, count)
        except (OSError, FileTruncated) as error:
            if not isinstance(error, ClientDisconnected):
                log.error("%s: a file cannot be sent: %s", self._asked(), error)
                mark_logged(error)
            raise
        finally:
            self.sending = None

    async def _flush(self) -> None:
        """Waits until the transport has handed all it was given to the kernel."""
        if self.transport.is_closing() or not self.transport.get_write_buffer_size():
            return
        self.transport.set_write_buffer_limits(0)
        try:
            await self.flow.drain()
        finally:
            if not self.transport.is_closing():
                self.transport.set_write_buffer_limits()

    def _progress(self, count: int) -> None:
        self.sent_headers = True
        self.moved += count

    def _count(self, size: int) -> None:
        """Raises RuntimeError for more than the declared length."""
        self.moved += 1
        if self.chunked_encoding is False and self.expected_content_length >= 0:
            self.expected_content_length -= size
            if self.expected_content_length < 0:
                raise RuntimeError("the response is longer than its content-length")

    def _frame(self, size: int, *, more: bool) -> tuple[bytes, bytes]:
        """What goes before and after that much of the body: the head with the first of it, a chunk's frame."""
        head, self._head = self._head, b""
        if not self.chunked_encoding:
            return head, b""
        before, after = (head + b"%x\r\n" % size, b"\r\n") if size else (head, b"")
        return before, after if more else after + b"0\r\n\r\n"

    def _write(self, data: bytes | memoryview) -> None:
        if data:
            self.sent_headers = True
            self.moved += len(data)
            self.transport.write(data)

    def _go_on(self, *, more: bool) -> None:
        if more:
            return
        if self.chunked_encoding is False and self.expected_content_length > 0:
            raise RuntimeError("the response is shorter than its content-length")
        self.response_complete = True
        self.message_event.set()
        self.on_response()
