"""Reports the end of each request to the application, which counts and logs it.

An application can have two methods for this. `on_request_end(scope, end)` is called once for each request that the
application has answered, and with the scope None for each request that the server has refused itself.
`on_cached_answer(scope, answer, request_id)` is called for each response that `answer_at_once` has returned. Both are
called when the last byte of the response has been passed to the transport or the kernel, or when the request was cut
off. A third method, `on_connection(change)`, is called with 1 for each new connection and with -1 when it has ended.
All of them must return at once and raise nothing.

The server puts an empty dictionary into the scope's extensions, in which the application can note what it knows about
the request. It is emptied after the report, because it may refer to the scope.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from registry.asgi import REQUEST_NOTES_EXTENSION, Scope


class RequestEnd(NamedTuple):
    """How a request ended.

    - `status`: the status of the response; 0: no response was begun.
    - `received_bytes`, `sent_bytes`: sizes of the two bodies, as far as they were received and sent.
    - `seconds`: time since the head of the request was received.
    - `is_complete`: the whole response was sent."""

    status: int
    received_bytes: int
    sent_bytes: int
    seconds: float
    is_complete: bool


class RequestReports:
    """Passes reports to the application, if it takes them."""

    __slots__ = ("_on_cached_answer", "_on_connection", "_on_end")

    def __init__(self, app: Any) -> None:
        self._on_end: Callable[[Scope | None, RequestEnd], None] | None = getattr(app, "on_request_end", None)
        self._on_cached_answer: Callable[[Scope, Any, str], None] | None = getattr(app, "on_cached_answer", None)
        self._on_connection: Callable[[int], None] | None = getattr(app, "on_connection", None)

    def report_connection(self, change: int) -> None:
        """Reports a new connection (1), or the end of one (-1)."""
        if self._on_connection is not None:
            self._on_connection(change)

    def add_extension(self, extensions: dict[str, Any]) -> None:
        """Adds the dictionary for the application's notes to the extensions of a new scope."""
        if self._on_end is not None:
            extensions[REQUEST_NOTES_EXTENSION] = {}

    def report(self, scope: Scope, end: RequestEnd) -> None:
        """Reports a request that the application has answered, or that was cut off."""
        if self._on_end is not None:
            self._on_end(scope, end)
            scope["extensions"][REQUEST_NOTES_EXTENSION].clear()

    def report_refused(self, status: int, sent_bytes: int) -> None:
        """Reports a request that the server has refused without calling the application."""
        if self._on_end is not None:
            self._on_end(None, RequestEnd(status, 0, sent_bytes, 0.0, is_complete=True))

    def report_cached(self, scope: Scope, answer: object, request_id: str) -> None:
        """Reports a request that a cached response has answered."""
        if self._on_cached_answer is not None:
            self._on_cached_answer(scope, answer, request_id)
