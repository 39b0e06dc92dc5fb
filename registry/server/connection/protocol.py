"""The connection of one client (`RegistryProtocol`).

docs/adr/0005 explains why the server does not use uvicorn's protocol class.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from http import HTTPStatus
from typing import cast

from registry.asgi import Scope
from registry.server.connection.asgi_exchange import AsgiExchange
from registry.server.connection.cached_answers import CachedAnswers, render
from registry.server.connection.context import ConnectionContext, WorkerContext
from registry.server.connection.head_parser import RequestHead
from registry.server.connection.receive_buffers import BODY_EXTENSION
from registry.server.connection.request_body import RequestBody
from registry.server.connection.request_reader import RequestReader
from registry.server.connection.request_task import RequestTask
from registry.server.connection.timeouts import ConnectionTimeouts, Wait, WaitReason
from registry.server.gate.connection_limit import EvictionCandidate
from registry.server.gate.tls_memory import LARGE_READ_BYTES
from registry.server.http1.error_responses import RefusedRequest, error_response
from registry.server.kernel import tcp_progress
from registry.server.server_log import log

_NO_PROTOCOL = asyncio.BufferedProtocol()
"""Takes the place of the protocol object of a connection that is lost."""
_EVICTION_MESSAGE = "the connection was closed before the request was complete, to make room for another one"


class RegistryProtocol(asyncio.BufferedProtocol):
    """The connection of one client. Answers the client's requests one after another, in the order in which they were
    sent. An `AsgiExchange` is one request with its response.

    If the server ends the connection while the client could still be sending, the connection *lingers* (RFC 9112, 9.6):
    the server shuts down its sending side, reads for a short time and discards what it reads, and then closes the
    connection. Over TLS it does not shut down its sending side, because asyncio and uvloop do not support this."""

    _transport: asyncio.Transport
    _context: ConnectionContext
    _reader: RequestReader
    _timeouts: ConnectionTimeouts

    def __init__(self, worker: WorkerContext, on_lost: Callable[[], None] | None = None) -> None:
        """`on_lost` is called once when the connection is lost."""
        self._worker = worker
        self._on_lost = on_lost
        self._limits = worker.limits
        self._cached_answers = CachedAnswers(worker.app)
        self._last_cached_read = 0
        """`RequestReader.read_count` when a request was last answered from the cache. If one read contains several
        requests, only one is answered from the cache, so that a large read does not block the event loop."""
        self._active: AsgiExchange | None = None
        """The request that is being answered; None if there is none."""
        self._active_task: RequestTask | None = None
        """The task that answers `_active`."""
        self._latest: AsgiExchange | None = None
        """The request whose head was received last, not counting requests that were answered from the cache."""
        self._requests_started = 0
        """Number of requests of which at least one byte was received."""
        self._is_half_closed = False
        """Whether the client has shut down its sending side."""
        self._is_lingering = False
        """Whether the connection lingers: the last response was written, and the server only reads and discards."""
        self._is_evicted = False
        """Whether the connection was closed to make room for another connection."""
        self._max_small_buffer_bytes = sys.maxsize
        """If the TLS transport's buffers have more bytes than this, the connection is counted as one with large buffers
        (`LargeBufferLimit`). `sys.maxsize` disables this: the connection has no TLS, or is already counted."""

    # Called by the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._context = context = ConnectionContext.for_transport(self._worker, self._transport, self)
        self._flow = context.flow
        self._reader = RequestReader(context, self)
        first_wait = Wait("first_byte", (0, 0), self._limits.head_seconds)
        self._timeouts = ConnectionTimeouts(first_wait, self._worker.loop.time())
        if context.is_tls:
            self._max_small_buffer_bytes = LARGE_READ_BYTES
        self._worker.state.connections.add(self)
        self._worker.reports.report_connection(1)

    def get_buffer(self, sizehint: int) -> memoryview:
        # Over TLS, `sizehint` is how many bytes are in the transport's buffers.
        if sizehint > self._max_small_buffer_bytes:
            self._on_large_buffers()
        return self._reader.get_memory()

    def buffer_updated(self, nbytes: int) -> None:
        self._reader.parse_received(nbytes)

    def pause_writing(self) -> None:
        self._flow.pause_writing()

    def resume_writing(self) -> None:
        self._flow.resume_writing()

    def eof_received(self) -> bool | None:
        """Called when the client has shut down its sending side. Refuses a request that was not received completely.
        Returns True if the transport must stay open to send a response. If the result is not True, the transport
        closes itself. An endless response (`AsgiExchange.ends_on_half_close`) does not keep the transport open."""
        if self._is_lingering:
            return None
        is_complete = not self._reader.is_in_head and not (self._latest and self._latest.body.has_more)
        if not self._reader.is_finished and not is_complete:
            self.refuse(
                RefusedRequest(HTTPStatus.BAD_REQUEST, "the connection was closed before the request was complete")
            )
        self._reader.is_finished = self._is_half_closed = True
        # A TLS transport always closes itself: asyncio and uvloop cannot keep a half-closed one open.
        if self._active is None or self._active.ends_on_half_close:
            return False
        return not self._transport.is_closing() and not self._context.is_tls

    def connection_lost(self, exc: Exception | None) -> None:
        if self._on_lost is not None:
            self._on_lost()
        self._worker.state.connections.discard(self)
        self._worker.large_buffers.discard(self)
        self._worker.reports.report_connection(-1)
        if self._active_task is not None:
            self._active_task.on_disconnect()
        self._flow.resume_writing()
        self._reader.close()
        self._context.unsent.close()
        # Breaks reference cycles, so that memory is freed without the garbage collector. Over TLS, the transport and
        # its buffers are part of a cycle, because the transport refers to methods of this object.
        self._active = self._latest = self._active_task = None
        if self._context.is_tls:
            self._transport.set_protocol(_NO_PROTOCOL)

    # Called by the request reader

    @property
    def is_answering(self) -> bool:
        """True while the connection answers a request."""
        return self._active is not None

    def end_after_response(self) -> None:
        """Makes the connection end after the current response."""
        if self._active is not None:
            self._active.keep_alive = False

    def on_request_start(self) -> None:
        """Counts a request whose first byte was received."""
        self._requests_started += 1

    def on_request(self, head: RequestHead, *, is_followed: bool) -> RequestBody | None:
        """Called when a head was received completely, and no request is being answered. Answers the request from the
        cache, or starts a task that answers the request. `is_followed`: whether the client has sent another head
        already. Returns the object to which the reader adds the request's body; None if the request has no body."""
        scope = head.scope
        extensions = scope["extensions"] = self._cached_answers.extensions()
        if self._context.proxies is not None:
            self._context.proxies.apply(scope, scope["headers"])
        if self._worker.retirement.has_begun and not is_followed:
            head.keep_alive = False
        if head.body_length == 0 and head.keep_alive and self._answer_from_cache(scope):
            return None
        if self._context.can_send_files:
            extensions["http.response.zerocopysend"] = {}
        self._worker.reports.add_extension(extensions)
        self._latest = exchange = AsgiExchange(self._context, head, self._on_response_complete)
        if head.body_length == 0:
            self._reader.is_finished = not head.keep_alive  # without keep-alive, no other request follows
        else:
            extensions[BODY_EXTENSION] = exchange.body.extension()
        self._start(exchange)
        return exchange.body if head.body_length != 0 else None

    def on_body_end(self) -> None:
        """Called when the body of the latest request was received completely."""
        if self._latest is not None and not self._latest.keep_alive:
            self._reader.is_finished = True

    def refuse(self, refused: RefusedRequest) -> None:
        """Refuses the request that is being received, because its head or body is not valid or arrives too slowly. If
        no response to this request has started, sends the error response. Always ends the connection: if a response to
        this request has started and is not complete, aborts the connection."""
        self._reader.is_finished = True
        # The request whose body is being received; None if a head is being received.
        incomplete = self._latest if self._latest is not None and self._latest.body.has_more else None
        if incomplete is None and self._active is None:
            self._write_error(refused, self._reader.partial_scope())
        elif incomplete is None or incomplete is not self._active:
            self._transport.close()  # the request was answered already, so no error response can be sent
        else:
            if self._active_task is not None:
                self._active_task.on_disconnect()
            self._active = self._active_task = None
            if incomplete.response_started:
                self._transport.abort()
            else:
                # When the task of the exchange ends, the exchange reports the request with this status and message.
                incomplete.status, incomplete.refusal = refused.status, refused.message
                self._write_error(refused, None)

    # Responses

    def _answer_from_cache(self, scope: Scope) -> bool:
        """If the application has cached the response to the request, writes the response and returns True. Otherwise
        returns False. Also returns False if another request is being answered, the write buffer is full, the connection
        is being closed, or another request of the same read was answered from the cache."""
        is_busy = self._active is not None or self._flow.write_paused or self._transport.is_closing()
        if is_busy or self._last_cached_read == self._reader.read_count:
            return False
        cached = self._cached_answers.find(scope)
        if cached is None:
            return False
        self._last_cached_read = self._reader.read_count
        self._worker.state.total_requests += 1
        response = render(*cached, self._worker.state.default_headers)
        self._worker.reports.report_cached(scope, *cached)  # before the client can have the response
        self._transport.write(response)
        return True

    def _start(self, exchange: AsgiExchange) -> None:
        """Starts a task that answers the request."""
        self._active = exchange
        self._active_task = RequestTask(self._worker, exchange)

    def _on_response_complete(self) -> None:
        """Called when the current response is complete. Lets the reader go on, or ends the connection."""
        completed, self._active, self._active_task = self._active, None, None
        self._worker.state.total_requests += 1
        if completed is None or self._transport.is_closing():
            return
        if not completed.keep_alive:
            reader = self._reader
            has_unread_bytes = completed.body.has_more or reader.has_held_bytes or reader.discarded_bytes > 0
            # When the worker retires, the client may send its next request before it receives `Connection: close`.
            self._finish(linger=has_unread_bytes or self._worker.retirement.has_begun)
        elif self._reader.is_finished:
            self._finish(linger=not self._is_half_closed)
        else:
            self._reader.continue_parsing()

    def _write_error(self, refused: RefusedRequest, scope: Scope | None) -> None:
        """Writes the error response to a refused request, and ends the connection. Reports the request to the
        application. `scope`: what is known of the request, for the report. None: an `AsgiExchange` makes the report."""
        log.debug("refused a request with status %d: %s", refused.status, refused.message)
        if not self._transport.is_closing():
            response = error_response(refused, self._worker.state.default_headers)
            self._transport.write(response)
            if scope is not None:
                size = len(response.partition(b"\r\n\r\n")[2])
                self._worker.reports.report_refused(scope, refused.status, refused.message, size)
            self._finish(linger=True)

    def _finish(self, *, linger: bool) -> None:
        """Ends the connection when all written bytes were sent. `linger`: whether the client could still be sending.
        If the server closes a socket with unread data, the kernel resets the connection, and the client can lose the
        response. With `linger`, the connection therefore lingers, and `check_timeouts` closes it."""
        if not linger:
            self._close()
            return
        self._is_lingering = True
        self._reader.discard_input()
        if self._transport.can_write_eof():
            self._transport.write_eof()

    def shutdown(self) -> None:
        """Closes the connection after the responses to the requests received so far. May be called repeatedly."""
        if self._is_lingering:
            return
        if self._active is None:
            if self._context.is_tls and self._transport.is_closing() and self._current_wait().reason == "linger":
                # The client's kernel has all bytes of the TLS connection and the server's close_notify. The server need
                # not wait for the client's close_notify.
                self._transport.abort()
            self._close()
            return
        # If the head of the next request has arrived, the next request is answered too. A later call of `shutdown` then
        # ends the connection.
        if not self._reader.has_held_head:
            self._active.keep_alive = False
            self._reader.is_finished = self._reader.is_finished or not self._active.body.has_more

    def retire(self) -> None:
        """Makes the connection close after a response whose head contains `Connection: close`: the current response if
        it has not started and the next request has not arrived, otherwise a later response. An idle connection stays
        open until it has sent a response, because the client may be sending a request. May be called repeatedly."""
        if self._is_lingering or self._active is None:
            return  # `on_request` makes the next response the last one
        if self._active.keep_alive and not self._active.response_started and not self._reader.has_held_head:
            self._active.keep_alive = False
            self._reader.is_finished = self._reader.is_finished or not self._active.body.has_more

    def abort(self) -> None:
        """Closes the connection immediately. The client does not receive the rest of a response."""
        self._transport.abort()

    def evict(self) -> None:
        """Closes the connection immediately, to make room for another one."""
        if self._reader.is_in_head and not self._reader.is_finished:
            self._worker.reports.report_refused(self._reader.partial_scope(), 0, _EVICTION_MESSAGE)
        self._reader.is_finished = self._is_evicted = True
        self._transport.abort()

    def _close(self) -> None:
        """Closes the connection when all written bytes were sent. May be called repeatedly."""
        self._reader.is_finished = True
        if not self._transport.is_closing():
            self._transport.close()

    # Timeouts

    def check_timeouts(self, now: float) -> None:
        """Refuses the request or closes the connection if it has waited too long. Call it once a second; `now` is in
        seconds of the event loop's clock."""
        if self._max_small_buffer_bytes < sys.maxsize and (
            self._flow.has_stayed_stopped() or self._transport.is_closing()
        ):
            self._on_large_buffers()  # the transport's buffers can grow without a call of `get_buffer`
        reason = self._timeouts.check(self._current_wait(), now)
        if reason is not None:
            self._on_timeout(reason)

    def eviction_candidate(self, now: float) -> EvictionCandidate | None:
        """Describes the connection as a candidate for eviction (`evict`). `now`: see `check_timeouts`. Returns None if
        the connection must stay open, is lost or evicted, or is being closed without TLS. Over TLS, a connection that
        is being closed still waits for its client, so it can be a candidate."""
        if self._is_evicted or self not in self._worker.state.connections:
            return None
        if self._transport.is_closing() and not self._context.is_tls:
            return None
        return self._timeouts.eviction_candidate(
            self._current_wait(), now, requests_started=self._requests_started, client=self._context.address_for_limits
        )

    def _on_large_buffers(self) -> None:
        """Called once, when the transport's buffers may have become large. Counts the connection in the next iteration
        of the event loop, because counting can close this connection, which must not happen while it reads."""
        self._max_small_buffer_bytes = sys.maxsize
        self._worker.loop.call_soon(self._count_large_buffers)

    def _count_large_buffers(self) -> None:
        if self in self._worker.state.connections:
            is_closing = self._transport.is_closing()
            self._worker.large_buffers.add(self, self._context.address_for_limits, is_closing=is_closing)

    def _current_wait(self) -> Wait:
        """Returns what the connection is waiting for, its progress, and the timeout."""
        limits, active, started = self._limits, self._active, self._requests_started
        unsent = self._transport.get_write_buffer_size()
        if self._context.is_tls and (unsent or self._is_lingering or self._transport.is_closing()):
            return self._current_tls_wait(unsent, None)
        if unsent:
            return Wait("send", (active.progress_count if active is not None else 0, unsent), limits.send_idle_seconds)
        if active is not None and active.file_sender is not None and active.file_sender.is_blocked:
            return Wait("send", (active.progress_count, active.file_sender.unacknowledged()), limits.send_idle_seconds)
        if self._is_lingering:
            return Wait("linger", (0, 0), limits.linger_seconds)
        if active is not None:
            if active.body.is_awaited:
                return Wait("body", (started, active.progress_count), limits.body_idle_seconds)
            if self._is_half_closed:
                timeout = 0.0 if active.ends_on_half_close else limits.half_close_seconds
                return Wait("half_closed", (started, active.progress_count), timeout)
            return Wait("application", (0, 0), float("inf"))
        if self._latest is not None and self._latest.body.has_more:
            return Wait("drain", (started, self._latest.body.remaining_bytes or 0), limits.body_idle_seconds)
        if self._reader.is_in_head:
            return Wait("head", (started, 0), limits.head_seconds)
        if not started:
            return Wait("first_byte", (0, 0), limits.head_seconds)
        idle = Wait("idle", (started, 0), limits.keep_alive_seconds)
        # If the last check found the same `idle`, all bytes were acknowledged at that check. No request has begun since
        # then, so the connection has sent nothing that could be unacknowledged.
        return self._current_tls_wait(0, idle) if self._context.is_tls and self._timeouts.has_changed(idle) else idle

    def _current_tls_wait(self, unsent: int, wait_if_sent: Wait | None) -> Wait:
        """Returns what a TLS connection is waiting for if it may have bytes to send. The progress is the number of
        bytes that the client's kernel has acknowledged, because the number of buffered encrypted bytes is unknown.
        `unsent`: number of bytes in the write buffer. `wait_if_sent`: the result if the client's kernel has
        acknowledged all bytes. If `wait_if_sent` is None, the result is then a `Wait` with the reason `linger`."""
        acknowledged, unacknowledged = tcp_progress(self._transport.get_extra_info("socket"))
        if unsent or unacknowledged:
            return Wait("send", (acknowledged, unacknowledged), self._limits.send_idle_seconds)
        return wait_if_sent or Wait("linger", (acknowledged, 0), self._limits.linger_seconds)

    def _on_timeout(self, reason: WaitReason) -> None:
        if reason == "head":
            self.refuse(RefusedRequest(HTTPStatus.REQUEST_TIMEOUT, "the headers were not received in time"))
        elif reason == "body":
            self.refuse(
                RefusedRequest(HTTPStatus.REQUEST_TIMEOUT, "the rest of the request's body was not received in time")
            )
        elif reason == "linger" and self._context.is_tls and not self._transport.is_closing():
            self._close()  # sends close_notify; the client then has another `linger_seconds` to close the connection
        elif reason in ("send", "linger"):
            self._transport.abort()
        else:  # the client does not wait for a response, or the server assumes that it has disconnected
            self._close()
