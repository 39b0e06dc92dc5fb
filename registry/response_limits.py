"""Limits on the responses of other servers (upstreams, webhooks and identity providers) that the HTTP client library
httpx2 reads on the event loop.

A server chooses how many header lines it sends. h11, the parser of httpx2, takes up to 20 µs for each line. It limits
the total size of the lines, but not their number: 100 KiB have up to 20,000 lines, which would occupy the event loop
for hundreds of milliseconds. Therefore this module makes h11 count the lines before it parses them. The import of this
module changes h11 for all clients of the process. Parsing cookies takes even longer, and no client needs them
(`NoCookies`).
"""

from __future__ import annotations

from http.client import HTTPResponse
from http.cookiejar import CookieJar
from typing import Final
from urllib.request import Request

import h11._connection
from h11._receivebuffer import ReceiveBuffer

MAX_HEADER_LINES: Final = 500
"""Largest number of lines in the head of a response and the heads of the interim responses (1xx) before it, taken
together. The trailers of a response have the same limit. Real servers send fewer than 100 lines. 500 lines take about
5 ms."""


PIECES_PER_PAUSE: Final = 64
"""Number of pieces of a body after which other tasks of the event loop get a turn. If a server sends chunks of one
byte, one read from the socket yields ten thousand pieces, which would block the event loop."""


class TooManyHeaderLines(ValueError):
    """A response has more than MAX_HEADER_LINES lines. Its connection is closed."""

    def __init__(self) -> None:
        super().__init__(f"the response has more than {MAX_HEADER_LINES} header lines")


class NoCookies(CookieJar):
    """A cookie jar for httpx2 that stores and sends no cookies. It does not parse the cookies of a response. A
    `CookieJar` whose policy refuses all cookies would parse them."""

    def extract_cookies(self, response: HTTPResponse, request: Request) -> None:
        """Does nothing."""

    def add_cookie_header(self, request: Request) -> None:
        """Does nothing."""


class _LimitedBuffer(ReceiveBuffer):
    """The buffer of received bytes from which h11 takes the lines of heads and trailers. It raises TooManyHeaderLines
    before h11 parses too many lines."""

    def __init__(self) -> None:
        super().__init__()
        self._interim_lines = 0
        """The number of lines in the interim responses since the last complete response."""

    def maybe_extract_lines(self) -> list[bytearray] | None:
        """Returns the lines up to the next empty line; None if they are not complete."""
        lines = super().maybe_extract_lines()
        if lines is None:
            return None
        line_count = self._interim_lines + len(lines)
        if line_count > MAX_HEADER_LINES:
            raise TooManyHeaderLines
        self._interim_lines = line_count if _is_interim(lines) else 0
        return lines


def _is_interim(lines: list[bytearray]) -> bool:
    """Returns whether these are the lines of an interim response (RFC 9110, 15.2), and not of a response or of
    trailers."""
    status_line = lines[0] if lines else b""
    return status_line.startswith(b"HTTP/") and status_line.partition(b" ")[2].startswith(b"1")


# h11 has no setting for this. If it renames the class, any import of this module fails.
assert h11._connection.ReceiveBuffer is ReceiveBuffer  # type: ignore[attr-defined]
h11._connection.ReceiveBuffer = _LimitedBuffer  # type: ignore[attr-defined]
