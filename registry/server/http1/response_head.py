"""Parts of a response's head on the wire: status lines, header lines, and the check that headers are well formed."""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus
from typing import Final

Headers = list[tuple[bytes, bytes]]

_PHRASES = {status.value: status.phrase for status in HTTPStatus}
STATUS_LINES: Final = {
    status: f"HTTP/1.1 {status} {_PHRASES.get(status, '')}\r\n".encode() for status in range(100, 600)
}
"""The status line of each status code from 100 to 599, with its line end."""

_CONTROLS = bytes({*range(32), 127})
_NOT_IN_NAMES = _CONTROLS + b' ()<>@,;:[]={}\\"'
_NOT_IN_VALUES = _CONTROLS.replace(b"\t", b"")


def check_response_headers(headers: Headers) -> None:
    """Raises RuntimeError if a name is not a token, or a value contains a control character (RFC 9110, 5.1 and 5.5).

    Checks all names, and all values, joined: one check per header would cost as much as building the rest of the head.
    """
    names, values = b"".join([name for name, _ in headers]), b"".join([value for _, value in headers])
    if len(names.translate(None, _NOT_IN_NAMES)) < len(names) or len(values.translate(None, _NOT_IN_VALUES)) < len(
        values
    ):
        raise RuntimeError(f"not all of these are valid headers: {headers!r}")


def header_lines(headers: Iterable[tuple[bytes, bytes]]) -> list[bytes]:
    """Returns the header lines in parts, to be joined with what stands around them."""
    return [part for name, value in headers for part in (name, b": ", value, b"\r\n")]
