"""Error responses that the server sends itself, without calling the application, such as 400 for a malformed request.

Their body has the error format of the distribution spec. The connection is closed after such a response.
"""

from __future__ import annotations

import json
from http import HTTPStatus

from registry.server.http1.response_head import STATUS_LINES, Headers, header_lines


class RefusedRequest(Exception):
    """The server refuses a request: it responds with `status` and an error body with `message`, and closes the
    connection."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        self.status = status
        self.message = message
        super().__init__(message)


def head_too_large(max_bytes: int, *, is_target_too_long: bool) -> RefusedRequest:
    """Returns the error for a request head of more than `max_bytes` bytes: 414 if the request target is too long, 431
    otherwise."""
    if is_target_too_long:
        return RefusedRequest(
            HTTPStatus.REQUEST_URI_TOO_LONG, f"the request target is too long: it may have {max_bytes} bytes"
        )
    return RefusedRequest(
        HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
        f"the headers are too large: together they may have {max_bytes} bytes",
    )


def error_headers(body: bytes) -> Headers:
    """Returns the headers of an error response with the given body."""
    return [
        (b"docker-distribution-api-version", b"registry/2.0"),
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]


def error_body(message: str, *, code: str = "UNSUPPORTED") -> bytes:
    """Returns the JSON body of an error response, with one of the codes of the distribution spec, "Error Codes"."""
    return json.dumps({"errors": [{"code": code, "message": message}]}, separators=(",", ":")).encode()


def error_response(refused: RefusedRequest, default_headers: Headers) -> bytes:
    """Returns the complete HTTP/1.1 response, head and body, that refuses a request. `default_headers` are the headers
    that every response of the server begins with."""
    body = error_body(refused.message)
    return b"".join([STATUS_LINES[refused.status], *header_lines(default_headers + error_headers(body)), b"\r\n", body])
