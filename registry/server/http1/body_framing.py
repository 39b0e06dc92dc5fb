"""Finds the bytes of a request's body among the bytes that the server receives (RFC 9112, 6.2 and 7.1).

The *framing* tells where a body ends. It is either a declared length, or a size line before each chunk of the body. The
HTTP parser httptools parses only the heads of requests, and the classes of this module parse the framing. They copy no
bytes of a body: they return views of the buffer into which the server has received the body.
"""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Protocol

from registry.server.http1.error_responses import RefusedRequest

MAX_CHUNK_BYTES = 2**63 - 1
"""Largest size that a chunk may declare, in bytes."""
MAX_CHUNKS_PER_CALL = 1024
"""Largest number of chunks and lines that one call of `ChunkedFraming.parse` parses, so that the call does not block
the event loop for long. Even a small chunk takes a microsecond or two."""
_NEXT_CHUNK = re.compile(rb"\r\n([0-9A-Fa-f]{1,15})\r\n")
"""The end of a chunk, followed by the size line of the next chunk. Matches only sizes of up to 15 hexadecimal digits,
which are always less than `MAX_CHUNK_BYTES`. `_parse_size_line` checks a size of 16 digits."""
_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:;[\t\x20-\x7e\x80-\xff]*)?\r\n")
"""The line before a chunk: the size of the chunk, and optional extensions, which are ignored."""
_SIZE_LINE_START = re.compile(rb"[0-9A-Fa-f]{1,16}(?:\r|;[\t\x20-\x7e\x80-\xff]*\r?)?")
"""A beginning of a valid size line, without the LF."""
_TRAILER_LINE = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[\t\x20-\x7e\x80-\xff]*\r\n")
_FORBIDDEN_TRAILERS = (b"content-length", b"transfer-encoding")
_LINE_END = re.compile(rb"\n")
"""A compiled pattern, because a memory view has no method `find`."""


class Framing(Protocol):
    """Parses the framing of one body."""

    is_complete: bool
    """Whether the whole body was parsed."""

    def bytes_to_receive(self, free_bytes: int) -> int:
        """Returns the largest number of bytes to receive next, into a buffer that has space for `free_bytes` bytes."""
        ...

    def parse(self, data: memoryview, pieces: list[memoryview]) -> int:
        """Parses received bytes. Appends the bytes of the body to `pieces`, as views of `data`.

        Returns how many bytes of `data` were parsed. If the body is complete, the remaining bytes of `data` come after
        the body. If the body is not complete but bytes remain, call this method again with the remaining bytes. Raises
        RefusedRequest if the framing is malformed.
        """
        ...


class LengthFraming:
    """The framing of a body with a declared length in bytes. `bytes_to_receive` never returns more than the rest of the
    body, so the server does not receive the next request together with the body."""

    def __init__(self, length: int) -> None:
        self._remaining_bytes = length
        self.is_complete = length == 0

    def bytes_to_receive(self, free_bytes: int) -> int:
        return min(free_bytes, self._remaining_bytes)

    def parse(self, data: memoryview, pieces: list[memoryview]) -> int:
        size = min(len(data), self._remaining_bytes)
        pieces.append(data[:size])
        self._remaining_bytes -= size
        self.is_complete = self._remaining_bytes == 0
        return size


