"""One connection: uvicorn's httptools protocol with limits, time-outs, and an orderly end for all that can go wrong.
ADR 5 says what it adds to uvicorn's class, and why."""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from registry.addresses import plain_address
from registry.server.at_once import AtOnce
from registry.server.connection_limit import ConnectionLimit, Silence
from registry.server.exchange import Exchange
from registry.server.framing import Chunked, Framing, Sized
from registry.server.head import describe, head_end, length_of
from registry.server.limits import HEADER_COST, ServerLimits
from registry.server.logs import log
from registry.server.patience import Patience
from registry.server.proxies import TrustedProxies
from registry.server.receiving import PIECES, Body, Receiving
from registry.server.refusal import Refused, Surplus, error_response, too_large
from registry.server.sending import socket_of

SECRET_BUFFER = 64 * 1024
"""Bytes encrypted and not taken by the transport yet, from which on the application waits."""


class RegistryProtocol(HttpToolsProtocol):
    """Requests are parsed as they come and answered in their order, one at a time.

    The parser sees heads only. Bodies are framed here (`registry.server.framing`), so that they need not pass through
    it; what follows one goes to a new parser.

    `active` is being answered, `queue` holds those sent ahead, `latest` is the one parsed last. Once `last` is set
    nothing more is parsed: what still comes is thrown away.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        loop: asyncio.AbstractEventLoop,
        limits: ServerLimits,
        proxies: TrustedProxies | None = None,
        connection_limit: ConnectionLimit | None = None,
        receiving: Receiving | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, loop)
        self.limits = limits
        self.secret = False  # over TLS
        self.proxies = proxies  # once connected: None where the peer is none of them
        self._connection_limit, self._dropped = connection_limit, False
        self.socket: socket.socket | None = None  # where files can be sent to it
        self.active: Exchange | None = None
        self.queue: deque[Exchange] = deque()
        self._queued_bytes = self.giving = 0  # of the heads in it; of the large body that is being sent
        self.latest: Exchange | None = None
        self.last = False
        self._refused: Refused | None = None  # to be said after the answers before it
        self.begun = 0  # requests whose first byte has come
        self.in_head, self._head_bytes = False, 0  # of the head being parsed
        self._head_tail = b""  # its last bytes: where it ends may be cut in two
        self._steps = self.unfinished = 0  # heads and parts of bodies that have come; bytes since the last of them
        self.receiving = receiving or Receiving()  # the worker's
        self.body: Body | None = None  # the one that is coming
        self._parsed_head = False
        self.half_closed = self.lingering = False
        self._thrown_away = 0
        self._patience = Patience(loop.time())
        self._at_once = AtOnce(self.app)
        # Strict; uvicorn's leniency (data after `Connection: close`) would run requests nobody answers.
        self.parser = httptools.HttpRequestParser(self)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.socket = socket_of(transport)
        self.secret = transport.get_extra_info("sslcontext") is not None
        if self.secret:
            transport.set_write_buffer_limits(SECRET_BUFFER)  # what is encrypted waits in a second buffer, below
        if self.client is not None:
            peer, port = self.client
            self.client = (plain_address(peer), port)
            if self.proxies is not None and not self.proxies.trusts(peer):
                self.proxies = None

    # Bytes

    def wanted_body(self) -> Body | None:
        """The body to receive into; None where what comes next is a head, or not looked at."""
        if self.last or self.latest is None or self.latest.response_complete:
            return None
        return self.body

    def data_received(self, data: bytes) -> None:
        steps, self._at_once.given = self._steps, False
        self._read(data)
        if self._steps != steps:
            self.unfinished = 0
            return
        self.unfinished += len(data)
        if self.unfinished > self.limits.header_bytes and not self.last:
            self.refuse(self._too_large())

    def body_received(self, body: Body, count: int) -> None:
        """`count` bytes have come into the body's room."""
        try:
            pieces, rest = body.filled(count)
        except Refused as refused:
            self.refuse(refused)
            return
        self._take(body, pieces)
        if rest:
            self.data_received(bytes(rest))

    def _read(self, data: bytes) -> None:
        at = 0
        while at < len(data) and not self.last:
            if self.body is None:
                at = self._read_head(data, at)
                continue
            try:
                pieces, rest = self.body.take(memoryview(data)[at:])
            except Refused as refused:
                self.refuse(refused)
                break
            at = len(data) - len(rest)
            self._take(self.body, pieces)
        if at < len(data):
            self._throw_away(len(data) - at)

    def _take(self, body: Body, pieces: list[memoryview]) -> None:
        self._steps += 1
        if self.latest is None:
            return
        self.latest.take_body(pieces)
        if body.waiting:
            self.flow.pause_reading()
            self.loop.call_soon(self._take_waiting, body)
        elif body.crumbled and self.latest.held:
            self.flow.pause_reading()
        if body.ended:
            self.body = None
            self.latest.end_body()
            self.last = self.last or not self.latest.keep_alive

    def _take_waiting(self, body: Body) -> None:
        if body is self.body and body.waiting and not self.last:
            self.body_received(body, 0)
            if not body.waiting and self.latest is not None and not self.latest.held:
                self.flow.resume_reading()

    def _read_head(self, data: bytes, at: int) -> int:
        """Shows the parser what may be the rest of one head, and no byte more. Returns where that ends."""
        stop = head_end(self._head_tail, data, at)
        part = data if stop - at == len(data) else data[at:stop]
        self._head_tail = (self._head_tail + part[-3:])[-3:]
        try:
            self.parser.feed_data(part)
        except httptools.HttpParserUpgrade:
            pass  # served as the HTTP/1.1 it is (RFC 9110, section 7.8)
        except httptools.HttpParserError as error:
            self._parser_failed(error)
            return at if self.last else stop
        if self._parsed_head:
            self._parsed_head = False
            self._head_tail = b""
            if self.body is not None or self.parser.should_upgrade():
                self.parser = httptools.HttpRequestParser(self)
        return stop

    def _parser_failed(self, error: httptools.HttpParserError) -> None:
        cause = error.__context__
        if isinstance(cause, Refused):
            self.refuse(cause)
        elif isinstance(cause, Surplus) or self.last:
            self.last = True
        elif isinstance(error, httptools.HttpParserCallbackError):
            log.error("the parser's callbacks failed", exc_info=cause)
            self.last = True
            self.transport.abort()
        else:
            self.refuse(Refused(HTTPStatus.BAD_REQUEST, f"this is not a valid HTTP/1.1 request: {error}"))

    def _throw_away(self, count: int) -> None:
        self._thrown_away += count
        if self._thrown_away > self.limits.linger_bytes:
            self.flow.pause_reading()

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """A client that shut its sending side after a whole request gets its answer; any other is gone."""
        if self.lingering:
            return None
        if not self.last and (self.in_head or self.unfinished or (self.latest and self.latest.more_body)):
            self.refuse(Refused(HTTPStatus.BAD_REQUEST, "the request ended early"))
        self.last = self.half_closed = True
        # TLS has no half-closed connections here: neither event loop keeps one open.
        return self.active is not None and not self.transport.is_closing() and not self.secret

    def connection_lost(self, exc: Exception | None) -> None:
        self.connections.discard(self)
        if self.active is not None:
            self.active.hang_up()
        self.queue.clear()
        self.flow.resume_writing()
        self.last, self.body = True, None
        self.parser = None  # type: ignore[assignment]

    # What the parser finds

    def on_message_begin(self) -> None:
        full = len(self.queue) >= self.limits.pipelined or self._queued_bytes > 2 * self.limits.header_bytes
        if self.latest is not None and full:
            self.latest.keep_alive = False
            self.last = True
        if self.last:
            raise Surplus
        super().on_message_begin()
        self.begun += 1
        self.in_head, self._head_bytes = True, 0

    def on_url(self, url: bytes) -> None:
        self.url += url
        self._head_bytes = len(self.url)
        if self._head_bytes > self.limits.header_bytes:
            raise self._too_large()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += max(len(name) + len(value) + 4, HEADER_COST)
        if self._head_bytes > self.limits.header_bytes:
            raise self._too_large()
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        version = self.parser.get_http_version()
        method = self.parser.get_method().decode("ascii")
        describe(self.scope, self.headers, self.url, version, method)
        self.scope["asgi"]["spec_version"] = "2.4"  # `send` raises once the client is gone
        self.scope["extensions"] = self._at_once.offer()
        if self.socket is not None:
            self.scope["extensions"]["http.response.zerocopysend"] = {}
        if self.proxies is not None:
            self.proxies.apply(self.scope, self.headers)
        keep_alive = version == "1.1" and self.parser.should_keep_alive()
        head_bytes, self.in_head, self._head_bytes = self._head_bytes, False, 0
        self._steps += 1
        self._parsed_head = True
        length = length_of(self.headers)
        if length == 0 and keep_alive and self._answered_at_once():
            return
        self.latest = Exchange(self, self.scope, keep_alive=keep_alive, length=length)
        if length == 0:
            self.latest.end_body()
            self.last = not keep_alive
        else:
            framing: Framing = Chunked(self.limits.header_bytes) if length is None else Sized(length)
            self.body = Body(framing, self.receiving)
            self.scope["extensions"][PIECES] = self.latest.extension
        if self.active is None:
            self._answer(self.latest)
        else:
            self.queue.append(self.latest)
            self._queued_bytes += head_bytes
            self.flow.pause_reading()

    def on_body(self, body: bytes) -> None:
        # Were it ever to happen, parser and we would see different requests.
        raise Refused(HTTPStatus.BAD_REQUEST, "the request is not framed as it must be")

    def on_message_complete(self) -> None:
        pass  # of a head: what follows it is for `_read` to tell

    # Answers

    def _answered_at_once(self) -> bool:
        """Writes the answer that the application has ready, if it has one and nothing is on its way to the client."""
        busy = self.active is not None or self.flow.write_paused or self.transport.is_closing()
        found = None if busy else self._at_once.answer(self.scope, self.server_state.default_headers)
        if found is None:
            return False
        self.server_state.total_requests += 1
        self.transport.write(found)
        return True

    def _answer(self, exchange: Exchange) -> None:
        self.active = exchange
        if self._connection_limit is not None:
            self._connection_limit.begin()
        task = self.loop.create_task(exchange.run_asgi(self.app))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def on_response_complete(self) -> None:
        done, self.active = self.active, None
        self.server_state.total_requests += 1
        if done is None or self.transport.is_closing():
            return
        if not done.keep_alive:
            self._finish(linger=done.more_body or self._thrown_away > 0)
        elif self.queue:
            self._answer(self.queue.popleft())
            if not self.queue:
                self._queued_bytes = 0
                self.flow.resume_reading()
        elif self._refused is not None:
            self._say(self._refused)
        elif self.last:
            self._finish(linger=not self.half_closed)
        else:
            self.flow.resume_reading()

    def refuse(self, refused: Refused) -> None:
        """Answers the request being received with an error of ours, after the answers to those before it, and ends."""
        self.last = True
        broken = self.latest if self.latest is not None and self.latest.more_body else None
        if broken is None and self.active is None:
            self._say(refused)
        elif broken is None:
            self._refused = refused
        elif broken in self.queue:
            self.queue.remove(broken)
            self._refused = refused
        elif broken is not self.active:
            self.transport.close()  # answered already: it was the rest of its body that broke
        else:
            broken.hang_up()
            self.active = None
            if broken.response_started:
                self.transport.abort()
            else:
                self._say(refused)

    def _too_large(self) -> Refused:
        most = self.limits.header_bytes
        return too_large(most, by_target=self.in_head and not self.headers and len(self.url) * 2 > most)

    def _say(self, refused: Refused) -> None:
        log.debug("refused with %d: %s", refused.status, refused.message)
        if not self.transport.is_closing():
            self.transport.write(error_response(refused, self.server_state.default_headers))
            self._finish(linger=True)

    def _finish(self, *, linger: bool) -> None:
        """Ends the connection after what was written.

        Closing a socket with unread data resets the connection, and the reset can overtake the answer in the client's
        kernel. So where the client may still be sending: end our side, read on a little, then close (RFC 9112, 9.6).
        """
        self.last = True
        if not linger:
            self.transport.close()
            return
        self.lingering = True
        self._thrown_away = 0
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def shutdown(self) -> None:
        """Ends the connection after the requests received so far; at once where there is none. May come again."""
        if self.lingering:
            return
        if self.active is None:
            if self.secret and self.transport.is_closing() and not self.transport.get_write_buffer_size():
                self.transport.abort()  # the client was told, and need not be waited for
            self.close()
            return
        final = self.queue[-1] if self.queue else self.active
        final.keep_alive = False
        self.last = self.last or not final.more_body

    def close(self) -> None:
        """Ends the connection after what was written. May come again."""
        self.last = True
        if not self.transport.is_closing():
            self.transport.close()

    def check(self, now: float) -> None:
        """Ends a connection that has waited too long for one thing. Called once a second."""
        self._patience.check(self, now)

    def silence(self, now: float) -> Silence | None:
        """See `registry.server.connection_limit`."""
        return None if self._dropped else self._patience.silence(self, now)

    def drop(self) -> None:
        """Closes the connection at once, for another one."""
        self.last = self._dropped = True
        self.transport.abort()
