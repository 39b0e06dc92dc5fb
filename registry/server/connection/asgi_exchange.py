"""Calls the ASGI application for one request, and writes the response to the connection (`AsgiExchange`).

The application sends the response's body in *parts*, one in each ASGI message, from memory or from a file. A part from
memory with more than `_LARGE_BYTES` is *large*. Large parts are written as follows:

- Without TLS, a large part is written in *slices* of at most `RESPONSE_SLICE_BYTES` only if it is the whole body.
- Over TLS, every large part is written in slices. Each slice is written in *pieces* of at most `_LARGE_BYTES`.
"""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Callable

from registry.asgi import ENDS_ON_HALF_CLOSE, AsgiApp, Message
from registry.log_output import mark_logged, was_logged
from registry.server.connection.context import ConnectionContext
from registry.server.connection.encrypted_file_sender import EncryptedFileSender
from registry.server.connection.file_sender import FileSender, FileTruncated
from registry.server.connection.flow_control import ClientDisconnected
from registry.server.connection.head_parser import RequestHead
from registry.server.connection.request_body import RequestBody
from registry.server.connection.request_reports import RequestEnd
from registry.server.connection.response_framing import ResponseFraming
from registry.server.connection.unsent_budget import RESPONSE_SLICE_BYTES
from registry.server.http1.error_responses import error_body, error_headers
from registry.server.http1.response_head import STATUS_LINES, Headers, check_response_headers
from registry.server.server_log import log

_BODYLESS_STATUSES = (204, 304)
"""A response with one of these statuses has no body (RFC 9110, 15.3.5 and 15.4.5)."""
_LARGE_BYTES = 64 * 1024
"""Parts with more bytes than this are *large*. Also the largest size of a piece."""