class ChunkedFraming:
    """The framing of a body in chunks (`Transfer-Encoding: chunked`).

    This class refuses framing that a proxy in front of the server could interpret differently, such as a line that ends
    with LF without CR, or a size with spaces around it.
    """

    def __init__(self, limit: int) -> None:
        """`limit`: the largest size, in bytes, of one line, of all chunk extensions together (RFC 9112, 7.1.1), and of
        all trailers together. *Trailers* are headers after the last chunk. Extensions are limited because the server
        receives them into the same buffers as the body. These buffers stay in memory until the application has used
        the bytes of the body."""
        self._limit = limit
        self._extension_bytes = 0
        self._chunk_remaining_bytes = 0  # how many bytes of the current chunk are not parsed yet
        self._line = b""  # the received beginning of an incomplete line
        self._parse_line = self._parse_size_line  # the method that parses the next line
        self._trailer_bytes = 0
        self.is_complete = False

    def bytes_to_receive(self, free_bytes: int) -> int:
        return free_bytes

    def parse(self, data: memoryview, pieces: list[memoryview]) -> int:
        offset, end, iterations_left = 0, len(data), MAX_CHUNKS_PER_CALL
        while offset < end and iterations_left and not self.is_complete:
            iterations_left -= 1
            if not self._chunk_remaining_bytes:
                offset = self._receive_line(data, offset)
                continue
            chunk_end = offset + self._chunk_remaining_bytes
            if chunk_end > end:
                pieces.append(data[offset:])
                self._chunk_remaining_bytes -= end - offset
                return end
            pieces.append(data[offset:chunk_end])
            # For most chunks, this one match finds both the chunk's end and the next size line. In the following cases,
            # `_receive_line` parses these two lines one after the other:
            # - The chunk's end or the size line was not received completely, or is malformed.
            # - The size line has extensions or 16 digits.
            # - The size is 0, which marks the last chunk. Trailers follow it instead of another chunk.
            next_chunk = _NEXT_CHUNK.match(data, chunk_end)
            self._chunk_remaining_bytes = int(next_chunk[1], 16) if next_chunk else 0
            if next_chunk and self._chunk_remaining_bytes:
                offset = next_chunk.end()
            else:
                offset = chunk_end
                self._parse_line = self._parse_chunk_end
        return offset

    def _receive_line(self, data: memoryview, offset: int) -> int:
        """Takes bytes of `data`, beginning at `offset`, until the line ends or `data` ends. Appends these bytes to
        `self._line`. Parses the line if it is complete. Returns the offset after these bytes. Raises RefusedRequest if
        the line is malformed or too long."""
        line_end = _LINE_END.search(data, offset, offset + self._limit + 1)
        end_offset = line_end.end() if line_end else min(len(data), offset + self._limit + 1)
        self._line += data[offset:end_offset]
        if len(self._line) > self._limit:
            raise _too_large(self._limit)
        if line_end:
            line, self._line = self._line, b""
            self._parse_line(line)
        elif not self._can_become_valid(self._line):
            raise _malformed("the framing of a chunk is not valid")
        return end_offset

    def _can_become_valid(self, line_start: bytes) -> bool:
        """Returns whether a valid line can begin with `line_start`. If not, the caller refuses the request at once,
        because the client might never send the rest of the line. Returns True for every trailer, because only
        `_parse_trailer` checks trailers."""
        if self._parse_line == self._parse_chunk_end:
            return line_start == b"\r"
        return self._parse_line != self._parse_size_line or _SIZE_LINE_START.fullmatch(line_start) is not None

    def _parse_chunk_end(self, line: bytes) -> None:
        """Parses the empty line that ends each chunk."""
        if line != b"\r\n":
            raise _malformed("a chunk is longer than its declared size")
        self._parse_line = self._parse_size_line

    def _parse_size_line(self, line: bytes) -> None:
        size = _SIZE_LINE.fullmatch(line)
        if size is None or int(size[1], 16) > MAX_CHUNK_BYTES:
            raise _malformed("a chunk's size is not valid")
        self._extension_bytes += len(line) - size.end(1) - len(b"\r\n")
        if self._extension_bytes > self._limit:
            raise _too_large(self._limit)
        self._chunk_remaining_bytes = int(size[1], 16)
        if not self._chunk_remaining_bytes:
            self._parse_line = self._parse_trailer

    def _parse_trailer(self, line: bytes) -> None:
        """Parses one trailer, or the empty line that ends the body. The server checks trailers and ignores them."""
        self._trailer_bytes += len(line)
        if self._trailer_bytes > self._limit:
            raise _too_large(self._limit)
        if line == b"\r\n":
            self.is_complete = True
            return
        field = _TRAILER_LINE.fullmatch(line)
        if field is None or field[1].lower() in _FORBIDDEN_TRAILERS:
            raise _malformed("a trailer is not valid")


def _malformed(problem: str) -> RefusedRequest:
    return RefusedRequest(HTTPStatus.BAD_REQUEST, f"this is not a valid HTTP/1.1 request: {problem}")


def _too_large(limit: int) -> RefusedRequest:
    return RefusedRequest(
        HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
        f"a line, the chunk extensions or the trailers of the body are longer than {limit} bytes",
    )
