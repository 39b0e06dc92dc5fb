"""Error responses of the server itself, without the application.

They have the error format of the distribution spec, and are the last response on their connection.
"""

from __future__ import annotations

import json
from http import HTTPStatus

from registry.server.http1.response_head import STATUS_LINES, Headers, header_lines


class RefusedRequest(Exception):
    """The request is answered with `status` and `message`, and the connection ends."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        self.status = status
        self.message = message
        super().__init__(message)


def head_too_large(most: int, *, by_target: bool) -> RefusedRequest:
    """Returns the error for a head of more than `most` bytes. `by_target`: the request's target is too long."""
    if by_target:
        return RefusedRequest(
            HTTPStatus.REQUEST_URI_TOO_LONG, f"the request target is too long: it may have {most} bytes"
        )
    return RefusedRequest(
        HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"the headers are too large: together they may have {most} bytes"
    )


def error_headers(body: bytes) -> Headers:
    """Returns the headers of an error response."""
    return [
        (b"docker-distribution-api-version", b"registry/2.0"),
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]


def error_body(message: str, *, code: str = "UNSUPPORTED") -> bytes:
    """Returns the body of an error response: see the distribution spec, "Error Codes"."""
    return json.dumps({"errors": [{"code": code, "message": message}]}, separators=(",", ":")).encode()


def error_response(refused: RefusedRequest, default_headers: Headers) -> bytes:
    """Returns a whole HTTP/1.1 response. `default_headers` are the headers that every response starts with."""
    body = error_body(refused.message)
    return b"".join([STATUS_LINES[refused.status], *header_lines(default_headers + error_headers(body)), b"\r\n", body])
