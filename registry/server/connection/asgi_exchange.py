"""One request and its response: calls the application, and does what ASGI's `receive` and `send` ask for."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Coroutine
from typing import Any

from registry.asgi import AsgiApp, Message
from registry.log_output import mark_logged, was_logged
from registry.server.connection.context import ConnectionContext
from registry.server.connection.file_sender import FileSender, FileTruncated
from registry.server.connection.flow_control import ClientDisconnected
from registry.server.connection.head_parser import RequestHead
from registry.server.connection.request_body import RequestBody
from registry.server.http1.error_responses import error_body, error_headers
from registry.server.http1.response_head import STATUS_LINES, Headers, check_response_headers
from registry.server.server_log import log

_BODYLESS = (204, 304)
_LARGE = 64 * 1024
RESPONSE_SLICE_BYTES = 256 * 1024
"""Bytes of a large body that are written at once. Over TLS they are encrypted at once, and the worker's other
connections wait for that."""


class AsgiExchange:
    """Sends a response as ASGI 2.4 has it, with these choices:

    - `send` raises ClientDisconnected (an OSError) once the client is gone: nobody reads a 40 GiB blob from the disk
      for a client that left.
    - `send` takes files (ASGI's zero-copy extension), which the kernel sends: see
      `registry.server.connection.file_sender`.
    - A response that starts before the request's body was received decides what becomes of the rest of the body.
    - The server's own errors have the shape of the distribution spec.
    - Responses to HEAD, and 204 and 304, may declare a length. HTTP/1.0 clients get no chunks.
    """

    def __init__(self, context: ConnectionContext, head: RequestHead, on_complete: Callable[[], None]) -> None:
        """`on_complete` is called once the response is complete."""
        self.scope = head.scope
        self.keep_alive = head.keep_alive
        """The connection stays open for another request."""
        self.body = RequestBody(context, head.length, expects_continue=head.expects_continue)
        self.response_started = False
        self.response_complete = False
        self.sent_bytes = 0
        self.file_sender: FileSender | None = None
        """Sends a file now."""
        self._context = context
        self._transport = context.transport
        self._flow = context.flow
        self._on_complete = on_complete
        self._is_chunked: bool | None = None
        """None: nothing decided yet, or the response has no body."""
        self._remaining_length = 0
        """Bytes that the declared length still asks for; negative: no length was declared."""
        self._head = b""
        """The response's head, until it is written with the first part of the body."""
        self._has_written = False

    @property
    def moved_bytes(self) -> int:
        """A count that grows with each byte received or sent: the connection's progress."""
        return self.body.received_bytes + self.sent_bytes

    async def run(self, app: AsgiApp) -> None:
        """Calls the application. Logs what it raises, and answers with an error if nothing was sent yet."""
        try:
            await app(self.scope, self.body.receive, self.send)
        except BaseException as error:  # the request's task ends here: nothing above could handle it
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                self._transport.abort()  # the grace period of a shutdown is over
            elif isinstance(error, ClientDisconnected):
                log.debug("%s: the client left", self._request_line())
                self._transport.abort()  # a file sender may notice it before the transport does
            else:
                self._fail("the application failed", error)
        else:
            if not self.response_complete and not self.body.is_disconnected:
                self._fail("the application returned without a complete response", None)

    def disconnect(self) -> None:
        """Tells the application that the client is gone: `receive` returns `http.disconnect`, `send` raises."""
        self.body.disconnect()
        if self.file_sender is not None:
            self.file_sender.end(ClientDisconnected())

    def _fail(self, what: str, error: BaseException | None) -> None:
        no_files = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)
        if no_files:
            log.error("%s: %s", self._request_line(), error)
        elif not was_logged(error):
            log.error("%s: %s", self._request_line(), what, exc_info=error)
        if self.body.is_disconnected or self.response_complete:
            return
        if self._has_written:
            self._transport.abort()  # a body that breaks off is the only way left to tell the client
            return
        if no_files:
            body = self._start_error(503, "the registry has as many files open as it may; try again", "UNAVAILABLE")
        else:
            body = self._start_error(500, "the registry failed; its log says how", "UNKNOWN")
        self._write_part(body, more=False)

    def _start_error(self, status: int, message: str, code: str) -> bytes:
        """Starts an error response in place of one of which nothing was written. Returns its body."""
        body = error_body(message, code=code)
        self._is_chunked = None
        self._remaining_length = 0
        self.keep_alive = False
        self._start(status, error_headers(body) + ([(b"retry-after", b"1")] if status == 503 else []))
        return body

    def _request_line(self) -> str:
        return f"{self.scope['method']} {self.scope['raw_path'].decode('ascii')}"  # as sent: no line breaks in the log

    # What the application sends

    async def send(self, message: Message) -> None:
        """Sends one ASGI message; returns when the connection takes more.

        Raises ClientDisconnected once the client is gone, and RuntimeError for a message that does not fit.
        """
        if self._flow.write_paused and not self.body.is_disconnected:
            await self._flow.drain()
        if self.body.is_disconnected:
            raise ClientDisconnected
        if not self.response_started:
            if message["type"] != "http.response.start":
                raise RuntimeError(f"expected http.response.start, not {message['type']}")
            if self.body.more:
                await self._receive_short_rest()
            self._start(message["status"], list(message.get("headers", [])))
        elif not self.response_complete:
            if self._transport.is_closing():
                # asyncio reports a failed write in a later turn of the loop, which busy senders never let come.
                self.disconnect()
                raise ClientDisconnected
            kind = message["type"]
            if kind == "http.response.body":
                body, more = message.get("body", b""), message.get("more_body", False)
                if len(body) > _LARGE:
                    await self._write_large(body, more=more)
                else:
                    if self._context.unsent.size:
                        self._context.unsent.release_if_taken()
                    self._write_part(body, more=more)
            elif kind == "http.response.zerocopysend":
                await self._write_file(message)
            else:
                raise RuntimeError(f"expected http.response.body, not {kind}")
        else:
            raise RuntimeError(f"{message['type']} after the response was complete")

    async def _receive_short_rest(self) -> None:
        """Receives the rest of a short body before an early response, as servers written in Go do: containerd 1.6 hangs
        if the response comes before it has sent a whole manifest."""
        limits = self._context.worker.limits
        rest = self.body.remaining_bytes
        if rest is None or rest > limits.drain_bytes or self.body.expects_continue:
            return
        try:
            async with asyncio.timeout(limits.linger_seconds):
                while self.body.more:
                    if await self.body.receive_pieces() is None:
                        raise ClientDisconnected
        except TimeoutError:
            self.keep_alive = False  # the rest comes too slowly; the response need not wait for it

    def _start(self, status: int, headers: Headers) -> None:
        self.response_started = True
        if self.body.more:
            self._decide_on_rest()
        lines = [STATUS_LINES[status]]
        closes = False
        check_response_headers(headers)
        for name, value in self._context.worker.state.default_headers + headers:
            lowered = name.lower()
            if lowered == b"content-length":
                self._remaining_length = int(value)
                self._is_chunked = False
            elif lowered == b"transfer-encoding":
                continue  # the framing is decided here
            elif lowered == b"connection":
                closes = b"close" in value.lower()
                self.keep_alive = self.keep_alive and not closes
            lines += (name, b": ", value, b"\r\n")
        if self.scope["method"] == "HEAD" or status in _BODYLESS:
            self._is_chunked = None  # no frames and no bytes: see _write_part
        elif self._is_chunked is None:
            self._is_chunked = self.scope["http_version"] == "1.1"
            if self._is_chunked:
                lines.append(b"transfer-encoding: chunked\r\n")
            else:
                self.keep_alive = False
                self._remaining_length = -1  # the body ends with the connection
        if not self.keep_alive and not closes:
            lines.append(b"connection: close\r\n")
        lines.append(b"\r\n")
        self._head = b"".join(lines)

    def _decide_on_rest(self) -> None:
        """Decides, for a response before the request's end, whether the rest of the body is received to keep the
        connection: only a short one is.

        After `Expect` without a 100 the client may send its body or not, so what comes next could be either.
        """
        rest = self.body.remaining_bytes
        if self.body.expects_continue or rest is None or rest > self._context.worker.limits.drain_bytes:
            self.keep_alive = False
        self.body.expects_continue = False

    # Writing a body from memory

    async def _write_large(self, body: bytes, *, more: bool) -> None:
        if self._head and not more:  # a whole body; the rest is the application's to count
            if not self._context.unsent.hold(min(len(body), RESPONSE_SLICE_BYTES)):
                log.warning("%s: answered 503, since too many answers wait for their clients", self._request_line())
                body = self._start_error(503, "too many answers wait for their clients; try again", "UNAVAILABLE")
        else:  # a stream: one piece at a time, and its sender waits for the client
            self._context.unsent.release()
        if len(body) > RESPONSE_SLICE_BYTES and self._head and not more:
            await self._write_whole(memoryview(body))
        elif self._context.is_tls and len(body) > _LARGE:
            await self._write_slices(memoryview(body), more=more)
        else:
            self._write_part(body, more=more)

    async def _write_whole(self, body: memoryview) -> None:
        """Writes a large response that came in one message."""
        try:
            await self._write_slices(body, more=False, slice_seconds=self._context.worker.limits.slice_seconds)
        finally:
            if not self._context.is_tls:  # all was taken; over TLS the transport may hold the last slice
                self._context.unsent.release()

    async def _write_slices(self, body: memoryview, *, more: bool, slice_seconds: float | None = None) -> None:
        """Writes a large body in slices, so that the application keeps it in memory until the client has taken it.

        `slice_seconds` is how long the client may take for each slice; None, for streams: any time.

        Over TLS all that is written at once is encrypted at once, and kept until the client takes it. A turn of the
        loop for each slice lets other connections work, and lets this one notice that the client is gone: what is
        written after that is dropped silently.
        """
        for start in range(0, len(body), RESPONSE_SLICE_BYTES):
            if self._flow.write_paused:
                await self._cut_off_after(self._flow.drain(), slice_seconds)
            else:
                await asyncio.sleep(0)
            if self.body.is_disconnected:
                raise ClientDisconnected
            self._write_part(body[start : start + RESPONSE_SLICE_BYTES], more=True)
        if not self._context.is_tls:
            await self._cut_off_after(self._flush(), slice_seconds)  # the transport would keep a view of all of it
        if self.body.is_disconnected:
            raise ClientDisconnected
        self._write_part(b"", more=more)

    async def _cut_off_after(self, drained: Coroutine[Any, Any, None], seconds: float | None) -> None:
        """Waits until the client has taken a slice. Cuts it off after `seconds`: each slice holds memory."""
        try:
            async with asyncio.timeout(seconds):
                await drained
        except TimeoutError:
            log.info("%s: cut off, since the client takes its answer too slowly", self._request_line())
            self._transport.abort()
            self.disconnect()
            raise ClientDisconnected from None

    def _write_part(self, body: bytes | memoryview, *, more: bool) -> None:
        if self._is_chunked is None:
            body = b""
        self._count(len(body))
        before, after = self._frame(len(body), more=more)
        if len(body) > _LARGE:  # a copy would cost more than two more writes
            self._write(before)
            self._write(body)
            self._write(after)
        else:
            self._write(b"".join((before, body, after)))
        if not more:
            self._complete()

    # Sending a file

    async def _write_file(self, message: Message) -> None:
        """Sends `count` bytes of an open `file` from `offset` on (ASGI's zero-copy extension).

        Without an offset, from the file's position; without a count, to its end. The application closes the file.
        """
        file = message["file"] if isinstance(message["file"], int) else message["file"].fileno()
        offset, count, more = message.get("offset"), message.get("count"), message.get("more_body", False)
        start = os.lseek(file, 0, os.SEEK_CUR) if offset is None else offset
        if count is None:
            count = max(os.fstat(file).st_size - start, 0)
        self._count(count)
        before, after = self._frame(count, more=more)
        if count == 0 or self._is_chunked is None:
            self._write(before + after)
        else:
            await self._send_file(before, file, start, count)
            self._write(after)
        if offset is None:
            os.lseek(file, start + count, os.SEEK_SET)
        if not more:
            self._complete()

    async def _send_file(self, before: bytes, file: int, start: int, count: int) -> None:
        sock = self._context.sendfile_socket
        if sock is None:
            raise RuntimeError("files cannot be sent on this connection: the extension is not in its scope")
        await self._flush()
        if self._transport.is_closing():
            self.disconnect()
            raise ClientDisconnected
        self.file_sender = FileSender(self._context.worker.loop, sock, file, self._on_sent)
        try:
            await self.file_sender.run(before, start, count)
        except (OSError, FileTruncated) as error:
            if not isinstance(error, ClientDisconnected):
                log.error("%s: a file cannot be sent: %s", self._request_line(), error)
                mark_logged(error)
            raise
        finally:
            self.file_sender = None

    async def _flush(self) -> None:
        """Waits until the transport has passed all that was written to the kernel."""
        if self._transport.is_closing() or not self._transport.get_write_buffer_size():
            return
        self._transport.set_write_buffer_limits(0)
        try:
            await self._flow.drain()
        finally:
            if not self._transport.is_closing():
                self._transport.set_write_buffer_limits()

    def _on_sent(self, count: int) -> None:
        self._has_written = True
        self.sent_bytes += count

    # Framing

    def _count(self, size: int) -> None:
        """Counts bytes of the body. Raises RuntimeError for more than the declared length."""
        self.sent_bytes += 1
        if self._is_chunked is False and self._remaining_length >= 0:
            self._remaining_length -= size
            if self._remaining_length < 0:
                raise RuntimeError("the response is longer than its content-length")

    def _frame(self, size: int, *, more: bool) -> tuple[bytes, bytes]:
        """Returns what goes before and after `size` bytes of the body: the head, and a chunk's frame."""
        head, self._head = self._head, b""
        if not self._is_chunked:
            return head, b""
        before, after = (head + b"%x\r\n" % size, b"\r\n") if size else (head, b"")
        return before, after if more else after + b"0\r\n\r\n"

    def _write(self, data: bytes | memoryview) -> None:
        if data:
            self._has_written = True
            self.sent_bytes += len(data)
            self._transport.write(data)

    def _complete(self) -> None:
        if self._is_chunked is False and self._remaining_length > 0:
            raise RuntimeError("the response is shorter than its content-length")
        self.response_complete = True
        self.body.close()
        self._on_complete()
