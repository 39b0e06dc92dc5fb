"""Where the bytes of one request go: into the partial blob, in the thread that fetches them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from registry.mirror.pieces import Piece
from registry.mirror.source import RangesUnsupported
from storage.errors import RegistryError, UpstreamUnavailable
from storage.interface import Partial

Refused = Mapping[str, RegistryError]
"""The endpoints that nothing is taken from, and what is raised instead."""


class PieceSink:
    """Takes exactly the piece that was asked for. `begun` is called, in that thread, once the upstream answers."""

    def __init__(self, partial: Partial, piece: Piece, begun: Callable[[], None], refused: Refused) -> None:
        self._partial = partial
        self._refused = refused
        self._begun = begun
        self.piece = piece
        self.endpoint: str | None = None
        self.asked_at = self.begun_at = time.monotonic()

    @property
    def new_bytes(self) -> int:
        return self.piece.at - self.piece.start

    def begin(self, endpoint: str, start: int, stop: int, size: int) -> None:
        _check(endpoint, self._refused, size, self._partial.size)
        if (start, stop) != (self.piece.start, self.piece.stop):
            raise RangesUnsupported
        self.endpoint = endpoint
        self.begun_at = time.monotonic()
        self._begun()

    def take(self, offset: int, data: memoryview) -> None:
        if offset != self.piece.at or offset + len(data) > self.piece.stop:
            raise UpstreamUnavailable(f"{self.endpoint} sent bytes that were not asked for")
        self._partial.write_at(offset, data)
        self.piece.at = offset + len(data)


class WholeSink:
    """Takes a blob from its first byte on, and keeps what is missing of it: a byte once there is not written again,
    since somebody may be reading it."""

    def __init__(
        self, partial: Partial, gaps: Sequence[tuple[int, int]], begun: Callable[[], None], refused: Refused
    ) -> None:
        self._partial = partial
        self._refused = refused
        self._gaps = gaps
        self._begun = begun
        self.endpoint: str | None = None
        self.new_bytes = 0
        self.at = 0

    def begin(self, endpoint: str, start: int, stop: int, size: int) -> None:
        _check(endpoint, self._refused, size, self._partial.size)
        if (start, stop) != (0, size):
            raise UpstreamUnavailable(f"{endpoint} sent a part of a blob that was asked for whole")
        self.endpoint = endpoint
        self._begun()

    def take(self, offset: int, data: memoryview) -> None:
        if offset != self.at or offset + len(data) > self._partial.size:
            raise UpstreamUnavailable(f"{self.endpoint} sent bytes that were not asked for")
        for start, stop in self._gaps:
            first, last = max(start, offset), min(stop, offset + len(data))
            if first < last:
                self._partial.write_at(first, data[first - offset : last - offset])
                self.new_bytes += last - first
        self.at = offset + len(data)


def _check(endpoint: str, refused: Refused, size: int, expected: int) -> None:
    """Raises UpstreamUnavailable: nothing is taken from there, or it may be a page that tells of an error, or the
    manifest is wrong."""
    if endpoint in refused:
        raise refused[endpoint]
    if size != expected:
        raise UpstreamUnavailable(f"{endpoint} has {size} bytes where the manifest says {expected}")
