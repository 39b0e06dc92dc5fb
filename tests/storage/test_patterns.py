"""Patterns of repository names, and sets of names made of them."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from storage.patterns import ALL_NAMES, NO_NAMES, NamePattern, Names


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
    assert Names.of([pattern]).beyond("a/" * 127 + "a") > "a"
    assert time.process_time() - begun < 1.0


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
    names = Names.of(["**", "ghcr.io/team/**"], guarded=["ghcr.io", "quay.io"])
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
    names=st.sets(_NAMES, min_size=1, max_size=12),
    first=st.just("") | _NAMES,
)
@example({"a"}, {"a"}, {"a"}, "")
@example({"**", "a/b**"}, {"a"}, {"a", "a/b", "a/a", "a-b", "a0"}, "a/a")
def test_ranges(patterns: set[str], guarded: set[str], names: set[str], first: str) -> None:
    """A set's ranges lie in order and apart; every name of the set is in one of them, and all names of a whole one are
    in the set. Those from a name on are the same without what lies before it. Nothing of the set is passed over."""
    made = Names.of(patterns, guarded)
    places = [place for found in made.ranges for place in (found.start, found.stop)]
    assert places == sorted(places)
    touching = [two for one, two in pairwise(made.ranges) if one.stop == two.start and one.whole is two.whole]
    assert touching == []
    for name in names:
        around = [found for found in made.ranges if found.start <= name < found.stop]
        assert name not in made or len(around) == 1
        assert name in made or not any(found.whole for found in around)
        beyond = made.beyond(name)
        assert beyond > name
        assert name in made or not any(between in made for between in names if name < between < beyond)
    later = {name for name in names if any(found.start <= name < found.stop for found in made.ranges_from(first))}
    assert later == {n for n in names if n >= first and any(found.start <= n < found.stop for found in made.ranges)}


@pytest.mark.parametrize(
    ("patterns", "name", "beyond"),
    [
        (["*"], "team/app", "team0"),
        (["*/app"], "team/web", "team/web\0"),
        (["*/app"], "team/web/x", "team/web0"),
        (["a*/x/*"], "a/b/c/d", "a/b0"),
        (["**/app"], "team/web/x", "team/web/x\0"),
        (["te**/app", "web"], "team/web/x", "team/web/x\0"),
        (["te**/app", "web"], "tool/web/x", "tool0"),
        (["team/*", "a/b/**"], "team/web/x", "team/web0"),
    ],
)
def test_what_lies_beyond(patterns: list[str], name: str, beyond: str) -> None:
    """After a name that is in no pattern, those with the same first segments are passed over where none can be."""
    assert Names.of(patterns).beyond(name) == beyond


def test_ranges_are_as_narrow_as_the_patterns() -> None:
    """What no pattern begins with is in no range; what nothing but a name matches is a range for itself."""
    names = Names.of(["team/**", "library/*", "team/app/**", "web", "tool"])
    assert [(found.start, found.stop, found.whole) for found in names.ranges] == [
        ("library/", "library0", False),
        ("team/", "team0", True),
        ("tool", "tool\0", True),
        ("web", "web\0", True),
    ]
    assert [found.whole for found in ALL_NAMES.ranges] == [True]
    assert NO_NAMES.ranges == ()
