"""Writes the head of an HTTP/1.1 response: status lines and header lines. Also checks that headers are well formed."""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus
from typing import Final

Headers = list[tuple[bytes, bytes]]
"""Names and values, as ASGI has them."""

_PHRASES = {status.value: status.phrase for status in HTTPStatus}
STATUS_LINES: Final = {
    status: f"HTTP/1.1 {status} {_PHRASES.get(status, '')}\r\n".encode() for status in range(100, 600)
}
"""The complete status line, with CRLF, for each status code from 100 to 599."""

_CONTROL_CHARACTERS = bytes({*range(32), 127})
_FORBIDDEN_IN_NAMES = _CONTROL_CHARACTERS + b' ()<>@,;:[]={}\\"'
_FORBIDDEN_IN_VALUES = _CONTROL_CHARACTERS.replace(b"\t", b"")


def check_response_headers(headers: Headers) -> None:
    """Raises RuntimeError if a header's name is not a token, or a value contains a control character (RFC 9110, 5.1 and
    5.5).

    Joins all names, and all values, and checks each of the two as a whole. To check every header by itself would cost
    as much time as building the rest of the head.
    """
    names, values = b"".join([name for name, _ in headers]), b"".join([value for _, value in headers])
    has_valid_names = len(names.translate(None, _FORBIDDEN_IN_NAMES)) == len(names)
    if not has_valid_names or len(values.translate(None, _FORBIDDEN_IN_VALUES)) < len(values):
        raise RuntimeError(f"at least one of these headers has an invalid name or value: {headers!r}")


def header_lines(headers: Iterable[tuple[bytes, bytes]]) -> list[bytes]:
    """Returns the header lines, each ended by CRLF, as a list of parts. The caller joins the parts with the rest of the
    response in one call."""
    return [part for name, value in headers for part in (name, b": ", value, b"\r\n")]
