"""Gets cached responses (*answers*) from the application, and makes their bytes. This is faster than a call of the
application through ASGI, because it needs no task and no ASGI messages.

An application can have a method `answer_at_once(scope)`. The method returns an answer and the id of the request, or
None if no response is cached. The server calls the method for a request without a body, if the connection stays open
after the request and no other request is in progress. After None, the server calls the application through ASGI.

The server answers from the cache at most one of the requests that arrive in one read from the socket. Without this
limit, a client that sends many requests at once would delay the worker's other connections.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol

from registry.asgi import Scope
from registry.server.http1.response_head import STATUS_LINES, Headers, check_response_headers, header_parts

CACHED_ANSWER_EXTENSION: Final = "entrepot.at_once"
"""Key in `scope["extensions"]` of each request, if the application has the method `answer_at_once`. The key tells the
application that the server calls this method. The value is an empty dictionary."""


class RenderableAnswer(Protocol):
    """A complete response with status 200, as the application has cached it."""

    headers_before_id: Headers
    """Headers before X-Request-Id. The first call of `render` empties the list."""
    headers_after_id: Headers
    """Headers after X-Request-Id. One of them is Content-Length. The first call of `render` empties the list."""
    body: bytes
    rendered: Any
    """None before the first call of `render`. Afterwards a tuple with two parts of the response:

    - the bytes after the default headers and before the value of X-Request-Id
    - the bytes after the value of X-Request-Id and before the body"""


class CachedAnswers:
    """Gets cached responses from the application, for the requests of one connection."""

    def __init__(self, app: Any) -> None:
        self._answer_at_once: Callable[[Scope], tuple[RenderableAnswer, str] | None] | None
        self._answer_at_once = getattr(app, "answer_at_once", None)

    def extensions(self) -> dict[str, Any]:
        """Returns the initial value of a new scope's `extensions`."""
        return {} if self._answer_at_once is None else {CACHED_ANSWER_EXTENSION: {}}

    def find(self, scope: Scope) -> tuple[RenderableAnswer, str] | None:
        """Returns the cached response to a request, and the request's id. Returns None if no response is cached."""
        return None if self._answer_at_once is None else self._answer_at_once(scope)


def render(answer: RenderableAnswer, request_id: str, default_headers: Headers) -> bytes:
    """Returns the bytes of the complete response. Its first headers are `default_headers`. The first call for an answer
    checks the answer's own headers, and stores their bytes in `answer.rendered` for later calls. Raises RuntimeError if
    one of the answer's headers is not valid."""
    if answer.rendered is None:
        check_response_headers(answer.headers_before_id + answer.headers_after_id)
        answer.rendered = (
            b"".join([*header_parts(answer.headers_before_id), b"x-request-id: "]),
            b"".join([b"\r\n", *header_parts(answer.headers_after_id), b"\r\n"]),
        )
        answer.headers_before_id, answer.headers_after_id = [], []
    before, after = answer.rendered
    return b"".join(
        [STATUS_LINES[200], *header_parts(default_headers), before, request_id.encode("ascii"), after, answer.body]
    )
