"""Parses the heads of the requests of one connection into ASGI scopes, with httptools (llhttp).

The parser sees heads only. Bodies do not pass through it: the connection cuts them out of what it receives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus

import httptools

from registry.asgi import Scope
from registry.server.connection.context import ConnectionContext
from registry.server.http1.error_responses import RefusedRequest, head_too_large
from registry.server.http1.request_head import body_length, fill_scope, find_head_end
from registry.server.http1.response_head import Headers
from registry.server.server_limits import HEADER_COST


class RequestAfterLast(Exception):
    """The client sent another request although the one before is the last. It is ignored."""


@dataclass(slots=True)
class RequestHead:
    """A complete head."""

    scope: Scope
    length: int | None
    """Bytes of the body; None if it comes in chunks."""
    keep_alive: bool
    expects_continue: bool
    """The client waits for a 100 (Continue) before it sends the body."""
    size: int
    """Bytes of the head, with each header counted as `HEADER_COST` at least."""


class HeadParser:
    """Takes the bytes of heads from `feed`, and httptools' callbacks (`on_…`)."""

    def __init__(self, context: ConnectionContext, on_begin: Callable[[], None]) -> None:
        """`on_begin` is called for the first byte of each request; what it raises ends the parsing."""
        self._connection_scope = {
            "type": "http",
            "server": context.server,
            "client": context.client,
            "scheme": "https" if context.is_tls else "http",
            "root_path": "",
        }
        self._state = context.worker.lifespan_state
        self._limit = context.worker.limits.header_bytes
        self._on_begin: Callable[[], None] | None = on_begin
        # Strict: with leniency for data after `Connection: close`, requests would run that nobody answers.
        self._parser = httptools.HttpRequestParser(self)
        self._tail = b""  # the head's last bytes so far: where it ends may be cut in two
        self._head: RequestHead | None = None
        self._url = b""
        self._headers: Headers = []
        self._expects_continue = False
        self._size = 0
        self.is_in_head = False
        """A head has begun and is not complete."""

    def feed(self, data: bytes, at: int) -> tuple[int, RequestHead | None]:
        """Parses the bytes of `data` from `at` on that belong to one head, and no byte more.

        Returns where they end, and the head if it is complete. Raises RefusedRequest for a head that is malformed or
        too large, and what `on_begin` raised. Nothing can be parsed after that.
        """
        stop = find_head_end(self._tail, data, at)
        part = data if stop - at == len(data) else data[at:stop]
        try:
            self._parser.feed_data(part)
        except httptools.HttpParserUpgrade:
            pass  # served as the HTTP/1.1 it is (RFC 9110, section 7.8)
        except httptools.HttpParserCallbackError as error:
            raise error.__context__ or error from None
        except httptools.HttpParserError as error:
            raise RefusedRequest(HTTPStatus.BAD_REQUEST, f"this is not a valid HTTP/1.1 request: {error}") from None
        head = self._head
        if head is None:
            self._tail = (self._tail + part[-3:])[-3:]
            return stop, None
        self._head = None
        self._tail = b""
        if head.length != 0 or self._parser.should_upgrade():
            self._parser = httptools.HttpRequestParser(self)  # this one waits for the body, which it will not see
        return stop, head

    def close(self) -> None:
        """Ends the parsing, and breaks the cycles of references between this, httptools' parser and `on_begin`."""
        del self._parser
        self._on_begin = None

    def too_large(self) -> RefusedRequest:
        """Returns what to refuse a head with that is larger than the limit."""
        by_target = self.is_in_head and not self._headers and len(self._url) * 2 > self._limit
        return head_too_large(self._limit, by_target=by_target)

    # Called by httptools

    def on_message_begin(self) -> None:
        if self._on_begin is not None:
            self._on_begin()
        self._url = b""
        self._headers = []
        self._expects_continue = False
        self._size = 0
        self.is_in_head = True

    def on_url(self, url: bytes) -> None:
        self._url += url
        self._size = len(self._url)
        if self._size > self._limit:
            raise self.too_large()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._size += max(len(name) + len(value) + 4, HEADER_COST)
        if self._size > self._limit:
            raise self.too_large()
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self._expects_continue = True
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        parser, headers = self._parser, self._headers
        version = parser.get_http_version()
        scope = {
            **self._connection_scope,
            "asgi": {"version": "3.0", "spec_version": "2.4"},  # 2.4: `send` raises once the client is gone
            "headers": headers,
            "state": self._state.copy(),
        }
        fill_scope(scope, headers, self._url, version, parser.get_method().decode("ascii"))
        is_current = version == "1.1"
        self._head = RequestHead(
            scope,
            body_length(headers),
            is_current and parser.should_keep_alive(),
            is_current and self._expects_continue,
            self._size,
        )
        self.is_in_head = False

    def on_body(self, body: bytes) -> None:
        # The parser would frame the request in another way than the connection does.
        raise RefusedRequest(HTTPStatus.BAD_REQUEST, "the request is not framed as it must be")
