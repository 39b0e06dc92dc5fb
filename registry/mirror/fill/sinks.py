"""Writes the bytes of one response from an upstream registry into a *partial blob*, the file of a blob that is still
being downloaded.

- `PieceSink`: for the response to a request for one byte range, a *piece*.
- `WholeSink`: for the response to a request for the whole blob.

Both classes implement the Protocol `BlobSink`. The thread that reads the response calls their methods. An *endpoint* is
one of the base URLs of the upstream.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from registry.mirror.fill.pieces import Piece
from registry.mirror.upstream_client import BlobSizeWrong, RangesUnsupported
from storage.errors import UpstreamUnavailable
from storage.partials import Partial

UntrustedEndpoints = Mapping[str, UpstreamUnavailable]
"""The endpoints that have sent bytes with a wrong digest. Their responses are not accepted. Maps each endpoint to the
error to raise at its next response."""


class PieceSink:
    """Writes the response to a request for one piece into the partial blob. Accepts only the bytes of the piece.

    - `requested_at`: when this sink was created for the request, in seconds of `time.monotonic`.
    - `response_started_at`: when the response started; equal to `requested_at` before this."""

    def __init__(
        self, partial: Partial, piece: Piece, on_response: Callable[[], None], untrusted: UntrustedEndpoints
    ) -> None:
        """`on_response`: called when the response starts, in the thread that reads the response."""
        self._partial = partial
        self._untrusted = untrusted
        self._on_response = on_response
        self.piece = piece
        self.endpoint: str | None = None
        """The endpoint that sends the response; None before the response has started."""
        self.requested_at = self.response_started_at = time.monotonic()

    @property
    def new_bytes(self) -> int:
        """Number of bytes that this sink has stored."""
        return self.piece.next_offset - self.piece.start

    def begin(self, endpoint: str, start: int, stop: int, size: int) -> None:
        """Checks the start of the response. `start`, `stop`: the offsets of the response's first byte and of the byte
        after its last one. `size`: size of the whole blob. Raises UpstreamUnavailable if the endpoint is untrusted,
        BlobSizeWrong if `size` is not the expected size, and RangesUnsupported if the response is not the piece."""
        check_response(endpoint, self._untrusted, size, self._partial.size)
        if (start, stop) != (self.piece.start, self.piece.stop):
            raise RangesUnsupported
        self.endpoint = endpoint
        self.response_started_at = time.monotonic()
        self._on_response()

    def take(self, offset: int, data: memoryview) -> None:
        """Writes the next bytes of the piece. Raises UpstreamUnavailable if the bytes are outside the piece or out of
        order, and the errors of `Partial.write_at`."""
        if offset != self.piece.next_offset or offset + len(data) > self.piece.stop:
            raise UpstreamUnavailable(f"{self.endpoint} sent bytes that were not asked for")
        self._partial.write_at(offset, data)
        self.piece.next_offset = offset + len(data)


class WholeSink:
    """Writes the response to a request for the whole blob into the partial blob. Writes only the missing bytes: the
    stored bytes must not change, because a client may have read them."""

    def __init__(
        self,
        partial: Partial,
        gaps: Sequence[tuple[int, int]],
        on_response: Callable[[], None],
        untrusted: UntrustedEndpoints,
    ) -> None:
        """`gaps`: the missing byte ranges, each as the offsets of its first byte and of the byte after its last one.
        `on_response`: called when the response starts, in the thread that reads the response."""
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
        """Checks the start of the response. `PieceSink.begin` describes the parameters. Raises UpstreamUnavailable if
        the endpoint is untrusted or if the response is not the whole blob. Raises BlobSizeWrong if `size` is not the
        expected size."""
        check_response(endpoint, self._untrusted, size, self._partial.size)
        if (start, stop) != (0, size):
            raise UpstreamUnavailable(f"{endpoint} sent only a part of the blob, but all of it was requested")
        self.endpoint = endpoint
        self._on_response()

    def take(self, offset: int, data: memoryview) -> None:
        """Takes the next bytes of the blob, and writes those that are missing. Raises UpstreamUnavailable if the bytes
        are out of order or beyond the end of the blob, and the errors of `Partial.write_at`."""
        if offset != self.next_offset or offset + len(data) > self._partial.size:
            raise UpstreamUnavailable(f"{self.endpoint} sent bytes that were not asked for")
        for start, stop in self._gaps:
            write_start, write_stop = max(start, offset), min(stop, offset + len(data))
            if write_start < write_stop:
                self._partial.write_at(write_start, data[write_start - offset : write_stop - offset])
                self.new_bytes += write_stop - write_start
        self.next_offset = offset + len(data)


def check_response(endpoint: str, untrusted: UntrustedEndpoints, size: int, expected_size: int) -> None:
    """Raises UpstreamUnavailable if the endpoint is untrusted. Raises BlobSizeWrong if `size`, the size of the blob
    according to the response, is not `expected_size`: the response may be an error page, or the manifest may state a
    wrong size. Both sizes are in bytes."""
    if endpoint in untrusted:
        raise untrusted[endpoint]
    if size != expected_size:
        raise BlobSizeWrong(f"{endpoint} has a blob of {size} bytes; {expected_size} bytes were expected")
