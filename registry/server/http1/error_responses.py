"""Answers the server gives itself, without the application: always the spec's error shape, always the last answer."""

from __future__ import annotations

import json
from http import HTTPStatus

from registry.server.http1.response_head import STATUS_LINES, Headers, header_lines


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
    return b"".join([STATUS_LINES[refused.status], *header_lines(date + error_headers(body)), b"\r\n", body])
