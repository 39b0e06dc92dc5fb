"""Responses that the application has cached, written without calling it.

An application may have a method `answer_at_once`, which takes a scope. The server calls it for a request without a body
on a connection that stays open and is not busy. What it returns needs neither a task nor ASGI messages. An extension in
each scope tells the application so. The bytes of each cached response are rendered once; only the date and the
request's id differ each time.

Of the requests that come in one read, at most one is answered this way. The others wait for their turns: uvloop reads
up to 2 MiB of a connection in one turn of the loop, and answering all of that at once would hold up the worker's other
connections for a third of a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol

from registry.asgi import Scope
from registry.server.http1.response_head import STATUS_LINES, Headers, check_response_headers, header_lines

CACHED_ANSWER_EXTENSION: Final = "entrepot.at_once"


class RenderableAnswer(Protocol):
    """A whole response with the status 200, including its length. `before` and `after` are the headers before and after
    the request's id."""

    before: Headers
    after: Headers
    body: bytes
    rendered: Any
    """For the server to keep the response's bytes in; None at first."""


class CachedAnswers:
    """Asks the application of one connection for cached responses."""

    def __init__(self, app: Any) -> None:
        self._ask: Callable[[Scope], tuple[RenderableAnswer, str] | None] | None = getattr(app, "answer_at_once", None)

    def extensions(self) -> dict[str, Any]:
        """Returns a new scope's extensions."""
        return {} if self._ask is None else {CACHED_ANSWER_EXTENSION: {}}

    def response(self, scope: Scope, default_headers: Headers) -> bytes | None:
        """Returns the whole response, if the application has cached it. Raises RuntimeError for invalid headers."""
        found = None if self._ask is None else self._ask(scope)
        if found is None:
            return None
        return _render(*found, default_headers)


def _render(answer: RenderableAnswer, request_id: str, default_headers: Headers) -> bytes:
    if answer.rendered is None:
        check_response_headers(answer.before + answer.after)
        answer.rendered = (
            b"".join([*header_lines(answer.before), b"x-request-id: "]),
            b"".join([b"\r\n", *header_lines(answer.after), b"\r\n", answer.body]),
        )
    before, after = answer.rendered
    return b"".join([STATUS_LINES[200], *header_lines(default_headers), before, request_id.encode("ascii"), after])
