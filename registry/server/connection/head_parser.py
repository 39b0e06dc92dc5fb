"""Parses the heads (request line and headers) of one connection's requests into ASGI scopes, with httptools (llhttp).

The httptools parser gets only heads: `registry.server.connection.request_reader` separates heads from bodies. httptools
does not parse a head that is in the cache of parsed heads (`registry.server.connection.head_cache`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import httptools

from registry.asgi import Scope
from registry.server.connection.context import ConnectionContext
from registry.server.connection.request_reports import partial_scope
from registry.server.http1.error_responses import RefusedRequest, head_too_large_error
from registry.server.http1.request_head import body_length, fill_scope, find_head_end
from registry.server.http1.response_head import Headers
from registry.server.server_limits import MIN_HEADER_COST


@dataclass(slots=True)
class RequestHead:
    """The complete, valid head of a request."""

    scope: Scope
    body_length: int | None
    """Length of the request's body in bytes; None if the body is chunked."""
    keep_alive: bool
    """Whether the client allows the server to keep the connection open after the response. Always False for
    HTTP/1.0."""
    expects_continue: bool
    """Whether the client waits for a 100 (Continue) response before it sends the body. Always False for HTTP/1.0."""
    size: int
    """Length of the request target and all headers in bytes. A header shorter than `MIN_HEADER_COST` bytes counts as
    `MIN_HEADER_COST` bytes."""


class HeadParser:
    """Parses the heads of one connection. The request reader calls `feed`; httptools calls the methods `on_…`."""

    def __init__(self, context: ConnectionContext, on_start: Callable[[], None]) -> None:
        """`on_start` is called at the first byte of each request."""
        self._connection_scope = {
            "type": "http",
            "server": context.server,
            "client": context.client,
            "scheme": "https" if context.is_tls else "http",
            "root_path": "",
        }
        self._client, self._proxies = context.client, context.proxies
        self._state = context.worker.lifespan_state
        self._cache = context.worker.head_cache
        self._limit = context.worker.limits.head_bytes
        self._on_start: Callable[[], None] | None = on_start
        # The option of httptools to accept further requests after a request with `Connection: close` stays off: the
        # server closes the connection, and cannot answer further requests.
        self._parser = httptools.HttpRequestParser(self)
        self._tail = b""  # the last bytes of an incomplete head, at most 3: the CRLFCRLF may begin in them
        self._head: RequestHead | None = None  # set by `on_headers_complete` for `feed`
        self._target = b""
        self._headers: Headers = []
        self._expects_continue = False
        self._size = 0
        self.is_in_head = False
        """Whether httptools has parsed the beginning of a head, but not yet its end."""

    def feed(self, data: bytes, start: int) -> tuple[int, RequestHead | None]:
        """Parses the bytes of one head in `data`: from the offset `start` to the head's end, or to the end of `data` if
        the head does not end in `data`.

        Returns the offset after the parsed bytes, and the head, or None if the head is not complete yet. Raises
        RefusedRequest for a head that is malformed or too large. Do not call `feed` again after an exception.
        """
        end_offset = find_head_end(self._tail, data, start)
        head_bytes = data if end_offset - start == len(data) else data[start:end_offset]
        is_head_start = not self._tail
        if is_head_start and (found := self._cache.find(head_bytes)) is not None:
            fields, headers, size = found
            if size <= self._limit:
                if self._on_start is not None:
                    self._on_start()
                scope = self._new_scope(headers, fields)
                return end_offset, RequestHead(scope, 0, keep_alive=True, expects_continue=False, size=size)
        try:
            self._parser.feed_data(head_bytes)
        except httptools.HttpParserUpgrade:
            pass  # the client asks for another protocol; the server ignores the Upgrade header (RFC 9110, section 7.8)
        except httptools.HttpParserCallbackError as error:
            raise error.__context__ or error from None  # the exception of a method `on_…`
        except httptools.HttpParserError as error:
            raise RefusedRequest(HTTPStatus.BAD_REQUEST, f"this is not a valid HTTP/1.1 request: {error}") from None
        head = self._head
        if head is None:
            self._tail = (self._tail + head_bytes[-3:])[-3:]
            return end_offset, None
        self._head = None
        self._tail = b""
        if head.body_length != 0 or self._parser.should_upgrade():
            # This parser now expects a body or another protocol. Only a new parser accepts the next head.
            self._parser = httptools.HttpRequestParser(self)
        elif is_head_start and head.keep_alive and not head.expects_continue:
            self._cache.add(head_bytes, head.scope, head.size)
        return end_offset, head

    def _new_scope(self, headers: Headers, fields: Mapping[str, Any]) -> Scope:
        """Returns a new scope. `fields`: the items that depend on the request line; empty if the caller adds these
        items."""
        return {
            **self._connection_scope,
            **fields,
            "asgi": {"version": "3.0", "spec_version": "2.4"},  # 2.4: `send` raises if the client has disconnected
            "headers": headers,
            "state": self._state.copy(),
        }

    def partial_scope(self) -> Scope:
        """Returns the known items of the scope of a request whose head is incomplete or refused
        (`request_reports.partial_scope`). Leaves out a request target that is not a path, because a target such as
        `http://name:password@host/` can contain a password."""
        if not self.is_in_head or not self._target:
            return partial_scope(self._client)
        path = self._target.partition(b"?")[0] if self._target.startswith(b"/") else b""
        headers = [*self._headers]
        scope = partial_scope(self._client, self._parser.get_method().decode("ascii"), path, headers)
        if self._proxies is not None:
            self._proxies.apply(scope, headers)
        return scope

    def close(self) -> None:
        """Called when the connection is lost. Breaks the reference cycles with the httptools parser and `on_start`, so
        that memory is freed without the garbage collector. `feed` must not be called afterwards."""
        del self._parser
        self._on_start = None

    def too_large_error(self) -> RefusedRequest:
        """Returns the error with which the server refuses a head that is larger than the limit. If the request target
        is longer than half the limit and no header was parsed yet, the error says that the request target is too long.
        Otherwise, the error says that the headers are too large."""
        is_target_too_long = self.is_in_head and not self._headers and len(self._target) * 2 > self._limit
        return head_too_large_error(self._limit, is_target_too_long=is_target_too_long)

    # Called by httptools

    def on_message_begin(self) -> None:
        if self._on_start is not None:
            self._on_start()
        self._target = b""
        self._headers = []
        self._expects_continue = False
        self._size = 0
        self.is_in_head = True

    def on_url(self, url: bytes) -> None:
        self._target += url
        self._size = len(self._target)
        if self._size > self._limit:
            raise self.too_large_error()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._size += max(len(name) + len(value) + 4, MIN_HEADER_COST)  # 4 bytes are the colon, the space and the CRLF
        if self._size > self._limit:
            raise self.too_large_error()
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self._expects_continue = True
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        parser, headers = self._parser, self._headers
        version = parser.get_http_version()
        scope = self._new_scope(headers, {})
        fill_scope(scope, headers, self._target, version, parser.get_method().decode("ascii"))
        is_http_1_1 = version == "1.1"
        self._head = RequestHead(
            scope,
            body_length=body_length(headers),
            keep_alive=is_http_1_1 and parser.should_keep_alive(),
            expects_continue=is_http_1_1 and self._expects_continue,
            size=self._size,
        )
        self.is_in_head = False

    def on_body(self, body: bytes) -> None:
        # httptools gets only heads. If httptools finds a body, it disagrees with `find_head_end` about where the head
        # ends.
        raise RefusedRequest(HTTPStatus.BAD_REQUEST, "it is not clear where the head of the request ends")
