"""Writes the bytes of one response from an upstream registry into a partial blob. `PieceSink` writes the response to a
request for one byte range, a *piece*. `WholeSink` writes the response to a request for the whole blob, but only the
bytes that are missing.

A *partial blob* is a blob that is still being downloaded, into a file. Both classes implement the Protocol `BlobSink`,
whose methods are called in the thread that reads the response. An *endpoint* is one of the base URLs of the upstream.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from registry.mirror.fill.pieces import Piece
from registry.mirror.upstream_client import BlobSizeWrong, RangesUnsupported
from storage.errors import UpstreamUnavailable
from storage.partials import Partial

UntrustedEndpoints = Mapping[str, UpstreamUnavailable]
"""Maps each endpoint whose bytes are not accepted, because it sent bytes with a wrong digest before, to the error to
raise."""


class PieceSink:
    """Writes the response to a request for one piece into the partial blob. Accepts only the bytes of the piece.
    `requested_at`, `response_at`: when the request was sent and when the response started, in seconds of the monotonic
    clock."""

    def __init__(
        self, partial: Partial, piece: Piece, on_response: Callable[[], None], untrusted: UntrustedEndpoints
    ) -> None:
        """`on_response`: called, in the thread that reads the response, when the response starts. `untrusted`: the
        endpoints whose bytes are not accepted."""
        self._partial = partial
        self._untrusted = untrusted
        self._on_response = on_response
        self.piece = piece
        self.endpoint: str | None = None
        """The endpoint that sends the response; None before the response has started."""
        self.requested_at = self.response_at = time.monotonic()

    @property
    def new_bytes(self) -> int:
        """Number of bytes that this sink has stored."""
        return self.piece.next_offset - self.piece.start

    def begin(self, endpoint: str, start: int, stop: int, size: int) -> None:
        """Checks the start of the response, which has the bytes from offset `start` up to, but without, `stop`. `size`:
        size of the whole blob. Raises UpstreamUnavailable if the endpoint is untrusted, BlobSizeWrong if `size` is not
        the expected size, and RangesUnsupported if the response has another range than the piece."""
        check_response(endpoint, self._untrusted, size, self._partial.size)
        if (start, stop) != (self.piece.start, self.piece.stop):
            raise RangesUnsupported
        self.endpoint = endpoint
        self.response_at = time.monotonic()
        self._on_response()

    def take(self, offset: int, data: memoryview) -> None:
        """Writes the next bytes of the piece. Raises UpstreamUnavailable if the bytes are outside the piece or out of
        order, and the errors of `Partial.write_at`."""
        if offset != self.piece.next_offset or offset + len(data) > self.piece.stop:
            raise UpstreamUnavailable(f"{self.endpoint} sent bytes that were not asked for")
        self._partial.write_at(offset, data)
        self.piece.next_offset = offset + len(data)


class WholeSink:
    """Writes the response to a request for the whole blob into the partial blob. Writes only the bytes that are
    missing: the other bytes must not change, because a client may have read them."""

    def __init__(
        self,
        partial: Partial,
        gaps: Sequence[tuple[int, int]],
        on_response: Callable[[], None],
        untrusted: UntrustedEndpoints,
    ) -> None:
        """`gaps`: the missing byte ranges, each as the offsets of its first byte and of the byte after its last one.
        `on_response`: called, in the thread that reads the response, when the response starts. `untrusted`: the
        endpoints whose bytes are not accepted."""
        self._partial = partial
        self._untrusted = untrusted
        self._gaps = gaps
        self._on_response = on_response
        self.endpoint: str | None = None
        """The endpoint that sends the response; None before the response has started."""
        self.new_bytes = 0
        """Number of bytes that this sink has stored."""
        self.next_offset = 0
        """Offset of the next byte of the response."""

    def begin(self, endpoint: str, start: int, stop: int, size: int) -> None:
        """Checks the start of the response. `size`: size of the whole blob. Raises UpstreamUnavailable if the endpoint
        is untrusted or the response has only a part of the blob, and BlobSizeWrong if `size` is not the expected
        size."""
        check_response(endpoint, self._untrusted, size, self._partial.size)
        if (start, stop) != (0, size):
            raise UpstreamUnavailable(f"{endpoint} sent only a part of the blob, but all of it was requested")
        self.endpoint = endpoint
        self._on_response()

    def take(self, offset: int, data: memoryview) -> None:
        """Writes the next bytes, except for those that are already stored. Raises UpstreamUnavailable if the bytes are
        out of order or beyond the end of the blob, and the errors of `Partial.write_at`."""
        if offset != self.next_offset or offset + len(data) > self._partial.size:
            raise UpstreamUnavailable(f"{self.endpoint} sent bytes that were not asked for")
        for start, stop in self._gaps:
            write_start, write_stop = max(start, offset), min(stop, offset + len(data))
            if write_start < write_stop:
                self._partial.write_at(write_start, data[write_start - offset : write_stop - offset])
                self.new_bytes += write_stop - write_start
        self.next_offset = offset + len(data)


def check_response(endpoint: str, untrusted: UntrustedEndpoints, size: int, expected_size: int) -> None:
    """Raises UpstreamUnavailable if the endpoint is untrusted. Raises BlobSizeWrong if the blob does not have the
    expected size in bytes: the response may be an error page, or the manifest may state a wrong size."""
    if endpoint in untrusted:
        raise untrusted[endpoint]
    if size != expected_size:
        raise BlobSizeWrong(f"{endpoint} has a blob of {size} bytes; {expected_size} bytes were expected")
