"""Limits the responses of other servers (upstreams, webhooks, identity providers), so that they do not block the event
loop. The HTTP client library httpx2 reads these responses on the event loop.

h11, the parser of httpx2, takes up to 20 µs for each header line. It limits the total size of the lines, but not their
number: 20,000 lines, which fit into 100 KiB, would block the event loop for hundreds of milliseconds. The import of
this module limits the number of lines for all h11 connections of the process.
"""

from __future__ import annotations

from http.client import HTTPResponse
from http.cookiejar import CookieJar
from typing import Final
from urllib.request import Request

import h11._connection
from h11._receivebuffer import ReceiveBuffer

MAX_HEADER_LINES: Final = 500
"""Largest total number of lines in the head of a response and in the heads of the interim responses (1xx) before it.
The trailers of a response have the same limit. Real servers send fewer than 100 lines. h11 parses 500 lines in about
5 ms."""


PIECES_PER_PAUSE: Final = 64
"""Number of pieces of a body after which other tasks of the event loop get a turn. One read from the socket can yield
ten thousand pieces, if the server sends chunks of one byte."""


class TooManyHeaderLines(ValueError):
    """The head or the trailers of a response have more than MAX_HEADER_LINES lines. The connection is closed."""

    def __init__(self) -> None:
        super().__init__(f"the response has more than {MAX_HEADER_LINES} header lines")


class NoCookies(CookieJar):
    """A cookie jar for httpx2 that stores and sends no cookies, and does not parse the cookies of a response. Parsing
    cookies takes even longer than parsing other headers. A `CookieJar` parses cookies even if its policy refuses all of
    them."""

    def extract_cookies(self, response: HTTPResponse, request: Request) -> None:
        """Does nothing."""

    def add_cookie_header(self, request: Request) -> None:
        """Does nothing."""


class _LimitedBuffer(ReceiveBuffer):
    """The buffer of received bytes from which h11 takes the lines of heads and trailers. Limits their number."""

    def __init__(self) -> None:
        super().__init__()
        self._interim_lines = 0
        """Number of lines in the interim responses since the last final response."""

    def maybe_extract_lines(self) -> list[bytearray] | None:
        """Returns the lines before the next empty line; None if this empty line has not arrived yet. Raises
        TooManyHeaderLines."""
        lines = super().maybe_extract_lines()
        if lines is None:
            return None
        line_count = self._interim_lines + len(lines)
        if line_count > MAX_HEADER_LINES:
            raise TooManyHeaderLines
        self._interim_lines = line_count if _is_interim(lines) else 0
        return lines


def _is_interim(lines: list[bytearray]) -> bool:
    """Returns whether these lines are the head of an interim response (RFC 9110, 15.2). They can also be the head of a
    final response, or trailers."""
    status_line = lines[0] if lines else b""
    return status_line.startswith(b"HTTP/") and status_line.partition(b" ")[2].startswith(b"1")


# h11 has no setting for the class of the buffer. If a version of h11 renames this class, the import of this module
# fails.
assert h11._connection.ReceiveBuffer is ReceiveBuffer  # type: ignore[attr-defined]
h11._connection.ReceiveBuffer = _LimitedBuffer  # type: ignore[attr-defined]
