"""Which digest of a mirrored tag is served while a cooldown delays the tag's moves.

A *sighting* is the first time that the mirror saw the tag point at a digest. A digest is *mature* if it has held the
tag for at least the cooldown. The newest mature digest is served. Times are in seconds."""

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
"""Moves of a tag. Each move has the seconds since the previous move, and a number that stands for the digest."""


def history(*moves: tuple[float, Digest]) -> list[Sighting]:
    """Returns sightings of the tag. `moves`: the seconds after `START`, and the digest at which the tag then points."""
    return [Sighting(START + at, digest) for at, digest in moves]


def choice(sightings: Sequence[Sighting], at: float, *, serves_new: bool = True) -> TagChoice:
    """Returns what is served for the tag `at` seconds after `START`. Ignores later sightings."""
    earlier_sightings = [sighting for sighting in sightings if sighting.since <= START + at]
    return choose_digest(earlier_sightings, COOLDOWN, START + at, serves_new=serves_new)


def digest_served_at(sightings: Sequence[Sighting], at: float, *, serves_new: bool = True) -> Digest | None:
    """Returns the digest that is served `at` seconds after `START`; None if no digest may be served."""
    return next(iter(choice(sightings, at, serves_new=serves_new).candidates), None)


def test_a_move_takes_effect_after_the_cooldown() -> None:
    """A new digest is served as soon as the tag has named it for the cooldown."""
    sightings = history((0, A), (10 * DAY, B))
    assert digest_served_at(sightings, 10 * DAY) == A
    assert digest_served_at(sightings, 13 * DAY - 1) == A
    assert choice(sightings, 12 * DAY).newest_held_back_until == START + 13 * DAY
    assert digest_served_at(sightings, 13 * DAY) == B
    assert choice(sightings, 13 * DAY).newest_held_back_until is None


def test_a_digest_that_held_the_tag_too_briefly_is_never_served() -> None:
    """A digest that was replaced before the end of its cooldown is never served. An example is a release that was
    withdrawn soon."""
    sightings = history((0, A), (10 * DAY, B), (11 * DAY, C))
    for at, expected in ((10.5, A), (11, A), (13, A), (13.9, A), (14, C), (40, C)):
        assert digest_served_at(sightings, at * DAY) == expected


def test_a_move_back_takes_effect_at_once() -> None:
    """If the tag has named a digest for the cooldown before, it is served again as soon as the tag moves back to it."""
    sightings = history((0, A), (10 * DAY, B), (20 * DAY, A))
    assert digest_served_at(sightings, 19 * DAY) == B
    assert digest_served_at(sightings, 20 * DAY) == A
    assert choice(sightings, 20 * DAY).newest_held_back_until is None


def test_a_new_tag() -> None:
    """With `serves_new`, the first digest of a tag is served at once. Without it, the first digest is served only after
    the tag has named it for the cooldown. A second digest is held back in both cases."""
    sightings = history((0, A), (DAY, B))
    assert digest_served_at(sightings[:1], 0) == A
    assert digest_served_at(sightings, DAY) == A
    assert digest_served_at(sightings, 4 * DAY) == B
    assert digest_served_at(sightings[:1], 2 * DAY, serves_new=False) is None
    assert digest_served_at(sightings[:1], 3 * DAY, serves_new=False) == A
    assert digest_served_at(sightings, 3 * DAY, serves_new=False) is None
    assert choice(sightings, 3 * DAY, serves_new=False).newest_held_back_until == START + 4 * DAY
    assert digest_served_at(sightings, 4 * DAY, serves_new=False) == B


def test_older_mature_digests_are_alternatives() -> None:
    """If the served digest cannot be fetched, the alternatives are the older mature digests, the newest first. Each
    digest is listed once."""
    sightings = history((0, A), (4 * DAY, B), (8 * DAY, A), (12 * DAY, C))
    assert choice(sightings, 12 * DAY).candidates == (A, B)
    assert choice(sightings, 15 * DAY).candidates == (C, A, B)


