"""Answers the server gives itself, without the application: always the spec's error shape, always the last answer."""

from __future__ import annotations

import json
from http import HTTPStatus

Headers = list[tuple[bytes, bytes]]


class RefusedRequest(Exception):
    """This request is answered with `status` and `message`, and the connection ends. Raised inside parser callbacks."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        self.status = status
        self.message = message
        super().__init__(message)


def head_too_large(most: int, *, by_target: bool) -> RefusedRequest:
    """For a head of more than `most` bytes; `by_target`: it is the request's target that is too long."""
    if by_target:
        return RefusedRequest(
            HTTPStatus.REQUEST_URI_TOO_LONG, f"the request target is too long: it may have {most} bytes"
        )
    return RefusedRequest(
        HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"the headers are too large: together they may have {most} bytes"
    )


class RequestAfterLast(Exception):
    """The client sent more although the answer before is the last one: it is not looked at, and nobody is told."""


def error_headers(body: bytes) -> Headers:
    return [
        (b"docker-distribution-api-version", b"registry/2.0"),
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]


def error_body(message: str, *, code: str = "UNSUPPORTED") -> bytes:
    """See the distribution spec, "Error Codes"."""
    return json.dumps({"errors": [{"code": code, "message": message}]}, separators=(",", ":")).encode()


def error_response(refused: RefusedRequest, date: Headers) -> bytes:
    """A whole HTTP/1.1 response."""
    body = error_body(refused.message)
    lines = [b"HTTP/1.1 %d %s\r\n" % (refused.status, refused.status.phrase.encode())]
    lines += [b"%s: %s\r\n" % header for header in date + error_headers(body)]
    return b"".join([*lines, b"\r\n", body])
