"""Answers, and what can be wrong with them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from .shelf import Body, Mapped

_REASONS = {200: "OK", 206: "Partial Content", 307: "Temporary Redirect", 429: "Too Many Requests"}
_CODES = {400: "UNSUPPORTED", 401: "UNAUTHORIZED", 403: "DENIED", 404: "NAME_UNKNOWN", 429: "TOOMANYREQUESTS"}


@dataclass(frozen=True)
class Answer:
    """A status with headers, and the bytes from `start` to `stop` of a body."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Body = field(default_factory=lambda: Mapped(b""))
    start: int = 0
    stop: int = 0

    def head(self, *, close: bool) -> bytes:
        lines = [f"HTTP/1.1 {self.status} {_REASONS.get(self.status, 'Said So')}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        lines += ["Connection: close"] if close else []
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def error(status: int, message: str, headers: Mapping[str, str] | None = None, code: str = "") -> Answer:
    """An error as the specification has it; one that it does not know is a page of HTML, as from a load balancer."""
    code = code or _CODES.get(status, "")
    if not code:
        return page(status, message, headers)
    document = {"errors": [{"code": code, "message": message, "detail": None}]}
    return text(status, json.dumps(document) + "\n", "application/json", headers)


def page(status: int, message: str, headers: Mapping[str, str] | None = None) -> Answer:
    """An error as a load balancer has it."""
    return text(status, f"<html><body><h1>{status} {message}</h1></body></html>\n", "text/html", headers)


def text(status: int, body: str, media_type: str, headers: Mapping[str, str] | None = None) -> Answer:
    data = body.encode()
    described = {"Content-Type": media_type, "Content-Length": str(len(data)), **(headers or {})}
    return Answer(status, described, Mapped(data), 0, len(data))


def part(status: int, headers: Mapping[str, str], body: Body, start: int, stop: int) -> Answer:
    """The bytes from `start` to `stop` of a body, with the headers that say so."""
    described = {**headers, "Content-Length": str(stop - start)}
    if status == 206:
        described["Content-Range"] = f"bytes {start}-{stop - 1}/{body.size}"
    return Answer(status, described, body, start, stop)


def endless(answer: Answer) -> Answer:
    """Without a Content-Length: whoever reads it does not know where it ends."""
    headers = {name: value for name, value in answer.headers.items() if name != "Content-Length"}
    return Answer(answer.status, headers, answer.body, answer.start, answer.stop)


def shifted(answer: Answer, by: int) -> Answer:
    """A range that begins later than it was asked for."""
    if answer.status != 206 or answer.start + by >= answer.stop:
        return answer
    return part(206, answer.headers, answer.body, answer.start + by, answer.stop)


def corrupted(answer: Answer, offset: int) -> Answer:
    """The same with another byte at `offset` of the body."""
    return Answer(answer.status, answer.headers, _Corrupt(answer.body, offset), answer.start, answer.stop)


@dataclass(frozen=True)
class _Corrupt:
    under: Body
    offset: int

    @property
    def size(self) -> int:
        return self.under.size

    def pieces(self, start: int, stop: int) -> Iterator[memoryview]:
        for piece in self.under.pieces(start, stop):
            at = self.offset - start
            if 0 <= at < len(piece):
                wrong = bytearray(piece)
                wrong[at] ^= 0xFF
                piece = memoryview(wrong)
            yield piece
            start += len(piece)
