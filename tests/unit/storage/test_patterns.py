"""Patterns of repository names, and sets of names made of them."""

from __future__ import annotations

import gc
import time
import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from storage.patterns import ALL_NAMES, NO_NAMES, NamePattern, NameSet


@pytest.mark.parametrize(
    ("pattern", "matches", "not_matches"),
    [
        ("team/**", ["team/a", "team/a/b/c"], ["team", "teams/a", "my/team/a"]),
        ("team/*", ["team/a", "team/a-b.c"], ["team/a/b", "team"]),
        ("*", ["a", "a.b-c"], ["a/b"]),
        ("**", ["a", "a/b/c"], []),
        ("*/app", ["a/app"], ["app", "a/b/app", "a/apps"]),
        ("**/app", ["a/app", "a/b/app"], ["app"]),
        ("a.b/c", ["a.b/c"], ["axb/c", "a.b/c/d"]),
    ],
)
def test_patterns(pattern: str, matches: list[str], not_matches: list[str]) -> None:
    """`*` stays inside a segment, `**` spans segments, everything else means itself."""
    compiled = NamePattern(pattern)
    assert [name for name in matches if not compiled.matches(name)] == []
    assert [name for name in not_matches if compiled.matches(name)] == []


def matches_as_said(pattern: str, name: str) -> bool:
    """By the meaning of the stars, trying everything they may stand for."""
    if not pattern:
        return not name
    star = next((star for star in ("**", "*") if pattern.startswith(star)), "")
    if not star:
        return name[:1] == pattern[0] and matches_as_said(pattern[1:], name[1:])
    ends = range(len(name) + 1) if star == "**" or "/" not in name else range(name.index("/") + 1)
    return any(matches_as_said(pattern[len(star) :], name[end:]) for end in ends)


@given(
    st.text("ab/*", min_size=1, max_size=10).filter(
        lambda text: "***" not in text and "//" not in text and text == text.strip("/")
    ),
    st.text("ab/", max_size=9),
)
@example("**a*b", "a/ab")
@example("a*b/a*b**b*a", "aab/abb/ba")
def test_meaning(pattern: str, name: str) -> None:
    """Whatever stars stand together, a pattern matches what they say."""
    assert NamePattern(pattern).matches(name) is matches_as_said(pattern, name)


@pytest.mark.parametrize("pattern", ["*a" * 100 + "*b", "**a" * 84 + "b", "*/" * 100 + "**a*a*b", "**a*a*a*a*a*b"])
def test_no_pattern_is_slow(pattern: str) -> None:
    """Accounts write patterns, so none may hold up the others: trying all that stars may stand for would take years."""
    name = "a" * 255
    begun = time.process_time()
    assert not NamePattern(pattern).matches(name)
    assert not NamePattern(pattern).matches("a/" * 127 + "a")
    assert (NameSet.of([pattern]).first_from("a/" * 127 + "a") or "b") > "a"
    assert time.process_time() - begun < 0.1


def test_many_patterns_are_not_slow() -> None:
    """As many patterns as can be granted to one subject, with as many stars, are matched together."""
    kinds = (
        [f"team{number}/**" for number in range(5000)],
        [f"team{number}/*" for number in range(5000)],
        [f"**/x{number}" for number in range(5000)],
        [f"**{number}" + "*a" * 120 for number in range(128)],
    )
    for patterns in kinds:
        names = NameSet.of(patterns)
        for name in ("team4999/app", "a" * 255, "a/" * 127 + "a"):
            begun = time.process_time()
            assert (name in names) is any(NamePattern(pattern).matches(name) for pattern in patterns[-1:])
            assert time.process_time() - begun < 0.25


@pytest.mark.parametrize("pattern", ["", "/", "team/", "/team", "a//b", "Team/**", "a***", "team/?", "a b", "a\n"])
def test_what_is_no_pattern(pattern: str) -> None:
    """It is refused with an example."""
    with pytest.raises(ValueError, match=r"is not a pattern of names like team/\*\*"):
        NamePattern(pattern)


@pytest.mark.parametrize(
    ("pattern", "prefix", "whole"),
    [
        ("team/**", "team/", True),
        ("**", "", True),
        ("team/*", "team/", False),
        ("a/b", "a/b", False),
        ("a/**/c", "a/", False),
    ],
)
def test_prefixes(pattern: str, prefix: str, whole: bool) -> None:
    """A pattern says what its names begin with, and whether that is all it asks."""
    made = NamePattern(pattern)
    assert (made.prefix, made.whole) == (prefix, whole)


def test_sets() -> None:
    """A name is in a set when one of its patterns matches; below a guarded segment only a pattern of its own counts."""
    names = NameSet.of(["**", "ghcr.io/team/**"], guarded=["ghcr.io", "quay.io"])
    inside = ["app", "docker.io/library/ubuntu", "ghcr.io/team/app"]
    outside = ["ghcr.io/other/app", "quay.io/team/app", "quay.io"]
    assert [name for name in inside if name not in names] == []
    assert [name for name in outside if name in names] == []
    assert "app" in ALL_NAMES
    assert "app" not in NO_NAMES
    assert ALL_NAMES.everything
    assert not names.everything


