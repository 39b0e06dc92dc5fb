"""Responses of the fake Docker Hub, and functions that make a response faulty."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from .hub_content import MappedBody, ReadableBody

_REASONS = {200: "OK", 206: "Partial Content", 307: "Temporary Redirect", 429: "Too Many Requests"}
_ERROR_CODES = {400: "UNSUPPORTED", 401: "UNAUTHORIZED", 403: "DENIED", 404: "NAME_UNKNOWN", 429: "TOOMANYREQUESTS"}


@dataclass(frozen=True)
class HubAnswer:
    """A response with the bytes `start` to `stop` of `body`."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: ReadableBody = field(default_factory=lambda: MappedBody(b""))
    start: int = 0
    stop: int = 0

    def head(self, *, close: bool) -> bytes:
        lines = [f"HTTP/1.1 {self.status} {_REASONS.get(self.status, 'Other Status')}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        lines += ["Connection: close"] if close else []
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def error(status: int, message: str, headers: Mapping[str, str] | None = None, code: str = "") -> HubAnswer:
    """Returns an error response in the form of the OCI distribution spec. Without an error code for the status, returns
    a `page`."""
    code = code or _ERROR_CODES.get(status, "")
    if not code:
        return page(status, message, headers)
    document = {"errors": [{"code": code, "message": message, "detail": None}]}
    return text(status, json.dumps(document) + "\n", "application/json", headers)


def page(status: int, message: str, headers: Mapping[str, str] | None = None) -> HubAnswer:
    """Returns an HTML error page, as from a load balancer."""
    return text(status, f"<html><body><h1>{status} {message}</h1></body></html>\n", "text/html", headers)


def text(status: int, body: str, media_type: str, headers: Mapping[str, str] | None = None) -> HubAnswer:
    data = body.encode()
    all_headers = {"Content-Type": media_type, "Content-Length": str(len(data)), **(headers or {})}
    return HubAnswer(status, all_headers, MappedBody(data), 0, len(data))


def part(status: int, headers: Mapping[str, str], body: ReadableBody, start: int, stop: int) -> HubAnswer:
    """Returns a response with the bytes `start` to `stop` of a body."""
    all_headers = {**headers, "Content-Length": str(stop - start)}
    if status == 206:
        all_headers["Content-Range"] = f"bytes {start}-{stop - 1}/{body.size}"
    return HubAnswer(status, all_headers, body, start, stop)


def without_length(answer: HubAnswer) -> HubAnswer:
    """Returns the response without Content-Length. The end of the connection then marks the end of the body."""
    headers = {name: value for name, value in answer.headers.items() if name != "Content-Length"}
    return HubAnswer(answer.status, headers, answer.body, answer.start, answer.stop)


def shifted(answer: HubAnswer, by: int) -> HubAnswer:
    """Returns the response with a range that starts `by` bytes too late."""
    if answer.status != 206 or answer.start + by >= answer.stop:
        return answer
    return part(206, answer.headers, answer.body, answer.start + by, answer.stop)


def corrupted(answer: HubAnswer, offset: int) -> HubAnswer:
    """Returns the response with a wrong byte at `offset` of the body."""
    return HubAnswer(answer.status, answer.headers, _CorruptBody(answer.body, offset), answer.start, answer.stop)


@dataclass(frozen=True)
class _CorruptBody:
    """A body with a wrong byte at `offset`."""

    original: ReadableBody
    offset: int

    @property
    def size(self) -> int:
        return self.original.size

    def pieces(self, start: int, stop: int) -> Iterator[memoryview]:
        for piece in self.original.pieces(start, stop):
            index = self.offset - start
            if 0 <= index < len(piece):
                wrong = bytearray(piece)
                wrong[index] ^= 0xFF
                piece = memoryview(wrong)
            yield piece
            start += len(piece)
