"""One request and its response: calls the ASGI application, and writes what the application sends to the connection."""

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

_BODYLESS_STATUSES = (204, 304)
_LARGE_BYTES = 64 * 1024
"""A body, or a part of one, with more bytes than this is large."""
RESPONSE_SLICE_BYTES = 256 * 1024
"""How many bytes of a large body are passed to the transport at once. Over TLS the transport encrypts them immediately,
and the worker's other connections wait meanwhile."""


class AsgiExchange:
    """Calls the application for one request, and sends the response according to ASGI 2.4. In particular:

    - `send` raises ClientDisconnected (an OSError) once the client has disconnected. So the application stops reading a
      blob of 40 GiB when nobody receives it.
    - `send` accepts files (ASGI's zero-copy extension), which the kernel sends.
    - The response may start before the request's body was received completely. A short rest of the body is then
      received and discarded. With a longer rest the connection ends after the response.
    - If the application fails, the response has the error format of the distribution spec.
    - A response to HEAD, and a response with status 204 or 304, may declare a length without having a body.
    - HTTP/1.0 clients get no chunked responses.
    """

    def __init__(self, context: ConnectionContext, head: RequestHead, on_complete: Callable[[], None]) -> None:
        """`on_complete` is called when the response is complete."""
        self.scope = head.scope
        self.keep_alive = head.keep_alive
        """The connection stays open after the response."""
        self.body = RequestBody(context, head.body_length, expects_continue=head.expects_continue)
        self.response_started = False
        self.response_complete = False
        self.sent_bytes = 0
        self.file_sender: FileSender | None = None
        """Sends a file at the moment; None: no file is being sent."""
        self._context = context
        self._transport = context.transport
        self._flow = context.flow
        self._on_complete = on_complete
        self._is_chunked: bool | None = None
        """The response is chunked (True) or not (False). None: this is not decided yet, or the response has no body."""
        self._remaining_length = 0
        """Bytes of the declared length that the application has not sent yet; negative if no length was declared."""
        self._unsent_head = b""
        """The response's head until it is written, which happens together with the first part of the body."""
        self._has_written = False
        """Some of the response was passed to the transport or the kernel."""

    @property
    def progress_count(self) -> int:
        """A number that grows with each byte received or sent. Used to detect a connection without progress."""
        return self.body.received_bytes + self.sent_bytes

    async def run(self, app: AsgiApp) -> None:
        """Calls the application. If it fails, logs the exception, and sends an error response if nothing of a response
        was sent yet. Raises nothing."""
        try:
            await app(self.scope, self.body.receive, self.send)
        except BaseException as error:  # all exceptions, because the task of the request ends here
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                self._transport.abort()  # the worker cancels requests that outlast the grace period of a shutdown
            elif isinstance(error, ClientDisconnected):
                log.debug("%s: the client has disconnected", self._request_line())
                self._transport.abort()  # needed because a file sender may notice this before the transport does
            else:
                self._fail("the application failed", error)
        else:
            if not self.response_complete and not self.body.is_disconnected:
                self._fail("the application returned without a complete response", None)

    def disconnect(self) -> None:
        """Tells the application that the client has disconnected: `receive` returns `http.disconnect`, `send` raises
        ClientDisconnected."""
        self.body.disconnect()
        if self.file_sender is not None:
            self.file_sender.end(ClientDisconnected())

    def _fail(self, problem: str, error: BaseException | None) -> None:
        """Logs the problem. Sends an error response, or aborts the connection if a part of a response was sent."""
        is_out_of_files = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)
        if is_out_of_files:
            log.error("%s: %s", self._request_line(), error)
        elif not was_logged(error):
            log.error("%s: %s", self._request_line(), problem, exc_info=error)
        if self.body.is_disconnected or self.response_complete:
            return
        if self._has_written:
            self._transport.abort()  # the client can only learn of the failure from an incomplete body
            return
        if is_out_of_files:
            body = self._start_error(503, "the registry has as many files open as it may; try again", "UNAVAILABLE")
        else:
            body = self._start_error(500, "the registry failed; its log says how", "UNKNOWN")
        self._write_part(body, more=False)

    def _start_error(self, status: int, message: str, code: str) -> bytes:
        """Starts an error response, which replaces a response of which nothing was written yet. Returns the body of the
        error response, which the caller has to write."""
        body = error_body(message, code=code)
        self._is_chunked = None
        self._remaining_length = 0
        self.keep_alive = False
        self._start(status, error_headers(body) + ([(b"retry-after", b"1")] if status == 503 else []))
        return body

    def _request_line(self) -> str:
        return f"{self.scope['method']} {self.scope['raw_path'].decode('ascii')}"  # still encoded: no line breaks

    # Messages of the application

    async def send(self, message: Message) -> None:
        """Sends one ASGI message. Waits while the client receives too slowly.

        Raises ClientDisconnected once the client has disconnected. Raises RuntimeError for a message that is not
        allowed at this point, for invalid headers, and for a body whose length differs from the declared one.
        """
        if self._flow.write_paused and not self.body.is_disconnected:
            await self._flow.drain()
        if self.body.is_disconnected:
            raise ClientDisconnected
        if not self.response_started:
            if message["type"] != "http.response.start":
                raise RuntimeError(f"expected http.response.start, not {message['type']}")
            if self.body.has_more:
                await self._discard_short_rest()
            self._start(message["status"], list(message.get("headers", [])))
        elif not self.response_complete:
            if self._transport.is_closing():
                # asyncio reports a failed write in a later iteration of the event loop. A sender that never waits would
                # not learn of it, so it is checked here.
                self.disconnect()
                raise ClientDisconnected
            kind = message["type"]
            if kind == "http.response.body":
                body, more = message.get("body", b""), message.get("more_body", False)
                if len(body) > _LARGE_BYTES:
                    await self._write_large(body, more=more)
                else:
                    if self._context.unsent.reserved_bytes:
                        self._context.unsent.release_if_sent()
                    self._write_part(body, more=more)
            elif kind == "http.response.zerocopysend":
                await self._write_file(message)
            else:
                raise RuntimeError(f"expected http.response.body, not {kind}")
        else:
            raise RuntimeError(f"{message['type']} after the response was complete")

    async def _discard_short_rest(self) -> None:
        """If the rest of the request's body is short, receives and discards it before the response is sent. Servers
        written in Go do the same, and containerd 1.6 hangs if a response comes before it has sent a whole manifest.
        Raises ClientDisconnected."""
        limits = self._context.worker.limits
        rest = self.body.remaining_bytes
        if rest is None or rest > limits.drain_bytes or self.body.expects_continue:
            return
        try:
            async with asyncio.timeout(limits.linger_seconds):
                while self.body.has_more:
                    if await self.body.receive_pieces() is None:
                        raise ClientDisconnected
        except TimeoutError:
            self.keep_alive = False  # the rest comes too slowly: send the response without it

    def _start(self, status: int, headers: Headers) -> None:
        """Builds the head of the response, and decides how the body is framed and whether the connection stays open.
        Writes nothing. Raises RuntimeError for invalid headers."""
        self.response_started = True
        if self.body.has_more:
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
                continue  # the server chooses the transfer coding itself
            elif lowered == b"connection":
                closes = b"close" in value.lower()
                self.keep_alive = self.keep_alive and not closes
            lines += (name, b": ", value, b"\r\n")
        if self.scope["method"] == "HEAD" or status in _BODYLESS_STATUSES:
            self._is_chunked = None  # the response has no body
        elif self._is_chunked is None:
            self._is_chunked = self.scope["http_version"] == "1.1"
            if self._is_chunked:
                lines.append(b"transfer-encoding: chunked\r\n")
            else:
                self.keep_alive = False
                self._remaining_length = -1  # the end of the connection marks the end of the body
        if not self.keep_alive and not closes:
            lines.append(b"connection: close\r\n")
        lines.append(b"\r\n")
        self._unsent_head = b"".join(lines)

    def _decide_on_rest(self) -> None:
        """For a response that starts before the request's body was received: keeps the connection open only if the rest
        of the body is known to be short. Also closes it after `Expect: 100-continue` without a 100 response, because
        the client may or may not send its body then, so the next bytes could be the body or the next request."""
        rest = self.body.remaining_bytes
        if self.body.expects_continue or rest is None or rest > self._context.worker.limits.drain_bytes:
            self.keep_alive = False
        self.body.expects_continue = False

    # Writing a body from memory

    async def _write_large(self, body: bytes, *, more: bool) -> None:
        """Writes a body, or a part of one, of more than `_LARGE_BYTES` bytes. A complete body that does not fit into
        the memory budget is replaced by a 503 response."""
        if (
            self._unsent_head and not more
        ):  # a complete body; the budget counts only the slice in the transport's buffer
            if not self._context.unsent.reserve(min(len(body), RESPONSE_SLICE_BYTES)):
                log.warning("%s: answered 503, since too many answers wait for their clients", self._request_line())
                body = self._start_error(503, "too many answers wait for their clients; try again", "UNAVAILABLE")
        else:  # a part of a streamed body, which does not count because the application waits for the client
            self._context.unsent.release()
        if len(body) > RESPONSE_SLICE_BYTES and self._unsent_head and not more:
            await self._write_whole(memoryview(body))
        elif self._context.is_tls and len(body) > _LARGE_BYTES:
            await self._write_slices(memoryview(body), more=more)
        else:
            self._write_part(body, more=more)

    async def _write_whole(self, body: memoryview) -> None:
        """Writes a large body that came in one message. Gives the client a limited time for each slice."""
        try:
            await self._write_slices(body, more=False, slice_seconds=self._context.worker.limits.response_slice_seconds)
        finally:
            if not self._context.is_tls:  # the kernel has accepted all; over TLS the last slice may still be buffered
                self._context.unsent.release()

    async def _write_slices(self, body: memoryview, *, more: bool, slice_seconds: float | None = None) -> None:
        """Writes a large body in slices. Returns when the transport's buffer is empty, or over TLS has only the last
        slice. So the caller, which still holds the body, knows how long the body takes memory.

        `slice_seconds` is how long the client may take to receive each slice; None, for streams: without a limit.

        Over TLS all that is written at once is encrypted at once, and kept until the client receives it. Each slice is
        written in a new iteration of the event loop. That lets other connections run, and lets this one notice that the
        client has disconnected; otherwise the transport silently discards what is written.
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
            await self._cut_off_after(self._flush(), slice_seconds)  # the transport's buffer refers to the whole body
        if self.body.is_disconnected:
            raise ClientDisconnected
        self._write_part(b"", more=more)

    async def _cut_off_after(self, drained: Coroutine[Any, Any, None], seconds: float | None) -> None:
        """Awaits `drained`, which returns when the client has received a slice. If that takes longer than `seconds`,
        aborts the connection and raises ClientDisconnected, because each slice takes memory. None: no limit."""
        try:
            async with asyncio.timeout(seconds):
                await drained
        except TimeoutError:
            log.info("%s: connection aborted: the client receives the response too slowly", self._request_line())
            self._transport.abort()
            self.disconnect()
            raise ClientDisconnected from None

    def _write_part(self, body: bytes | memoryview, *, more: bool) -> None:
        """Writes the head, if it is not written yet, and a part of the body. Completes the response unless `more`.
        Raises RuntimeError if the body's length differs from the declared one."""
        if self._is_chunked is None:
            body = b""
        self._count(len(body))
        before, after = self._frame(len(body), more=more)
        if len(body) > _LARGE_BYTES:  # to copy the body into one piece would cost more than two further writes
            self._write(before)
            self._write(body)
            self._write(after)
        else:
            self._write(b"".join((before, body, after)))
        if not more:
            self._complete()

    # Sending a file

    async def _write_file(self, message: Message) -> None:
        """Handles the message of ASGI's zero-copy extension: sends `count` bytes of the open `file` from `offset`.

        Without `offset`, sends from the file's current position and moves the position. Without `count`, sends to the
        end of the file. The application has to close the file.
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
        """Sends `before`, and then `count` bytes of the file from the offset `start`. Raises ClientDisconnected,
        OSError or FileTruncated."""
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
        """Waits until the transport has passed all written bytes to the kernel, or the connection is lost."""
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
        """Counts `size` bytes of the body that are about to be sent. Raises RuntimeError if the body gets longer than
        the declared length."""
        self.sent_bytes += 1  # even a message without a body counts as progress
        if self._is_chunked is False and self._remaining_length >= 0:
            self._remaining_length -= size
            if self._remaining_length < 0:
                raise RuntimeError("the response is longer than its content-length")

    def _frame(self, size: int, *, more: bool) -> tuple[bytes, bytes]:
        """Returns the bytes to write before and after `size` bytes of the body: the head if it is not written yet, and
        the framing of a chunk."""
        head, self._unsent_head = self._unsent_head, b""
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
        """Ends the response. Raises RuntimeError if the body is shorter than the declared length."""
        if self._is_chunked is False and self._remaining_length > 0:
            raise RuntimeError("the response is shorter than its content-length")
        self.response_complete = True
        self.body.close()
        self._on_complete()
