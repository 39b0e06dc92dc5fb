"""Extents describe a set of byte offsets as ranges, such as the bytes of a file that are stored. The tests compare them
with Python sets of numbers."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.blobs.files.extents import Extents

SIZE = 40
"""The largest offset in the tests."""
_EXTENT = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(lambda pair: (min(pair), max(pair)))


@given(st.lists(st.tuples(st.booleans(), _EXTENT), max_size=12), _EXTENT)
@pytest.mark.slow
def test_extents_equal_a_set_of_offsets(changes: list[tuple[bool, tuple[int, int]]], within: tuple[int, int]) -> None:
    """After any additions and removals, the extents are in order and no two of them touch. They contain exactly the
    bytes that were added and not removed. `gaps` returns the missing bytes of a range, and `reach` the end of the
    stored bytes that start at an offset."""
    extents, offsets = Extents(), set[int]()
    for add, (start, stop) in changes:
        if add:
            extents.add(start, stop)
            offsets |= set(range(start, stop))
        else:
            extents.remove(start, stop)
            offsets -= set(range(start, stop))
    pairs = list(extents)
    assert len(extents) == len(pairs)
    assert all(start < stop for start, stop in pairs)
    assert all(before[1] < after[0] for before, after in pairwise(pairs))
    assert {at for pair in pairs for at in range(*pair)} == offsets
    gaps = extents.gaps(*within)
    assert {at for gap in gaps for at in range(*gap)} == set(range(*within)) - offsets
    assert all(before[1] < after[0] for before, after in pairwise(gaps))
    for at in range(SIZE + 1):
        reached = extents.covered_until(at)
        assert set(range(at, reached)) <= offsets
        assert reached not in offsets


def test_extents_that_touch_are_one() -> None:
    """The extents [0, 5) and [5, 9) are merged to [0, 9)."""
    assert list(Extents([(5, 9), (0, 5)])) == [(0, 9)]
