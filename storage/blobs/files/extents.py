"""Sets of bytes of a file, as extents (`Extents`)."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

Extent = tuple[int, int]
"""First byte and the one after the last."""


class Extents:
    """A set of bytes, stored as merged extents in order. A change takes time logarithmic in their number, plus a shift
    in a short list."""

    __slots__ = ("_bounds",)

    def __init__(self, extents: Iterable[Extent] = ()) -> None:
        # start, stop, start, stop, …, all different. `bisect_right` of a byte is odd if the byte is inside an extent.
        self._bounds: list[int] = []
        for start, stop in extents:
            self.add(start, stop)

    def __iter__(self) -> Iterator[Extent]:
        bounds = self._bounds
        return zip(bounds[::2], bounds[1::2], strict=True)

    def __len__(self) -> int:
        """Returns the number of extents."""
        return len(self._bounds) // 2

    def copy(self) -> Extents:
        other = Extents()
        other._bounds = self._bounds.copy()
        return other

    def add(self, start: int, stop: int) -> None:
        if start < stop:
            bounds = self._bounds
            left, right = bisect_left(bounds, start), bisect_right(bounds, stop)
            bounds[left:right] = [start] * (left % 2 == 0) + [stop] * (right % 2 == 0)

    def remove(self, start: int, stop: int) -> None:
        if start < stop:
            bounds = self._bounds
            left, right = bisect_left(bounds, start), bisect_right(bounds, stop)
            bounds[left:right] = [start] * (left % 2) + [stop] * (right % 2)

    def gaps(self, start: int, stop: int) -> list[Extent]:
        """Returns the gaps between `start` and `stop`."""
        bounds = self._bounds
        found = []
        at = self.reach(start)
        following = bisect_right(bounds, at)
        while at < stop:
            end = bounds[following] if following < len(bounds) else stop
            found.append((at, min(end, stop)))
            if end >= stop:
                break
            at = bounds[following + 1]
            following += 2
        return found

    def reach(self, at: int) -> int:
        """Returns how far the bytes reach from `at` without a gap; `at` itself if its byte is not in the set."""
        following = bisect_right(self._bounds, at)
        return self._bounds[following] if following % 2 else at
