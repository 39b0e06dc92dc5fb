"""Cuts a request's body out of the bytes that are received (RFC 9112, sections 6.2 and 7.1).

Bodies do not pass through the HTTP parser: their parts are views of the buffer they were received into, not copies.
"""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Protocol

from registry.server.http1.error_responses import RefusedRequest

MAX_CHUNK_BYTES = 2**63 - 1
"""The largest size of a chunk, in bytes."""
_BETWEEN = re.compile(rb"\r\n([0-9A-Fa-f]{1,15})\r\n")
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:;[\t\x20-\x7e\x80-\xff]*)?\r\n")
_SIZE_BEGINS = re.compile(rb"[0-9A-Fa-f]{1,16}(?:\r|;[\t\x20-\x7e\x80-\xff]*\r?)?")
_TRAILER = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[\t\x20-\x7e\x80-\xff]*\r\n")
_NO_TRAILERS = (b"content-length", b"transfer-encoding")
_LINE_END = re.compile(rb"\n")
CHUNKS_PER_TURN = 1024
"""Chunks that are parsed in one turn of the loop. Each takes a microsecond or two, however small it is."""


class Framing(Protocol):
    """How one body is framed."""

    ended: bool
    """All of the body was received."""

    def room(self, free: int) -> int:
        """Returns how many bytes to receive next, of `free` ones."""
        ...

    def take(self, data: memoryview, pieces: list[memoryview]) -> int:
        """Adds the parts of `data` that are the body to `pieces`. Returns how many bytes it has parsed: all, unless the
        body ended before, or there are too many chunks for one turn of the loop. Raises RefusedRequest."""
        ...


class LengthFraming:
    """A body of a declared length. What follows its end is not received along with it."""

    def __init__(self, length: int) -> None:
        self._left = length
        self.ended = length == 0

    def room(self, free: int) -> int:
        return min(free, self._left)

    def take(self, data: memoryview, pieces: list[memoryview]) -> int:
        size = min(len(data), self._left)
        pieces.append(data[:size])
        self._left -= size
        self.ended = self._left == 0
        return size


class ChunkedFraming:
    """A body in chunks.

    Strict: refuses what two parsers could read differently, such as a line that ends with a bare LF, or a size with
    spaces around it.
    """

    def __init__(self, limit: int) -> None:
        """`limit` is the most bytes of each line, and of all trailers together."""
        self._limit = limit
        self._left = 0  # bytes of the current chunk
        self._line = b""  # the part of a line received so far
        self._read = self._read_size
        self._trailers = 0
        self.ended = False

    def room(self, free: int) -> int:
        return free

    def take(self, data: memoryview, pieces: list[memoryview]) -> int:
        at, end, turns = 0, len(data), CHUNKS_PER_TURN
        while at < end and turns and not self.ended:
            turns -= 1
            if not self._left:
                at = self._take_line(data, at)
                continue
            stop = at + self._left
            if stop > end:
                pieces.append(data[at:])
                self._left -= end - at
                return end
            pieces.append(data[at:stop])
            between = _BETWEEN.match(data, stop)
            self._left = int(between[1], 16) if between else 0
            if between and self._left:
                at = between.end()
            else:
                at = stop
                self._read = self._read_end
        return at

    def _take_line(self, data: memoryview, at: int) -> int:
        found = _LINE_END.search(data, at, at + self._limit + 1)
        stop = found.end() if found else min(len(data), at + self._limit + 1)
        self._line += data[at:stop]
        if len(self._line) > self._limit:
            raise _too_large(self._limit)
        if found:
            line, self._line = self._line, b""
            self._read(line)
        elif not self._may_become_one(self._line):
            raise _malformed("a chunk is not framed as it must be")
        return stop

    def _may_become_one(self, line: bytes) -> bool:
        """Returns whether the beginning of a line can become valid. If it cannot, nothing more is waited for."""
        if self._read == self._read_end:
            return line == b"\r"
        return self._read != self._read_size or _SIZE_BEGINS.fullmatch(line) is not None

    def _read_end(self, line: bytes) -> None:
        if line != b"\r\n":
            raise _malformed("a chunk is longer than its size")
        self._read = self._read_size

    def _read_size(self, line: bytes) -> None:
        size = _SIZE.fullmatch(line)
        if size is None or int(size[1], 16) > MAX_CHUNK_BYTES:
            raise _malformed("a chunk's size is not valid")
        self._left = int(size[1], 16)
        if not self._left:
            self._read = self._read_trailer

    def _read_trailer(self, line: bytes) -> None:
        self._trailers += len(line)
        if self._trailers > self._limit:
            raise _too_large(self._limit)
        if line == b"\r\n":
            self.ended = True
            return
        field = _TRAILER.fullmatch(line)
        if field is None or field[1].lower() in _NO_TRAILERS:
            raise _malformed("a trailer is not valid")


def _malformed(what: str) -> RefusedRequest:
    return RefusedRequest(HTTPStatus.BAD_REQUEST, f"this is not a valid HTTP/1.1 request: {what}")


def _too_large(limit: int) -> RefusedRequest:
    return RefusedRequest(
        HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"a chunk's line, or the trailers, are too large: {limit} bytes"
    )