class AsgiExchange:
    """Calls the application for one request, and sends the response according to ASGI 2.4. In particular:

    - `send` raises ClientDisconnected (an OSError) once the client has disconnected.
    - On Linux, `send` accepts files (ASGI's zero-copy extension). Without TLS, the kernel sends the bytes of the file.
    - The application can respond before the server has received the request's whole body. If only a few bytes are
      missing, the server first receives and discards them; otherwise it closes the connection after the response.
    - If the application fails, the client gets an error response in the error format of the distribution spec.
    - A response to HEAD and a response with status 204 or 304 have no body, but can declare a length.
    - HTTP/1.0 clients get no chunked responses.
    """

    def __init__(self, context: ConnectionContext, head: RequestHead, on_complete: Callable[[], None]) -> None:
        """`on_complete` is called when the response is complete."""
        self.scope = head.scope
        self.keep_alive = head.keep_alive
        """Whether the connection stays open after the response."""
        self.body = RequestBody(context, head.body_length, expects_continue=head.expects_continue)
        """The body of the request."""
        self.response_started = False
        """Whether `send` has got the status and the headers. They may still be unwritten."""
        self.ends_on_half_close = False
        """Whether the server ends the response when the client shuts down its sending side (`ENDS_ON_HALF_CLOSE`)."""
        self.status = 0
        """The status of the response; 0 before the response starts."""
        self.refusal = ""
        """Why the server has refused the request, in one line; empty if the request was not refused."""
        self.response_complete = False
        """Whether the whole response was passed to the transport or the kernel."""
        self._response_progress = 0
        """A number that grows with each call of `_frame`, and with each byte passed to the transport or the kernel."""
        self.file_sender: FileSender | EncryptedFileSender | None = None
        """The sender of the file that is being sent; None if no file is being sent."""
        self._context = context  # `context.unsent` is this connection's share of the worker's budget for unsent bytes
        self._transport, self._flow = context.transport, context.flow
        self._on_complete = on_complete
        self._framing = ResponseFraming()
        self._started_at = time.perf_counter()
        self._unsent_head = b""
        """The response's head, until it is written together with the first bytes of the body."""
        self._has_written = False
        """Whether bytes of the response were passed to the transport or the kernel."""

    @property
    def progress_count(self) -> int:
        """A number that grows with each byte that is received or sent. The connection times out if the number stays the
        same for too long."""
        return self.body.received_bytes + self._response_progress

    async def run(self, app: AsgiApp) -> None:
        """Calls the application, and returns when the call has ended. Raises nothing. If the application fails, logs
        the exception. If no byte of a response was written before the failure, sends an error response. If only a part
        of the response was written, aborts the connection."""
        try:
            await app(self.scope, self.body.receive, self.send)
        except BaseException as error:  # all exceptions, because nothing awaits the request's task
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                # Cancelled by `RequestTask.on_disconnect`, or by a stopping worker after its time limit for requests.
                if not self.body.is_disconnected:
                    self._transport.abort()
            elif isinstance(error, ClientDisconnected):
                log.debug("%s: the client has disconnected", self._request_line())
                self._transport.abort()  # a file sender can notice the disconnect before the transport does
            else:
                self._fail("the application failed", error)
        else:
            if not self.response_complete and not self.body.is_disconnected:
                self._fail("the application returned without a complete response", None)
        if not self.response_complete:
            self._report_end()

    def disconnect(self) -> None:
        """Tells the application that the client has disconnected. After this call, `receive` returns `http.disconnect`,
        and `send` raises ClientDisconnected."""
        self.body.disconnect()
        if self.file_sender is not None:
            self.file_sender.end(ClientDisconnected())

    def _fail(self, problem: str, error: BaseException | None) -> None:
        """Logs the problem. If no byte of a response was written, sends an error response. If only a part of the
        response was written, aborts the connection. `error`: the application's exception; None if there is none."""
        is_out_of_files = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)
        if is_out_of_files:
            log.error("%s: %s", self._request_line(), error)
        elif not was_logged(error):
            log.error("%s: %s", self._request_line(), problem, exc_info=error)
        if self.body.is_disconnected or self.response_complete:
            return
        if self._has_written:
            self._transport.abort()  # tells the client that the body is incomplete
            return
        if is_out_of_files:
            body = self._start_error(503, "the registry has no file descriptor left; try again", "UNAVAILABLE")
        else:
            body = self._start_error(500, "the registry failed; the server's log says why", "UNKNOWN")
        self._write_framed(body, more=False)

    def _start_error(self, status: int, message: str, code: str) -> bytes:
        """Starts an error response, and returns its body. The caller has to write the body. Call this only if no byte
        of the application's response was written."""
        body = error_body(message, code=code)
        self._framing = ResponseFraming()
        self.keep_alive = False
        self._start(status, error_headers(body) + ([(b"retry-after", b"1")] if status == 503 else []))
        return body

    def _report_end(self) -> None:
        """Reports the request to the application, which counts and logs it."""
        sizes, seconds = (self.body.received_bytes, self._framing.body_bytes), time.perf_counter() - self._started_at
        end = RequestEnd(self.status, *sizes, seconds, self.response_complete, self.refusal)
        self._context.worker.reports.report_end(self.scope, end)

    def _request_line(self) -> str:
        # `raw_path` is percent-encoded, so it cannot contain a line break.
        return f"{self.scope['method']} {self.scope['raw_path'].decode('ascii')}"

    # Messages of the application

    async def send(self, message: Message) -> None:
        """Handles one ASGI message of the application. First waits while the transport's write buffer is full. Raises:

        - ClientDisconnected: the client has disconnected.
        - RuntimeError: the message is not allowed at this point, a header is invalid, or the length of the body differs
          from the declared length.
        - OSError, FileTruncated: a file cannot be sent.
        - TooManyRequests: a file has waited too long for memory, over TLS."""
        if self._flow.write_paused and not self.body.is_disconnected:
            await self._flow.drain()
        if self.body.is_disconnected:
            raise ClientDisconnected
        if not self.response_started:
            if message["type"] != "http.response.start":
                raise RuntimeError(f"expected http.response.start, not {message['type']}")
            if self.body.has_more and not await self.body.discard_remainder():
                self.keep_alive = False
            self.ends_on_half_close = message.get(ENDS_ON_HALF_CLOSE, False)
            self._start(message["status"], list(message.get("headers", [])))
        elif not self.response_complete:
            if self._flow.discards_writes():
                # asyncio reports a failed write only in a later iteration of the event loop. That iteration does not
                # begin while the application sends without waiting.
                self.disconnect()
                raise ClientDisconnected
            kind = message["type"]
            if kind == "http.response.body":
                body, more = message.get("body", b""), message.get("more_body", False)
                if len(body) > _LARGE_BYTES:
                    await self._write_large_part(body, more=more)
                else:
                    if self._context.unsent.reserved_bytes:  # of an earlier response, which may be sent by now
                        self._context.unsent.release_if_sent()
                    self._write_framed(body, more=more)
            elif kind == "http.response.zerocopysend":
                await self._write_file(message)
            else:
                raise RuntimeError(f"expected http.response.body, not {kind}")
        else:
            raise RuntimeError(f"{message['type']} after the response was complete")

    def _start(self, status: int, headers: Headers) -> None:
        """Builds the head of the response, and decides how the body is framed and whether the connection stays open.
        Writes nothing yet. Raises RuntimeError for invalid headers."""
        self.response_started = True
        if self.body.has_more:
            if not self.body.can_discard_remainder:
                self.keep_alive = False
            self.body.expects_continue = False  # after the final response, a 100 response is not allowed
        self.status = status
        lines = [STATUS_LINES[status]]
        has_connection_close, content_length = False, None
        check_response_headers(headers)
        for name, value in self._context.worker.state.default_headers + headers:
            lowered = name.lower()
            if lowered == b"content-length":
                content_length = int(value)
            elif lowered == b"transfer-encoding":
                continue  # the server chooses the transfer coding itself
            elif lowered == b"connection":
                has_connection_close = b"close" in value.lower()
                self.keep_alive = self.keep_alive and not has_connection_close
            lines += (name, b": ", value, b"\r\n")
        if self.scope["method"] != "HEAD" and status not in _BODYLESS_STATUSES:
            self._framing.start(content_length, may_be_chunked=self.scope["http_version"] == "1.1")
            if self._framing.is_chunked:
                lines.append(b"transfer-encoding: chunked\r\n")
            elif content_length is None:
                self.keep_alive = False  # the end of the connection marks the end of the body
        if not self.keep_alive and not has_connection_close:
            lines.append(b"connection: close\r\n")
        lines.append(b"\r\n")
        self._unsent_head = b"".join(lines)

    # Writing a body from memory

    async def _write_large_part(self, body: bytes, *, more: bool) -> None:
        """Writes a large part. `more`: whether further parts follow. If the part is the whole body, first reserves
        memory for one slice. If no memory becomes free, sends a 503 response instead. Raises ClientDisconnected."""
        if not self._unsent_head or more:
            # The memory budget does not count a body of several parts (`registry.server.connection.unsent_budget`).
            self._context.unsent.release()  # ends the reservation of an earlier response, even if bytes are unsent
            await self._write_without_time_limit(body, more=more)
            return
        try:
            slice_bytes = min(len(body), RESPONSE_SLICE_BYTES)  # the transport's buffer has only one slice at a time
            is_reserved = await self._context.unsent.reserve(slice_bytes, len(body))
            if self.body.is_disconnected:
                raise ClientDisconnected
            if not is_reserved:
                log.warning("%s: answered 503: too many responses wait for slow clients", self._request_line())
                body = self._start_error(503, "too many responses wait for slow clients; try again", "UNAVAILABLE")
            if len(body) > RESPONSE_SLICE_BYTES:
                seconds = self._context.worker.limits.response_slice_seconds
                await self._write_slices(memoryview(body), more=False, slice_seconds=seconds)
            else:
                await self._write_without_time_limit(body, more=False)
        finally:
            self._context.unsent.finish()  # from now on, the reservation may end as soon as the bytes are sent

    async def _write_without_time_limit(self, body: bytes, *, more: bool) -> None:
        """Writes a part. Over TLS, writes a large part in slices. `more`: whether further parts follow."""
        if self._context.is_tls and len(body) > _LARGE_BYTES:
            await self._write_slices(memoryview(body), more=more)
        else:
            self._write_framed(body, more=more)

    async def _write_slices(self, body: memoryview, *, more: bool, slice_seconds: float | None = None) -> None:
        """Writes the part `body` in slices. Afterwards, the transport does not refer to `body` any more. Over TLS, the
        transport may still have a copy of the last bytes.

        `more`: whether further parts follow. `slice_seconds`: how long the client may take to receive a slice; None: as
        long as it needs. If the client takes longer, aborts the connection. Raises ClientDisconnected.

        Over TLS, each slice is written in pieces, because the transport's buffer for encrypted bytes grows to the size
        of the largest write and never shrinks. The event loop runs between two writes, so that other connections get
        their turn and this method notices a disconnect."""
        write_bytes = _LARGE_BYTES if self._context.is_tls else RESPONSE_SLICE_BYTES  # largest size of one write
        try:
            for slice_start in range(0, len(body), RESPONSE_SLICE_BYTES):
                slice_end = min(slice_start + RESPONSE_SLICE_BYTES, len(body))
                async with asyncio.timeout(slice_seconds):
                    for start in range(slice_start, slice_end, write_bytes):
                        await (self._flow.drain() if self._flow.write_paused else asyncio.sleep(0))
                        if self.body.is_disconnected or self._flow.discards_writes():
                            raise ClientDisconnected
                        self._write_framed(body[start : min(start + write_bytes, slice_end)], more=True)
            if not self._context.is_tls:
                async with asyncio.timeout(slice_seconds):
                    await self._flow.flush()  # a slice in the buffer keeps `body` in memory
        except TimeoutError:
            log.info("%s: connection aborted: the client receives the response too slowly", self._request_line())
            self._transport.abort()
            self.disconnect()
            raise ClientDisconnected from None
        if self.body.is_disconnected:
            raise ClientDisconnected
        if not more:
            self._write_framed(b"", more=False)  # completes the response

    def _write_framed(self, body: bytes | memoryview, *, more: bool) -> None:
        """Writes the head, if it is still unwritten, and then `body`: a part, a slice or a piece. `more`: whether more
        of the response's body follows; False completes the response. Raises RuntimeError if the length of the
        response's body differs from the declared length.

        Reports the request before it writes the last bytes. A request is then counted even if the worker is killed
        right after the last write."""
        if not self._framing.has_body:
            body = b""  # for example in a response to HEAD
        before, after = self._frame(len(body), more=more)
        if not more:
            self._end_response()
        if len(body) > _LARGE_BYTES:  # three writes cost less time than a copy of the body
            self._write(before)
            self._write(body)
            self._write(after)
        else:
            self._write(b"".join((before, body, after)))
        if not more:
            self._on_complete()

    # Sending a file

    async def _write_file(self, message: Message) -> None:
        """Handles a message of ASGI's zero-copy extension. Does not close the file. Raises the errors of `_send_file`.
        Fields of the message:

        - `file`: an open file or its descriptor.
        - `offset`: the offset of the first byte to send. If the field is missing, sends from the file's current
          position, and moves the position behind the sent bytes.
        - `count`: the number of bytes to send. If the field is missing, sends up to the end of the file.
        - `more_body`: whether further parts follow."""
        file = message["file"] if isinstance(message["file"], int) else message["file"].fileno()
        offset, count, more = message.get("offset"), message.get("count"), message.get("more_body", False)
        start = os.lseek(file, 0, os.SEEK_CUR) if offset is None else offset
        if count is None:
            count = max(os.fstat(file).st_size - start, 0)
        before, after = self._frame(count if self._framing.has_body else 0, more=more)
        if count == 0 or not self._framing.has_body:
            self._write(before + after)
        else:
            await self._send_file(before, file, start, count)
            self._write(after)
        if offset is None:
            os.lseek(file, start + count, os.SEEK_SET)
        if not more:
            self._end_response()
            self._on_complete()

    async def _send_file(self, before: bytes, file: int, start: int, count: int) -> None:
        """Sends the bytes `before`, and then the `count` bytes of the file that begin at the offset `start`. Raises
        ClientDisconnected, OSError and FileTruncated; over TLS also TooManyRequests."""
        sock = self._context.sendfile_socket
        if not self._context.can_send_files:
            raise RuntimeError("files cannot be sent on this connection: the extension is not in its scope")
        unsent_bytes = count
        try:
            await self._flow.flush()
            if self._transport.is_closing():
                self.disconnect()
                raise ClientDisconnected
            if sock is None:
                self.file_sender = EncryptedFileSender(self._context, file, self._on_sent)
            else:
                self.file_sender = FileSender(self._context.worker.loop, sock, file, self._on_sent)
            await self.file_sender.run(before, start, count)
        except (OSError, FileTruncated) as error:
            if not isinstance(error, ClientDisconnected):
                log.error("%s: a file cannot be sent: %s", self._request_line(), error)
                mark_logged(error)  # `_fail` must not log it again
            raise
        finally:
            if self.file_sender is not None:
                unsent_bytes, self.file_sender = self.file_sender.unsent_bytes, None
            self._framing.body_bytes -= unsent_bytes  # `_frame` has counted them already

    def _on_sent(self, count: int) -> None:
        self._has_written = True
        self._response_progress += count

    # Writing

    def _frame(self, size: int, *, more: bool) -> tuple[bytes, bytes]:
        """Counts `size` bytes of the body, and returns the bytes to write before and after them. Raises RuntimeError if
        the body gets longer than the declared length."""
        self._response_progress += 1  # a part without bytes is progress as well
        self._framing.count(size)
        head, self._unsent_head = self._unsent_head, b""
        return self._framing.frame(head, size, more=more)

    def _write(self, data: bytes | memoryview) -> None:
        if data:
            self._has_written = True
            self._response_progress += len(data)
            self._transport.write(data)

    def _end_response(self) -> None:
        """Marks the response as complete, and reports the request. After the last write, the caller must call
        `_on_complete`. Raises RuntimeError if the body is shorter than its declared length."""
        self._framing.check_complete()
        self.response_complete = True
        self.body.close()
        self._report_end()
