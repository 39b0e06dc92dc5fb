"""Builds the lines of an HTTP/1.1 response's head, and checks its headers."""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus
from typing import Final

Headers = list[tuple[bytes, bytes]]
"""Pairs of a header's name and value, as in ASGI."""

_PHRASES = {status.value: status.phrase for status in HTTPStatus}
STATUS_LINES: Final = {
    status: f"HTTP/1.1 {status} {_PHRASES.get(status, '')}\r\n".encode() for status in range(100, 600)
}
"""The complete status line, with CRLF, for each status code from 100 to 599."""

_CONTROL_CHARACTERS = bytes({*range(32), 127})
_FORBIDDEN_IN_NAMES = _CONTROL_CHARACTERS + b' ()<>@,;:[]={}\\"/?' + bytes(range(128, 256))
_FORBIDDEN_IN_VALUES = _CONTROL_CHARACTERS.replace(b"\t", b"")
"""All control characters except tabs."""


def check_response_headers(headers: Headers) -> None:
    """Raises RuntimeError if a name contains one of `_FORBIDDEN_IN_NAMES`, or a value one of `_FORBIDDEN_IN_VALUES`
    (RFC 9110, 5.1 and 5.5).

    Checks all names in one call and all values in one call, because a call for each header would take too long.
    """
    names, values = b"".join([name for name, _ in headers]), b"".join([value for _, value in headers])
    # `translate` deletes the forbidden bytes. If the result is shorter, there were forbidden bytes.
    has_valid_names = len(names.translate(None, _FORBIDDEN_IN_NAMES)) == len(names)
    if not has_valid_names or len(values.translate(None, _FORBIDDEN_IN_VALUES)) < len(values):
        raise RuntimeError(f"at least one of these headers has an invalid name or value: {headers!r}")


def header_parts(headers: Iterable[tuple[bytes, bytes]]) -> list[bytes]:
    """Returns the parts of the header lines: name, `: `, value and CRLF of each header. The caller joins them with the
    rest of the response in one call, so that nothing is copied twice."""
    return [part for name, value in headers for part in (name, b": ", value, b"\r\n")]
