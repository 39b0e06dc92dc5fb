"""Sets of bytes as extents, compared with sets of numbers."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from storage.blobs.files.extents import Extents

SIZE = 40
_EXTENT = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(lambda pair: (min(pair), max(pair)))


@given(st.lists(st.tuples(st.booleans(), _EXTENT), max_size=12), _EXTENT)
def test_extents_say_of_every_byte_whether_it_is_there(
    changes: list[tuple[bool, tuple[int, int]]], within: tuple[int, int]
) -> None:
    """After any additions and removals, the extents are merged and in order. The extents, their gaps and their reach
    describe exactly the bytes that were added."""
    extents, there = Extents(), set[int]()
    for add, (start, stop) in changes:
        if add:
            extents.add(start, stop)
            there |= set(range(start, stop))
        else:
            extents.remove(start, stop)
            there -= set(range(start, stop))
    pairs = list(extents)
    assert len(extents) == len(pairs)
    assert all(start < stop for start, stop in pairs)
    assert all(before[1] < after[0] for before, after in pairwise(pairs))
    assert {at for pair in pairs for at in range(*pair)} == there
    gaps = extents.gaps(*within)
    assert {at for gap in gaps for at in range(*gap)} == set(range(*within)) - there
    assert all(before[1] < after[0] for before, after in pairwise(gaps))
    for at in range(SIZE + 1):
        reached = extents.reach(at)
        assert set(range(at, reached)) <= there
        assert reached not in there


def test_extents_that_touch_are_one() -> None:
    """[0, 5) and [5, 9) become [0, 9)."""
    assert list(Extents([(5, 9), (0, 5)])) == [(0, 9)]
