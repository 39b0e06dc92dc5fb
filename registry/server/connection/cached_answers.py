"""Answers that an application has ready before it is called.

An application may have a method `answer_at_once`, which takes a scope. It is asked for requests without a body, on
connections that are kept, while nothing else is being answered there; the answer it gives needs no task and no ASGI
message. It is told by an extension in each scope that it may be asked. How an answer looks on the wire is found out
once; each time only its date and the request's id are new.

Of the requests that come in one piece only one is answered so. Those sent ahead wait for their turns as any others do:
uvloop reads up to 2 MiB of a connection in one turn of the loop, and the ready answers to all of that kept everybody
else waiting for a third of a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from registry.server.http1.request_head import check_response_headers

CACHED_ANSWER_EXTENSION: Final = "entrepot.at_once"
Header = tuple[bytes, bytes]


class RenderableAnswer(Protocol):
    """A whole answer with the status 200. `before` and `after` are its headers but that of the request's id, which
    stands between them; they say the length."""

    before: list[Header]
    after: list[Header]
    body: bytes
    rendered: Any


class CachedAnswers:
    """What one connection asks `app`, if that has any."""

    def __init__(self, app: Any) -> None:
        self._ask: Callable[[Any], tuple[RenderableAnswer, str] | None] | None = getattr(app, "answer_at_once", None)
        self.given = False
        """One of what came last has had its answer so."""

    def offer(self) -> dict[str, Any]:
        """The extensions of a scope, to begin with."""
        return {} if self._ask is None else {CACHED_ANSWER_EXTENSION: {}}

    def answer(self, scope: Any, fresh: Iterable[Header]) -> bytes | None:
        """The bytes of the answer, if there is one. `fresh` are the headers of every response. Raises RuntimeError for
        headers that are not valid."""
        found = None if self._ask is None or self.given else self._ask(scope)
        if found is None:
            return None
        self.given = True
        return _render(*found, fresh)


def _render(answer: RenderableAnswer, request: str, fresh: Iterable[Header]) -> bytes:
    if answer.rendered is None:
        check_response_headers(answer.before + answer.after)
        answer.rendered = (
            b"".join([*_lines(answer.before), b"x-request-id: "]),
            b"".join([b"\r\n", *_lines(answer.after), b"\r\n", answer.body]),
        )
    before, after = answer.rendered
    return b"".join([STATUS_LINE[200], *_lines(fresh), before, request.encode("ascii"), after])


def _lines(headers: Iterable[Header]) -> list[bytes]:
    return [part for name, value in headers for part in (name, b": ", value, b"\r\n")]
