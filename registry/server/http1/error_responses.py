"""Error responses that the server sends without calling the application, such as 400 for a malformed request.

The body of such a response has the error format of the distribution spec. The server closes the connection after it has
sent the response.
"""

from __future__ import annotations

import json
from http import HTTPStatus

from registry.server.http1.response_head import STATUS_LINES, Headers, header_parts


class RefusedRequest(Exception):
    """The server refuses a request. It sends an error response with the status `status` and with `message` in the body,
    and closes the connection."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        self.status = status
        self.message = message
        super().__init__(message)


def head_too_large_error(max_bytes: int, *, is_target_too_long: bool) -> RefusedRequest:
    """Returns the error for a request whose head has more than `max_bytes` bytes. `is_target_too_long`: whether the
    request target makes the head too large. If so, the status is 414, otherwise 431."""
    if is_target_too_long:
        return RefusedRequest(
            HTTPStatus.REQUEST_URI_TOO_LONG, f"the request target is too long: it may have at most {max_bytes} bytes"
        )
    return RefusedRequest(
        HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
        f"the headers are too large: together they may have at most {max_bytes} bytes",
    )


def error_headers(body: bytes) -> Headers:
    """Returns the headers of an error response with the body `body`. The list does not contain the headers that all
    responses have."""
    return [
        (b"docker-distribution-api-version", b"registry/2.0"),
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]


def error_body(message: str, *, code: str = "UNSUPPORTED") -> bytes:
    """Returns the JSON body of an error response. `code` is one of the distribution spec's "Error Codes"."""
    return json.dumps({"errors": [{"code": code, "message": message}]}, separators=(",", ":")).encode()


def error_response(refused: RefusedRequest, default_headers: Headers) -> bytes:
    """Returns the head and the body of the response to a refused request. `default_headers`: the first headers of every
    response of the server."""
    body = error_body(refused.message)
    return b"".join([STATUS_LINES[refused.status], *header_parts(default_headers + error_headers(body)), b"\r\n", body])
