"""Which digest of a tag a cooldown lets through, for any history of the tag."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.mirror.cooldown import MAX_SIGHTINGS, TagChoice, add_sighting, choose_digest
from storage.content import digest_of
from storage.names import Digest
from storage.upstream_tags import Sighting

HOUR = 3600.0
DAY = 24 * HOUR
START = 1_750_000_000.0
COOLDOWN = 3 * DAY
A, B, C = (digest_of(name.encode()) for name in "ABC")

moves_strategy = st.lists(
    st.tuples(st.floats(min_value=0.01, max_value=5 * DAY), st.integers(min_value=0, max_value=4)),
    min_size=1,
    max_size=20,
)
"""Moves of a tag: how many seconds after the previous one, and to which digest."""


def history(*moves: tuple[float, Digest]) -> list[Sighting]:
    """Returns sightings of the tag at these times after `START`."""
    return [Sighting(START + at, digest) for at, digest in moves]


def choice(sightings: Sequence[Sighting], at: float, *, serves_new: bool = True) -> TagChoice:
    """Returns which digest is served at the time `at` after `START`. Later sightings are not yet known then."""
    known = [seen for seen in sightings if seen.since <= START + at]
    return choose_digest(known, COOLDOWN, START + at, serves_new=serves_new)


def served(sightings: Sequence[Sighting], at: float, *, serves_new: bool = True) -> Digest | None:
    return next(iter(choice(sightings, at, serves_new=serves_new).candidates), None)


def test_a_move_takes_effect_after_the_cooldown() -> None:
    """A new digest is served from the moment at which it has held the tag for the cooldown."""
    seen = history((0, A), (10 * DAY, B))
    assert served(seen, 10 * DAY) == A
    assert served(seen, 13 * DAY - 1) == A
    assert choice(seen, 12 * DAY).newest_matures_at == START + 13 * DAY
    assert served(seen, 13 * DAY) == B
    assert choice(seen, 13 * DAY).newest_matures_at is None


def test_a_digest_that_held_the_tag_too_briefly_is_never_served() -> None:
    """A digest that was replaced before the end of its cooldown, as a withdrawn release is, is skipped for good."""
    seen = history((0, A), (10 * DAY, B), (11 * DAY, C))
    for at, expected in ((10.5, A), (11, A), (13, A), (13.9, A), (14, C), (40, C)):
        assert served(seen, at * DAY) == expected


def test_a_move_back_takes_effect_at_once() -> None:
    """A digest that has held the tag for the cooldown before is served again as soon as the tag points at it."""
    seen = history((0, A), (10 * DAY, B), (20 * DAY, A))
    assert served(seen, 19 * DAY) == B
    assert served(seen, 20 * DAY) == A
    assert choice(seen, 20 * DAY).newest_matures_at is None


def test_a_new_tag() -> None:
    """Depending on the setting, the first digest of a tag is served at once, or only after it has held the tag for the
    cooldown. A second digest waits in both cases."""
    seen = history((0, A), (DAY, B))
    assert served(seen[:1], 0) == A
    assert served(seen, DAY) == A
    assert served(seen, 4 * DAY) == B
    assert served(seen[:1], 2 * DAY, serves_new=False) is None
    assert served(seen[:1], 3 * DAY, serves_new=False) == A
    assert served(seen, 3 * DAY, serves_new=False) is None
    assert choice(seen, 3 * DAY, serves_new=False).newest_matures_at == START + 4 * DAY
    assert served(seen, 4 * DAY, serves_new=False) == B


def test_the_second_best() -> None:
    """The alternatives to the served digest are the older mature digests, each once. A digest is *mature* if it has
    held the tag for the cooldown."""
    seen = history((0, A), (4 * DAY, B), (8 * DAY, A), (12 * DAY, C))
    assert choice(seen, 12 * DAY).candidates == (A, B)
    assert choice(seen, 15 * DAY).candidates == (C, A, B)


@given(moves_strategy, st.floats(min_value=0, max_value=10 * DAY))
def test_the_newest_mature_digest_is_served(moves: list[tuple[float, int]], rest: float) -> None:
    """The served digest has held the tag for the cooldown, and no digest that came later has."""
    at, seen = START, list[Sighting]()
    for pause, number in moves:
        at += pause
        seen.append(Sighting(at, digest_of(b"%d" % number)))
    now = at + rest
    stretches = [(s.digest, end - s.since) for s, end in zip(seen, [*(s.since for s in seen[1:]), now], strict=True)]
    found = next(iter(choose_digest(seen, COOLDOWN, now, serves_new=False).candidates), None)
    mature = {digest for digest, held in stretches if held >= COOLDOWN}
    assert (found in mature) if mature else (found is None)
    after = len(seen) if found is None else max(i for i, (digest, _) in enumerate(stretches) if digest == found) + 1
    assert not mature & {digest for digest, _ in stretches[after:]}


@pytest.mark.parametrize("serves_new", [True, False])
@settings(max_examples=12)
@given(moves=st.lists(st.floats(min_value=0.01, max_value=4 * DAY), min_size=MAX_SIGHTINGS, max_size=3 * MAX_SIGHTINGS))
def test_pruning_changes_nothing_that_is_served(moves: list[float], serves_new: bool) -> None:
    """Only few sightings of a tag are kept. If the tag moves to ever new digests, the served digest is the same as with
    all sightings."""
    now, whole, kept = START, list[Sighting](), list[Sighting]()
    for number, pause in enumerate(moves):
        now += pause
        digest = digest_of(b"%d" % number)
        whole.append(Sighting(now, digest))
        kept = list(add_sighting(kept, digest, now, COOLDOWN, serves_new=serves_new))
        assert len(kept) <= MAX_SIGHTINGS
        for later in (0.0, COOLDOWN / 2, COOLDOWN):
            expected = choose_digest(whole, COOLDOWN, now + later, serves_new=serves_new)
            actual = choose_digest(kept, COOLDOWN, now + later, serves_new=serves_new)
            assert actual.candidates[:1] == expected.candidates[:1]
            assert (actual.newest, actual.newest_matures_at) == (expected.newest, expected.newest_matures_at)


@pytest.mark.parametrize("serves_new", [True, False])
@settings(max_examples=12)
@given(moves=st.lists(st.integers(min_value=0, max_value=3), min_size=60, max_size=150))
def test_pruning_makes_no_digest_mature(moves: list[int], serves_new: bool) -> None:
    """If a tag moves back and forth, a digest that is served by the kept sightings is also mature by the whole
    history."""
    now, whole, kept = START, list[Sighting](), list[Sighting]()
    for step, number in enumerate(moves):
        now += HOUR if step != 5 else 4 * DAY  # one digest becomes mature
        digest = digest_of(b"%d" % number)
        if not whole or whole[-1].digest != digest:
            whole.append(Sighting(now, digest))
        kept = list(add_sighting(kept, digest, now, COOLDOWN, serves_new=serves_new))
        allowed = set(choose_digest(whole, COOLDOWN, now, serves_new=serves_new).candidates)
        assert set(choose_digest(kept, COOLDOWN, now, serves_new=serves_new).candidates) <= allowed


def test_the_same_digest_again() -> None:
    """A sighting of the same digest as the last one changes nothing."""
    seen = history((0, A))
    assert add_sighting(seen, A, START + DAY, COOLDOWN, serves_new=True) is seen


def test_a_clock_set_back() -> None:
    """Sightings from before the clock was set back keep their order. They become mature after the cooldown, and not
    only when the clock reaches the old time again."""
    seen = history((0, A), (100 * DAY, B), (200 * DAY, C))
    after = add_sighting(seen, C, START + 10 * DAY, COOLDOWN, serves_new=True)
    assert [sighting.digest for sighting in after] == [A, B, C]
    assert served(after, 10 * DAY + 1) == A
    assert served(after, 13 * DAY + 1) == C
    times = [sighting.since for sighting in after]
    assert times == sorted(set(times))


def test_two_answers_at_the_same_time() -> None:
    """Two moves within the resolution of the clock get different times."""
    seen = add_sighting(history((0, A)), B, START, COOLDOWN, serves_new=True)
    assert seen[0].since < seen[1].since
