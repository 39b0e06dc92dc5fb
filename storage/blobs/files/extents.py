"""A set of byte positions in a file, such as "bytes 0 to 99 and 200 to 299", stored as a sorted list of ranges of bytes
(`Extents`)."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

Extent = tuple[int, int]
"""A range of bytes: offset of its first byte, and offset of the byte after the last one."""


class Extents:
    """A set of byte positions, stored as extents. Extents that touch or overlap are merged into one. `add` and `remove`
    find the extents to change by binary search."""

    __slots__ = ("_bounds",)

    def __init__(self, extents: Iterable[Extent] = ()) -> None:
        self._bounds: list[int] = []
        """The bounds of the extents in ascending order: start, stop, start, stop, … No two bounds are equal. A position
        is inside an extent if an odd number of bounds is less than or equal to the position (`bisect_right`)."""
        for start, stop in extents:
            self.add(start, stop)

    def __iter__(self) -> Iterator[Extent]:
        """Yields the extents in ascending order."""
        bounds = self._bounds
        return zip(bounds[::2], bounds[1::2], strict=True)

    def __len__(self) -> int:
        """Returns the number of extents."""
        return len(self._bounds) // 2

    def copy(self) -> Extents:
        """Returns an independent copy."""
        duplicate = Extents()
        duplicate._bounds = self._bounds.copy()
        return duplicate

    def add(self, start: int, stop: int) -> None:
        """Adds the positions from `start` to `stop - 1`."""
        if start < stop:
            bounds = self._bounds
            low, high = bisect_left(bounds, start), bisect_right(bounds, stop)  # `bounds[low:high]` is replaced
            # - `low` is odd if an extent begins before `start` and ends at or after `start`. The merged extent then
            #   begins where this extent begins, so `start` does not become a bound.
            # - `high` is odd if an extent begins at or before `stop` and ends after `stop`. The merged extent then ends
            #   where this extent ends, so `stop` does not become a bound.
            bounds[low:high] = [start] * (low % 2 == 0) + [stop] * (high % 2 == 0)

    def remove(self, start: int, stop: int) -> None:
        """Removes the positions from `start` to `stop - 1`."""
        if start < stop:
            bounds = self._bounds
            low, high = bisect_left(bounds, start), bisect_right(bounds, stop)  # `bounds[low:high]` is replaced
            # - `low` is odd if an extent begins before `start` and ends at or after `start`. This extent keeps its
            #   part before `start`, so `start` becomes a bound.
            # - `high` is odd if an extent begins at or before `stop` and ends after `stop`. This extent keeps its part
            #   from `stop` on, so `stop` becomes a bound.
            bounds[low:high] = [start] * (low % 2) + [stop] * (high % 2)

    def gaps(self, start: int, stop: int) -> list[Extent]:
        """Returns the ranges of positions from `start` to `stop - 1` that are not in the set, in ascending order."""
        bounds = self._bounds
        gaps = []
        gap_start = self.covered_until(start)
        next_bound = bisect_right(bounds, gap_start)  # index, in `bounds`, of the start of the next extent
        while gap_start < stop:
            gap_stop = bounds[next_bound] if next_bound < len(bounds) else stop
            gaps.append((gap_start, min(gap_stop, stop)))
            if gap_stop >= stop:
                break
            gap_start = bounds[next_bound + 1]
            next_bound += 2
        return gaps

    def covered_until(self, offset: int) -> int:
        """Returns the position after the last byte of the extent that contains `offset`. Returns `offset` if no extent
        contains it."""
        next_bound = bisect_right(self._bounds, offset)  # odd if `offset` is inside an extent
        return self._bounds[next_bound] if next_bound % 2 else offset
