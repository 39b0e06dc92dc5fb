"""Gets responses that the application has cached, without starting a task and without ASGI messages.

An application can have a method `answer_at_once(scope)`. It returns a cached response and the id of the request, or
None if no response is cached. The server calls it for a request without a body, on a connection that stays open and has
no other request in progress. If it returns None, the server calls the application through ASGI. An extension in the
scope of each request tells the application that the server calls this method. A cached response is called an *answer*.
The bytes of an answer are built only once, except the default headers (with the date) and the request id.

Of all requests that arrive in one read from the socket, the server answers at most one from the cache. It answers the
others in later iterations of the event loop. The reason: uvloop reads from a connection up to 32 times in one
iteration. If the server answered the requests of all these reads in this iteration, the worker's other connections
would have to wait. For 2 MiB of requests, the measured wait was a third of a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol

from registry.asgi import Scope
from registry.server.http1.response_head import STATUS_LINES, Headers, check_response_headers, header_parts

CACHED_ANSWER_EXTENSION: Final = "entrepot.at_once"
"""Key in `scope["extensions"]` of each request, if the application has the method `answer_at_once`. Its value is an
empty dictionary."""


class RenderableAnswer(Protocol):
    """A complete response with status 200, as the application has cached it."""

    headers_before_id: Headers
    """Headers before X-Request-Id. The first call of `render` empties the list."""
    headers_after_id: Headers
    """Headers after X-Request-Id. One of them is Content-Length. The first call of `render` empties the list."""
    body: bytes
    rendered: Any
    """None before the first call of `render`. That call makes two parts of the response from the two lists:

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
    checks the other headers, and stores their bytes in `answer.rendered`. Raises RuntimeError if one of them is not
    valid."""
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
