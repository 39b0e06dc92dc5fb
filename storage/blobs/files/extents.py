"""A set of byte positions in a file, such as "bytes 0 to 99 and 200 to 299", stored as a sorted list of ranges
(`Extents`)."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

Extent = tuple[int, int]
"""A range of bytes: offset of its first byte, and offset of the byte after the last one."""


class Extents:
    """A set of byte positions, stored as extents. Extents that touch or overlap are merged into one. `add` and `remove`
    search in logarithmic time. If the number of extents changes, they then shift the rest of the list."""

    __slots__ = ("_bounds",)

    def __init__(self, extents: Iterable[Extent] = ()) -> None:
        self._bounds: list[int] = []
        """The bounds of the extents in ascending order: start, stop, start, stop, … No two are equal, because extents
        that touch are merged. If a position is inside an extent, the number of bounds up to the position
        (`bisect_right`) is odd."""
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
        """Adds the positions from `start` up to, but without, `stop`."""
        if start < stop:
            bounds = self._bounds
            first, end = bisect_left(bounds, start), bisect_right(bounds, stop)  # the range of the replaced bounds
            # The merged extent begins at `start`, or earlier if another extent begins earlier and reaches `start`. It
            # ends at `stop`, or later if another extent begins at or before `stop` and ends later.
            bounds[first:end] = [start] * (first % 2 == 0) + [stop] * (end % 2 == 0)

    def remove(self, start: int, stop: int) -> None:
        """Removes the positions from `start` up to, but without, `stop`."""
        if start < stop:
            bounds = self._bounds
            first, end = bisect_left(bounds, start), bisect_right(bounds, stop)  # the range of the replaced bounds
            # If an extent contains the position before `start`, that extent now ends at `start`. If an extent contains
            # `stop`, that extent now begins at `stop`.
            bounds[first:end] = [start] * (first % 2) + [stop] * (end % 2)

    def gaps(self, start: int, stop: int) -> list[Extent]:
        """Returns the ranges between `start` and `stop` that are not in the set, in ascending order."""
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
        """Returns the end of the extent that contains `offset`, or `offset` itself if no extent contains it."""
        next_bound = bisect_right(self._bounds, offset)  # odd if `offset` is inside an extent
        return self._bounds[next_bound] if next_bound % 2 else offset
