"""One connection: uvicorn's httptools protocol with limits, time-outs, and an orderly end for all that can go wrong.

What it adds to uvicorn's class, and why, is told in docs/adr/0005-supervisor-and-protocol.md.
"""

from __future__ import annotations

import asyncio
from collections import deque
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from registry.server.exchange import Exchange
from registry.server.limits import ServerLimits
from registry.server.logs import log
from registry.server.patience import Patience
from registry.server.refusal import Refused, Surplus, error_response
from registry.server.target import check_host, parse_target

_FRAMING = (b"content-length", b"transfer-encoding")


class RegistryProtocol(HttpToolsProtocol):
    """Requests are parsed as they come and answered in their order, one at a time.

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
    ) -> None:
        super().__init__(config, server_state, app_state, loop)
        self.limits = limits
        self.active: Exchange | None = None
        self.queue: deque[Exchange] = deque()
        self.latest: Exchange | None = None
        self.last = False
        self._refused: Refused | None = None  # to be said after the answers before it
        self.begun = 0  # requests whose first byte has come
        self.in_head = False
        self._head_bytes = 0  # of the head, or the trailers, being parsed
        self._steps = 0  # heads, body pieces and ends the parser has found
        self.unfinished = 0  # bytes since the parser last found one
        self._upgrading = False
        self._replaying = False
        self.half_closed = False
        self.lingering = False
        self._thrown_away = 0
        self._patience = Patience()
        self._make_parser()

    def _make_parser(self) -> None:
        # A new one is strict; uvicorn's leniency (data after `Connection: close`) would run requests nobody answers.
        self.parser = httptools.HttpRequestParser(self)

    # Bytes

    def data_received(self, data: bytes) -> None:
        if self.last:
            self._throw_away(len(data))
            return
        steps = self._steps
        self._feed(data)
        if self._steps != steps:
            self.unfinished = 0
            return
        self.unfinished += len(data)
        if self.unfinished > self.limits.header_bytes and not self.last:
            self.refuse(self._too_large())

    def _feed(self, data: bytes) -> None:
        rest: bytes | None = None
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            rest = data[upgrade.args[0] :]
        except httptools.HttpParserError as error:
            self._parser_failed(error, len(data))
        if rest is not None:  # not above: an error's context, which we look at, would be the upgrade's
            self._ignore_upgrade(rest)

    def _parser_failed(self, error: httptools.HttpParserError, size: int) -> None:
        cause = error.__context__
        if isinstance(cause, Refused):
            self.refuse(cause)
        elif isinstance(cause, Surplus) or self.last:
            self.last = True
            self._throw_away(size)
        elif isinstance(error, httptools.HttpParserCallbackError):
            log.error("the parser's callbacks failed", exc_info=cause)
            self.transport.abort()
        else:
            self.refuse(Refused(HTTPStatus.BAD_REQUEST, f"this is not a valid HTTP/1.1 request: {error}"))

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Serves a request that asks for another protocol as the HTTP/1.1 it is (RFC 9110, section 7.8).

        The parser took its head for the end of HTTP and would lose the body; a new one, told how the body is framed,
        goes on where it stopped.
        """
        self._upgrading = False
        self._make_parser()
        self._replaying = True
        framing = b"".join(b"%s: %s\r\n" % header for header in self.headers if header[0] in _FRAMING)
        self._feed(b"POST / HTTP/1.1\r\n" + framing + b"\r\n" + rest)

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
        return self.active is not None and not self.transport.is_closing()

    def connection_lost(self, exc: Exception | None) -> None:
        self.connections.discard(self)
        if self.active is not None:
            self.active.hang_up()
        self.queue.clear()
        self.flow.resume_writing()
        self.last = True
        self.parser = None  # type: ignore[assignment]

    # What the parser finds

    def on_message_begin(self) -> None:
        if self._replaying:
            return
        if self.latest is not None and len(self.queue) >= self.limits.pipelined:
            self.latest.keep_alive = False
            self.last = True
        if self.last:
            raise Surplus
        super().on_message_begin()
        self.begun += 1
        self.in_head = True
        self._head_bytes = 0

    def on_url(self, url: bytes) -> None:
        if self._replaying:
            return
        self.url += url
        self._head_bytes = len(self.url)
        if self._head_bytes > self.limits.header_bytes:
            raise self._too_large()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._replaying:
            return
        self._head_bytes += len(name) + len(value) + 4
        if self._head_bytes > self.limits.header_bytes:
            raise self._too_large()
        if not self.in_head:
            return  # a trailer; nothing here has a use for one
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self._replaying:
            self._replaying = False
            return
        version = self.parser.get_http_version()
        method = self.parser.get_method().decode("ascii")
        self._check_head(version, method)
        target = parse_target(self.url, method)
        check_host(self.headers, version)
        if target.host is not None:
            self.headers[:] = [header for header in self.headers if header[0] != b"host"] + [(b"host", target.host)]
        self.scope["method"] = method
        self.scope["http_version"] = version
        self.scope["path"] = _unquote(target.path)
        self.scope["raw_path"] = target.path
        self.scope["query_string"] = target.query
        self.scope["asgi"]["spec_version"] = "2.4"  # `send` raises once the client is gone
        keep_alive = version == "1.1" and self.parser.should_keep_alive()
        self.in_head = False
        self._head_bytes = 0
        self._steps += 1
        self._upgrading = self.parser.should_upgrade()
        self.latest = Exchange(self, self.scope, keep_alive=keep_alive, length=self._length())
        if self.active is None:
            self._answer(self.latest)
        else:
            self.queue.append(self.latest)
            self.flow.pause_reading()

    def _check_head(self, version: str, method: str) -> None:
        codings = [value for name, value in self.headers if name == b"transfer-encoding"]
        if version not in ("1.1", "1.0"):
            raise Refused(HTTPStatus.BAD_REQUEST, f"HTTP/{version} is not spoken here")
        if method == "CONNECT":
            raise Refused(HTTPStatus.BAD_REQUEST, "this is no proxy to connect through")
        if codings and (version != "1.1" or [coding.lower() for coding in codings] != [b"chunked"]):
            raise Refused(HTTPStatus.BAD_REQUEST, "the only transfer coding is chunked, in HTTP/1.1")

    def _length(self) -> int | None:
        for name, value in self.headers:
            if name == b"content-length":
                return int(value)
            if name == b"transfer-encoding":
                return None
        return 0

    def on_body(self, body: bytes) -> None:
        self._steps += 1
        if self.latest is not None:
            self.latest.take_body(body)

    def on_message_complete(self) -> None:
        self._steps += 1
        if self._upgrading or self.latest is None:
            return
        self.latest.end_body()
        if not self.latest.keep_alive:
            self.last = True

    # Answers

    def _answer(self, exchange: Exchange) -> None:
        self.active = exchange
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
        most = f"{self.limits.header_bytes} bytes"
        if self.in_head and not self.headers and len(self.url) * 2 > self.limits.header_bytes:
            return Refused(HTTPStatus.REQUEST_URI_TOO_LONG, f"the request target is too long: it may have {most}")
        return Refused(
            HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"the headers are too large: together they may have {most}"
        )

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
            self.transport.close()
            return
        final = self.queue[-1] if self.queue else self.active
        final.keep_alive = False
        self.last = self.last or not final.more_body

    def check(self, now: float) -> None:
        """Ends a connection that has waited too long for one thing. Called once a second."""
        self._patience.check(self, now)


def _unquote(path: bytes) -> str:
    text = path.decode("ascii")
    return unquote(text) if "%" in text else text
