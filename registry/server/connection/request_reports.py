"""Reports the end of each request to the application, which counts and logs it.

An application can have an attribute `request_recorder`, an object with these methods. They must return at once and
raise nothing.

- `on_request_end(scope, end)` is called once for each request that was passed to the application:
  - if the body is sent from a file: when the kernel has the last byte of the file;
  - if the response is cut off, for example because the client disconnects: when the application's call has ended;
  - for any other response: just before the server passes the last bytes of the response to the transport.
- `on_cached_answer(scope, answer, request_id)` is called for each cached response that the server got from the
  application's method `answer_at_once` (`cached_answers`), just before the server passes the last bytes of the response
  to the transport.
- `on_refused(scope, end)` is called for each request or connection that the server refuses without calling the
  application: after the server has written the error response, or when it closes the connection without a response. The
  scope has only the keys `type`, `method`, `path`, `raw_path`, `headers` and `client`, and also `scheme` if a trusted
  proxy states the scheme. The method, the paths and the headers are empty if the server does not know them.
- `on_connection(change)` is called with 1 for each new connection, and with -1 for each connection that has ended.

The server adds an empty dictionary to the scope's extensions (`REQUEST_NOTES_EXTENSION`). The application can note in
this dictionary what it knows about the request. The server empties the dictionary after the report. Otherwise a note
that refers to the scope would form a reference cycle.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from registry.asgi import REQUEST_NOTES_EXTENSION, Header, Scope

log = logging.getLogger(__name__)


class RequestEnd(NamedTuple):
    """How a request ended.

    - `status`: the HTTP status of the response; 0 if the server has begun no response.
    - `received_bytes`: how many bytes of the request's body were received.
    - `sent_bytes`: how many bytes of the response's body were sent.
    - `seconds`: time from the end of the request's head to this report; 0 in a call of `on_refused`.
    - `is_complete`: whether the whole response was sent.
    - `reason`: one line that says why the server itself refused the request; empty if the server did not refuse it."""

    status: int
    received_bytes: int
    sent_bytes: int
    seconds: float
    is_complete: bool
    reason: str = ""


def partial_scope(
    client: tuple[str, int] | None, method: str = "", path: bytes = b"", headers: list[Header] | None = None
) -> Scope:
    """Returns a scope for `on_refused`, with the known values of the request. `path` is percent-encoded."""
    path_text = path.decode("latin-1")
    return {
        "type": "http",
        "method": method,
        "path": path_text,
        "raw_path": path,
        "headers": headers or [],
        "client": client,
    }


_REQUEST_LINE: Final = re.compile(rb"([A-Z]{1,20}) (/[!->@-~]*)")
"""The beginning of a request line: the method, and the path without the query."""


class RequestReports:
    """Passes reports to the application, if the application has a `request_recorder`."""

    __slots__ = ("_on_cached_answer", "_on_connection", "_on_end", "_on_refused")

    def __init__(self, app: Any) -> None:
        recorder = getattr(app, "request_recorder", None)
        self._on_end: Callable[[Scope, RequestEnd], None] | None = getattr(recorder, "on_request_end", None)
        self._on_refused: Callable[[Scope, RequestEnd], None] | None = getattr(recorder, "on_refused", None)
        self._on_cached_answer: Callable[[Scope, Any, str], None] | None = getattr(recorder, "on_cached_answer", None)
        self._on_connection: Callable[[int], None] | None = getattr(recorder, "on_connection", None)

    def report_connection(self, change: int) -> None:
        """Reports a new connection (`change` is 1) or the end of a connection (-1)."""
        if self._on_connection is not None:
            self._on_connection(change)

    def add_extension(self, extensions: dict[str, Any]) -> None:
        """Adds the dictionary for the application's notes to the extensions of a new scope."""
        if self._on_end is not None:
            extensions[REQUEST_NOTES_EXTENSION] = {}

    def report_end(self, scope: Scope, end: RequestEnd) -> None:
        """Reports the end of a request that was passed to the application. Logs an exception of `on_request_end` and
        does not raise it, so that the client still gets the response."""
        if self._on_end is not None:
            try:
                self._on_end(scope, end)
            except Exception:
                log.exception("the end of a request could not be reported")
            scope["extensions"][REQUEST_NOTES_EXTENSION].clear()

    def report_refused(self, scope: Scope, status: int, reason: str, sent_bytes: int = 0) -> None:
        """Reports a request or a connection that the server has refused without calling the application. `scope`: made
        by `partial_scope`. `status`: the HTTP status; 0: the client got no response. `reason`: one line for people."""
        if self._on_refused is not None:
            self._on_refused(scope, RequestEnd(status, 0, sent_bytes, 0.0, is_complete=status != 0, reason=reason))

    def report_refused_connection(
        self, client: tuple[str, int] | None, received: bytes, status: int, reason: str
    ) -> None:
        """Reports a connection that the server closes without parsing a request. `received` contains the bytes that the
        client has sent."""
        line = _REQUEST_LINE.match(received)
        scope = partial_scope(client) if line is None else partial_scope(client, line[1].decode(), line[2])
        self.report_refused(scope, status, reason)

    def report_cached(self, scope: Scope, answer: object, request_id: str) -> None:
        """Reports a request that the server has answered with a cached response."""
        if self._on_cached_answer is not None:
            self._on_cached_answer(scope, answer, request_id)
