"""One client's connection: has its requests answered in their order, and ends when it must.

See ADR 5 for why it does not use uvicorn's protocol class.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from http import HTTPStatus
from typing import cast

from registry.asgi import Scope
from registry.server.connection.asgi_exchange import AsgiExchange
from registry.server.connection.cached_answers import CachedAnswers
from registry.server.connection.context import ConnectionContext, WorkerContext
from registry.server.connection.head_parser import RequestAfterLast, RequestHead
from registry.server.connection.receive_buffers import BODY_EXTENSION
from registry.server.connection.request_body import RequestBody
from registry.server.connection.request_reader import RequestReader
from registry.server.connection.timeouts import ConnectionTimeouts, Wait, WaitReason
from registry.server.gate.connection_limit import EvictionCandidate
from registry.server.http1.error_responses import RefusedRequest, error_response
from registry.server.kernel import tcp_progress
from registry.server.server_log import log

TLS_BUFFER_BYTES = 64 * 1024
"""High-water mark of a TLS transport: encrypted bytes wait in a second buffer, below it."""


class RegistryProtocol(asyncio.BufferedProtocol):
    """Answers one request at a time.

    `_active` is the request being answered; `_queue` has those that the client sent ahead; `_latest` is the one whose
    head came last, unless its response was cached.
    """

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
        self._cached_read = 0
        """The last read of which a request had a cached response: at most one in each has."""
        self._active: AsgiExchange | None = None
        self._queue: deque[AsgiExchange] = deque()
        self._queued_bytes = 0
        """Bytes of the heads in the queue."""
        self._latest: AsgiExchange | None = None
        self._requests_begun = 0
        self._refused: RefusedRequest | None = None
        """An error to answer with after the responses before it."""
        self._is_half_closed = False
        """The client has shut its sending side."""
        self._is_lingering = False
        """All was sent; what still comes is dropped for a while, then the connection is closed."""
        self._is_dropped = False

    # Called by the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._context = context = ConnectionContext.of(self._worker, self._transport, self)
        self._flow = context.flow
        if context.is_tls:
            self._transport.set_write_buffer_limits(TLS_BUFFER_BYTES)
        self._reader = RequestReader(context, self)
        first = Wait("first_byte", (0, 0), self._limits.header_seconds)
        self._timeouts = ConnectionTimeouts(first, self._worker.loop.time())
        self._worker.state.connections.add(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._reader.room()

    def buffer_updated(self, nbytes: int) -> None:
        self._reader.received(nbytes)

    def pause_writing(self) -> None:
        self._flow.pause_writing()

    def resume_writing(self) -> None:
        self._flow.resume_writing()

    def eof_received(self) -> bool | None:
        """A client that shuts its sending side after a whole request gets its response; any other is gone."""
        if self._is_lingering:
            return None
        is_whole = not self._reader.is_in_head and not (self._latest and self._latest.body.more)
        if not self._reader.is_finished and not is_whole:
            self.refuse(RefusedRequest(HTTPStatus.BAD_REQUEST, "the request ended early"))
        self._reader.is_finished = self._is_half_closed = True
        # Over TLS neither event loop keeps a half-closed connection open.
        return self._active is not None and not self._transport.is_closing() and not self._context.is_tls

    def connection_lost(self, exc: Exception | None) -> None:
        if self._on_lost is not None:
            self._on_lost()
        self._worker.state.connections.discard(self)
        if self._active is not None:
            self._active.disconnect()
        self._queue.clear()
        self._flow.resume_writing()
        self._reader.close()
        self._context.unsent.close()
        # Nothing refers back to this object any more, so it is freed at once, without the garbage collector.
        self._active = self._latest = None

    # Called by the reader

    def on_request_begin(self) -> None:
        full = len(self._queue) >= self._limits.pipelined or self._queued_bytes > 2 * self._limits.header_bytes
        if full and self._latest is not None:
            self._latest.keep_alive = False
            raise RequestAfterLast
        self._requests_begun += 1

    def on_request(self, head: RequestHead) -> RequestBody | None:
        scope = head.scope
        extensions = scope["extensions"] = self._cached_answers.extensions()
        if self._context.sendfile_socket is not None:
            extensions["http.response.zerocopysend"] = {}
        if self._context.proxies is not None:
            self._context.proxies.apply(scope, scope["headers"])
        if head.length == 0 and head.keep_alive and self._answer_from_cache(scope):
            return None
        self._latest = exchange = AsgiExchange(self._context, head, self._on_response_complete)
        if head.length == 0:
            self._reader.is_finished = not head.keep_alive
        else:
            extensions[BODY_EXTENSION] = exchange.body.extension()
        if self._active is None:
            self._start(exchange)
        else:
            self._queue.append(exchange)
            self._queued_bytes += head.size
            self._flow.pause_reading()
        return exchange.body if head.length != 0 else None

    def on_body_end(self) -> None:
        if self._latest is not None and not self._latest.keep_alive:
            self._reader.is_finished = True

    def refuse(self, refused: RefusedRequest) -> None:
        """Answers the request being received with an error, after the responses before it, and ends the connection."""
        self._reader.is_finished = True
        broken = self._latest if self._latest is not None and self._latest.body.more else None
        if broken is None and self._active is None:
            self._write_error(refused)
        elif broken is None:
            self._refused = refused
        elif broken in self._queue:
            self._queue.remove(broken)
            self._refused = refused
        elif broken is not self._active:
            self._transport.close()  # its response is complete: the rest of its body broke
        else:
            broken.disconnect()
            self._active = None
            if broken.response_started:
                self._transport.abort()
            else:
                self._write_error(refused)

    # Responses

    def _answer_from_cache(self, scope: Scope) -> bool:
        """Writes the response that the application has cached. False: it has none, or the connection is busy."""
        is_busy = self._active is not None or self._flow.write_paused or self._transport.is_closing()
        if is_busy or self._cached_read == self._reader.reads:
            return False
        response = self._cached_answers.response(scope, self._worker.state.default_headers)
        if response is None:
            return False
        self._cached_read = self._reader.reads
        self._worker.state.total_requests += 1
        self._transport.write(response)
        return True

    def _start(self, exchange: AsgiExchange) -> None:
        worker = self._worker
        self._active = exchange
        if worker.connection_limit is not None:
            worker.connection_limit.on_request()
        task = worker.loop.create_task(exchange.run(worker.app))
        worker.state.tasks.add(task)
        task.add_done_callback(worker.state.tasks.discard)

    def _on_response_complete(self) -> None:
        done, self._active = self._active, None
        self._worker.state.total_requests += 1
        if done is None or self._transport.is_closing():
            return
        if not done.keep_alive:
            self._finish(linger=done.body.more or self._reader.dropped_bytes > 0)
        elif self._queue:
            self._start(self._queue.popleft())
            if not self._queue:
                self._queued_bytes = 0
                self._flow.resume_reading()
        elif self._refused is not None:
            self._write_error(self._refused)
        elif self._reader.is_finished:
            self._finish(linger=not self._is_half_closed)
        else:
            self._flow.resume_reading()

    def _write_error(self, refused: RefusedRequest) -> None:
        log.debug("refused with %d: %s", refused.status, refused.message)
        if not self._transport.is_closing():
            self._transport.write(error_response(refused, self._worker.state.default_headers))
            self._finish(linger=True)

    def _finish(self, *, linger: bool) -> None:
        """Ends the connection after what was written.

        Closing a socket with unread data resets the connection, and the reset can overtake the response in the client's
        kernel. So where the client may still be sending: end our side, read on a little, then close (RFC 9112, 9.6).
        """
        if not linger:
            self._close()
            return
        self._is_lingering = True
        self._reader.drop_input()
        if self._transport.can_write_eof():
            self._transport.write_eof()

    def shutdown(self) -> None:
        """Ends the connection after the requests received so far. May be called repeatedly."""
        if self._is_lingering:
            return
        if self._active is None:
            if self._context.is_tls and self._transport.is_closing() and not self._transport.get_write_buffer_size():
                self._transport.abort()  # close_notify was sent; nothing waits for the client's
            self._close()
            return
        final = self._queue[-1] if self._queue else self._active
        final.keep_alive = False
        self._reader.is_finished = self._reader.is_finished or not final.body.more

    def abort(self) -> None:
        """Closes the connection at once."""
        self._transport.abort()

    def drop(self) -> None:
        """Closes the connection at once, to make room for another one."""
        self._reader.is_finished = self._is_dropped = True
        self._transport.abort()

    def _close(self) -> None:
        """Ends the connection after what was written. May be called repeatedly."""
        self._reader.is_finished = True
        if not self._transport.is_closing():
            self._transport.close()

    # Timeouts

    def check(self, now: float) -> None:
        """Ends the connection if it has waited too long for one thing. To be called once a second."""
        reason = self._timeouts.check(self._current_wait(), now)
        if reason is not None:
            self._on_timeout(reason)

    def eviction_candidate(self, now: float) -> EvictionCandidate | None:
        """See `registry.server.gate.connection_limit`."""
        if self._is_dropped or self not in self._worker.state.connections:
            return None
        if self._transport.is_closing() and not self._context.is_tls:
            return None
        is_proxy, address = self._context.proxies is not None, self._context.client
        client = None if is_proxy or address is None else address[0]
        return self._timeouts.eviction_candidate(
            self._current_wait(), now, requests_begun=self._requests_begun, client=client
        )

    def _current_wait(self) -> Wait:
        limits, active, begun = self._limits, self._active, self._requests_begun
        unsent = self._transport.get_write_buffer_size()
        if self._context.is_tls and (unsent or self._is_lingering or self._transport.is_closing()):
            return self._current_tls_wait(unsent)
        if unsent:
            return Wait("send", (active.moved_bytes if active is not None else 0, unsent), limits.send_idle_seconds)
        if active is not None and active.file_sender is not None and active.file_sender.is_blocked:
            return Wait("send", (active.moved_bytes, active.file_sender.unacknowledged()), limits.send_idle_seconds)
        if self._is_lingering:
            return Wait("linger", (0, 0), limits.linger_seconds)
        if active is not None:
            if active.body.is_awaited:
                return Wait("body", (begun, active.moved_bytes), limits.body_idle_seconds)
            if self._is_half_closed:
                return Wait("half_closed", (begun, active.moved_bytes), limits.half_close_seconds)
            return Wait("application", (0, 0), float("inf"))
        if self._latest is not None and self._latest.body.more:
            return Wait("drain", (begun, self._latest.body.remaining_bytes or 0), limits.body_idle_seconds)
        if self._reader.is_in_head:
            return Wait("head", (begun, 0), limits.header_seconds)
        if not begun:
            return Wait("first_byte", (0, 0), limits.header_seconds)
        return Wait("idle", (begun, 0), limits.keep_alive_seconds)

    def _current_tls_wait(self, unsent: int) -> Wait:
        """The same over TLS, while something is to be sent or the connection ends. The event loop does not tell how
        much encrypted data it buffers, so what counts is how much of it the client's kernel has acknowledged."""
        acknowledged, left = tcp_progress(self._transport.get_extra_info("socket"))
        if unsent or left:
            return Wait("send", (acknowledged, left), self._limits.send_idle_seconds)
        return Wait("linger", (acknowledged, 0), self._limits.linger_seconds)

    def _on_timeout(self, reason: WaitReason) -> None:
        if reason == "head":
            self.refuse(RefusedRequest(HTTPStatus.REQUEST_TIMEOUT, "the headers did not come in time"))
        elif reason == "body":
            self.refuse(RefusedRequest(HTTPStatus.REQUEST_TIMEOUT, "the body stopped coming"))
        elif reason == "linger" and self._context.is_tls and not self._transport.is_closing():
            self._close()  # sends close_notify; the client has the same time again
        elif reason in ("send", "linger"):
            self._transport.abort()
        else:
            self._close()