_SEGMENTS = ["a", "b", "ab", "a-b", "a.b", "a0"]
_PATTERN_SEGMENTS = [*_SEGMENTS, "*", "**", "a*", "a**", "*b"]
_NAMES = st.lists(st.sampled_from(_SEGMENTS), min_size=1, max_size=3).map("/".join)
_PATTERNS = st.lists(st.sampled_from(_PATTERN_SEGMENTS), min_size=1, max_size=3).map("/".join)


@given(
    patterns=st.sets(_PATTERNS, max_size=4),
    guarded=st.sets(st.sampled_from(_SEGMENTS), max_size=2),
    limits=st.none() | st.sets(_PATTERNS, max_size=3),
    names=st.sets(_NAMES, min_size=1, max_size=12),
    first=st.just("") | _NAMES,
)
@example({"a"}, {"a"}, None, {"a"}, "")
@example({"**", "a/b**"}, {"a"}, None, {"a", "a/b", "a/a", "a-b", "a0"}, "a/a")
@example({"a/**"}, {"b"}, {"*/b"}, {"a/a", "a/b", "b/b"}, "")
def test_sets_as_said(
    patterns: set[str], guarded: set[str], limits: set[str] | None, names: set[str], first: str
) -> None:
    """A set has the names that one of its patterns matches, and one of its limits; below a guarded segment only a
    pattern of its own counts. Nothing of the set is passed over on the way to where it goes on."""
    made = NameSet.of(patterns, guarded, limits)

    def inside(name: str) -> bool:
        segment = name.partition("/")[0]
        reaching = [p for p in patterns if segment not in guarded or p.startswith(f"{segment}/")]
        allowed = any(matches_as_said(pattern, name) for pattern in reaching)
        return allowed and (limits is None or any(matches_as_said(pattern, name) for pattern in limits))

    assert {name for name in names if name in made} == {name for name in names if inside(name)}
    for start in (first, first + "\0", *names):
        found = made.first_from(start)
        assert found is None or found >= start
        assert not [name for name in names if name >= start and (found is None or name < found) and inside(name)]


@pytest.mark.parametrize(
    ("patterns", "name", "found"),
    [
        (["*"], "team/app", "team0"),
        (["te*", "web/**"], "tez/app", "tez0"),
        (["te*", "web/**"], "tool", "web/"),
        (["*/app"], "team/web", "team0"),
        (["*/app"], "team/aa", "team/ap"),
        (["*/*b"], "team/web/x", "team/web0"),
        (["a*/x/*"], "a/b/c/d", "a/x"),
        (["**/app"], "team/web/x", "team/web/x\0"),
        (["te**/app", "web"], "tool/web/x", "web"),
        (["team/*", "a/b/**"], "team/web/x", "team/web0"),
        (["team/a*c"], "team/b", None),
    ],
)
def test_where_a_set_goes_on(patterns: list[str], name: str, found: str | None) -> None:
    """After a name that is in no pattern, those are passed over that no pattern can match."""
    assert NameSet.of(patterns).first_from(name + "\0") == found


def test_a_set_goes_on_below_a_guarded_segment() -> None:
    """Where a pattern reaches there; else after it."""
    names = NameSet.of(["**", "b/x/**"], ["a", "b"])
    assert names.first_from("a/x") == "a0"
    assert names.first_from("b/a") == "b/x/"
    assert names.first_from("b/y") == "b0"
    assert names.first_from("a-") == "a-"


def _kept_by(make: Callable[[int], NameSet]) -> float:
    """MB that are kept for 100 sets of names, once each was asked for names with every letter."""
    gc.collect()
    tracemalloc.start()
    try:
        sets = [make(number) for number in range(100)]
        for names in sets:
            assert not any(f"team/{letter}" in names for letter in "abcdefghijklmnopqrstuvwxyz0123456789-_.")
        gc.collect()
        return tracemalloc.get_traced_memory()[0] / 1e6
    finally:
        tracemalloc.stop()


def _large(seed: str) -> frozenset[NamePattern]:
    return frozenset(NamePattern(f"team/*{seed}-{number}-{'x' * 230}") for number in range(128))


@pytest.mark.slow
def test_equal_sets_share_what_matches_them() -> None:
    """Each of a thousand tokens may have many patterns, mostly the same ones; what matches them exists once."""
    assert _kept_by(lambda _: NameSet(_large("a"), limits=_large("b"))) < 12


@pytest.mark.slow
def test_what_matches_large_sets_is_bounded() -> None:
    """However many different sets there are, what matches them is kept for some of them only."""
    patterns = [_large(str(number)) for number in range(100)]
    assert _kept_by(lambda number: NameSet(patterns[number])) < 15