@given(moves_strategy, st.floats(min_value=0, max_value=10 * DAY))
@pytest.mark.slow
def test_the_newest_mature_digest_is_served(moves: list[tuple[float, int]], seconds_since_last_move: float) -> None:
    """The tag has named the served digest for the cooldown, but no later digest."""
    at, sightings = START, list[Sighting]()
    for seconds_later, number in moves:
        at += seconds_later
        sightings.append(Sighting(at, digest_of(b"%d" % number)))
    now = at + seconds_since_last_move
    holding_times = [
        (s.digest, end - s.since) for s, end in zip(sightings, [*(s.since for s in sightings[1:]), now], strict=True)
    ]
    served_digest = next(iter(choose_digest(sightings, COOLDOWN, now, serves_new=False).candidates), None)
    mature = {digest for digest, seconds in holding_times if seconds >= COOLDOWN}
    assert (served_digest in mature) if mature else (served_digest is None)
    next_index = (
        len(sightings)
        if served_digest is None
        else max(i for i, (digest, _) in enumerate(holding_times) if digest == served_digest) + 1
    )
    assert not mature & {digest for digest, _ in holding_times[next_index:]}


@pytest.mark.parametrize("serves_new", [True, False])
@settings(max_examples=12)
@given(moves=st.lists(st.floats(min_value=0.01, max_value=4 * DAY), min_size=MAX_SIGHTINGS, max_size=3 * MAX_SIGHTINGS))
@pytest.mark.slow
def test_pruning_changes_nothing_that_is_served(moves: list[float], serves_new: bool) -> None:
    """The mirror keeps only a limited number of sightings of a tag. If every move of the tag is to a new digest, the
    served digest is the same as if all sightings were kept."""
    now, all_sightings, kept_sightings = START, list[Sighting](), list[Sighting]()
    for number, seconds_later in enumerate(moves):
        now += seconds_later
        digest = digest_of(b"%d" % number)
        all_sightings.append(Sighting(now, digest))
        kept_sightings = list(add_sighting(kept_sightings, digest, now, COOLDOWN, serves_new=serves_new))
        assert len(kept_sightings) <= MAX_SIGHTINGS
        for later in (0.0, COOLDOWN / 2, COOLDOWN):
            expected = choose_digest(all_sightings, COOLDOWN, now + later, serves_new=serves_new)
            actual = choose_digest(kept_sightings, COOLDOWN, now + later, serves_new=serves_new)
            assert actual.candidates[:1] == expected.candidates[:1]
            assert (actual.newest, actual.newest_held_back_until) == (expected.newest, expected.newest_held_back_until)


@pytest.mark.parametrize("serves_new", [True, False])
@settings(max_examples=12)
@given(moves=st.lists(st.integers(min_value=0, max_value=3), min_size=60, max_size=150))
def test_pruning_makes_no_digest_mature(moves: list[int], serves_new: bool) -> None:
    """A tag moves back and forth between a few digests. Every digest that may be served according to the kept sightings
    may also be served according to all sightings."""
    now, all_sightings, kept_sightings = START, list[Sighting](), list[Sighting]()
    for step, number in enumerate(moves):
        now += HOUR if step != 5 else 4 * DAY  # one digest becomes mature
        digest = digest_of(b"%d" % number)
        if not all_sightings or all_sightings[-1].digest != digest:
            all_sightings.append(Sighting(now, digest))
        kept_sightings = list(add_sighting(kept_sightings, digest, now, COOLDOWN, serves_new=serves_new))
        allowed = set(choose_digest(all_sightings, COOLDOWN, now, serves_new=serves_new).candidates)
        assert set(choose_digest(kept_sightings, COOLDOWN, now, serves_new=serves_new).candidates) <= allowed


def test_the_same_digest_again() -> None:
    """If the tag still points at the digest of the last sighting, no sighting is added."""
    sightings = history((0, A))
    assert add_sighting(sightings, A, START + DAY, COOLDOWN, serves_new=True) is sightings


def test_a_clock_set_back() -> None:
    """After the clock was set back, earlier sightings are in the future. They keep their order, and their digests
    become mature when the cooldown has passed, not only when the clock reaches the old times again."""
    sightings = history((0, A), (100 * DAY, B), (200 * DAY, C))
    moved_back = add_sighting(sightings, C, START + 10 * DAY, COOLDOWN, serves_new=True)
    assert [sighting.digest for sighting in moved_back] == [A, B, C]
    assert digest_served_at(moved_back, 10 * DAY + 1) == A
    assert digest_served_at(moved_back, 13 * DAY + 1) == C
    times = [sighting.since for sighting in moved_back]
    assert times == sorted(set(times))


def test_two_moves_at_the_same_time() -> None:
    """Two moves that the mirror sees at the same time are recorded with different times."""
    sightings = add_sighting(history((0, A)), B, START, COOLDOWN, serves_new=True)
    assert sightings[0].since < sightings[1].since
