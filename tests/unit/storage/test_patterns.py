"""Patterns of repository names, sets of names, and which patterns cover which."""

from __future__ import annotations

import gc
import re
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from itertools import product

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from storage.errors import NameInvalid
from storage.names import RepositoryName
from storage.patterns import ALL_NAMES, NO_NAMES, NamePattern, NameSet, require_simple
from tests.fakes.instruction_count import count_instructions


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
    """`*` matches within a segment, `**` over segments, and all other characters match themselves."""
    compiled = NamePattern(pattern)
    assert [name for name in matches if not compiled.matches(name)] == []
    assert [name for name in not_matches if compiled.matches(name)] == []


def matches_as_said(pattern: str, name: str) -> bool:
    """Returns whether a name matches, by the definition of the stars: tries every text that a star may stand for."""
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
    """A pattern matches what the definition says, whatever stars follow each other."""
    assert NamePattern(pattern).matches(name) is matches_as_said(pattern, name)


@pytest.mark.parametrize("pattern", ["*a" * 100 + "*b", "**a" * 84 + "b", "*/" * 100 + "**a*a*b", "**a*a*a*a*a*b"])
def test_no_pattern_is_slow(pattern: str) -> None:
    """No pattern is slow, because users write patterns. Backtracking would take years for these patterns."""
    name = "a" * 255
    with count_instructions() as count:
        assert not NamePattern(pattern).matches(name)
        assert not NamePattern(pattern).matches("a/" * 127 + "a")
        assert (NameSet.of([pattern]).seek("a/" * 127 + "a") or "b") > "a"
    assert count.total < 60_000


def test_many_patterns_are_not_slow() -> None:
    """The largest number of patterns of one subject, with many stars, is matched in one pass."""
    kinds = (
        [f"team{number}/**" for number in range(5000)],
        [f"team{number}/*" for number in range(5000)],
        [f"**/x{number}" for number in range(5000)],
        [f"**{number}" + "*a" * 120 for number in range(128)],
    )
    for patterns in kinds:
        names = NameSet.of(patterns)
        names.prepare()
        for name in ("team4999/app", "a" * 255, "a/" * 127 + "a"):
            with count_instructions() as count:
                found = name in names
            assert found is NamePattern(patterns[-1]).matches(name)
            assert count.total < 50 * 255  # one step of some 22 instructions for each character of the name


@pytest.mark.parametrize("pattern", ["", "/", "team/", "/team", "a//b", "Team/**", "a***", "team/?", "a b", "a\n"])
def test_what_is_no_pattern(pattern: str) -> None:
    """The error has an example of a pattern."""
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
    """A pattern tells its prefix, and whether every name with that prefix matches."""
    made = NamePattern(pattern)
    assert (made.prefix, made.is_prefix_match) == (prefix, whole)


def test_sets() -> None:
    """A name is in a set if one of the patterns matches. Below a guarded segment, only patterns that begin with this
    segment count."""
    names = NameSet.of(["**", "ghcr.io/team/**"], guarded=["ghcr.io", "quay.io"])
    inside = ["app", "docker.io/library/ubuntu", "ghcr.io/team/app"]
    outside = ["ghcr.io/other/app", "quay.io/team/app", "quay.io"]
    assert [name for name in inside if name not in names] == []
    assert [name for name in outside if name in names] == []
    assert "app" in ALL_NAMES
    assert "app" not in NO_NAMES
    assert ALL_NAMES.has_every_name
    assert not names.has_every_name


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
    """A set has the names that match one of its patterns and one of its limits. Below a guarded segment, only patterns
    that begin with this segment count. `seek` skips no name of the set."""
    made = NameSet.of(patterns, guarded, limits)

    def inside(name: str) -> bool:
        segment = name.partition("/")[0]
        reaching = [p for p in patterns if segment not in guarded or p.startswith(f"{segment}/")]
        allowed = any(matches_as_said(pattern, name) for pattern in reaching)
        return allowed and (limits is None or any(matches_as_said(pattern, name) for pattern in limits))

    assert {name for name in names if name in made} == {name for name in names if inside(name)}
    for start in (first, first + "\0", *names):
        found = made.seek(start)
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
    """After a name that is not in the set, `seek` skips names that no pattern can match."""
    assert NameSet.of(patterns).seek(name + "\0") == found


def test_a_set_goes_on_below_a_guarded_segment() -> None:
    """`seek` skips a guarded segment unless a pattern begins with it."""
    names = NameSet.of(["**", "b/x/**"], ["a", "b"])
    assert names.seek("a/x") == "a0"
    assert names.seek("b/a") == "b/x/"
    assert names.seek("b/y") == "b0"
    assert names.seek("a-") == "a-"


SIMPLE = ["team/app", "a", "team/app-*", "team/*", "team/**", "te**", "*", "**"]
OLD = ["*/app", "**/app", "team/*/app", "a*b", "team/**x", "*/*", "team/*/**", "**a**"]


@pytest.mark.parametrize("pattern", SIMPLE)
def test_simple_patterns(pattern: str) -> None:
    """An exact name is a simple pattern. So is a prefix with `*` or `**` at its end."""
    assert require_simple(NamePattern(pattern)) == pattern


@pytest.mark.parametrize("pattern", OLD)
def test_patterns_that_are_not_simple(pattern: str) -> None:
    """For a pattern that is not simple, the error shows the simple forms. The pattern itself still matches."""
    with pytest.raises(ValueError, match=r"star before its end; .* team/app-\*, team/\*, team/\*\* or \*\*"):
        require_simple(NamePattern(pattern))
    assert any(NamePattern(pattern).matches(name) for name in ("a/app", "team/x/app", "ab", "team/x", "a/b/c"))


def _all_names() -> list[RepositoryName]:
    """Returns every name of up to five of these characters."""
    names = []
    for length in range(1, 6):
        for letters in product("ab/-", repeat=length):
            with suppress(NameInvalid):
                names.append(RepositoryName("".join(letters)))
    return names


_SHORT_NAMES = _all_names()
_PARTS = st.sampled_from(["a", "b", "ab", "*", "**", "a*", "*b", "a**", "-", "a-*", "*a*"])
_ANY = st.lists(_PARTS, min_size=1, max_size=3).map("/".join).filter(lambda text: "***" not in text).map(NamePattern)
_ENDS = st.sampled_from(["", "*", "**"])
_SIMPLE = st.builds(lambda text, end: text + end, st.text("ab/-", max_size=4), _ENDS).filter(
    lambda text: bool(re.fullmatch(r"[ab*-]+(/[ab*-]+)*", text))
)


@given(st.sets(_ANY | _SIMPLE, max_size=3), _ANY, st.sets(st.sampled_from(["a", "b"])), st.none() | st.sets(_ANY))
@example({"a/**"}, NamePattern("a/*/b"), set(), None)
@example({"**"}, NamePattern("a/*"), {"a"}, None)
@example({"a*"}, NamePattern("a*/b"), set(), None)
def test_covering_is_never_wrong(
    patterns: set[str], inner: NamePattern, guarded: set[str], limits: set[str] | None
) -> None:
    """If a set covers a pattern, it holds every name that the pattern matches."""
    outer = NameSet.of(patterns, guarded, limits)
    if outer.covers(inner):
        reached = NameSet.of([inner], guarded)
        assert [name for name in _SHORT_NAMES if name in reached and name not in outer] == []


@given(_SIMPLE, _SIMPLE)
@example("a*", "ab*")
@example("a/**", "a/*")
def test_covering_of_simple_patterns_is_complete(outer: str, inner: str) -> None:
    """If one simple pattern does not cover another, there is a name that only the other one matches."""
    if not NameSet.of([outer]).covers(NamePattern(inner)):
        names = {inner.rstrip("*") + rest for rest in ("", "b", "b/b")}
        assert [name for name in names if NamePattern(inner).matches(name) and not NamePattern(outer).matches(name)]


@given(_ANY, st.sets(_ANY, max_size=3))
def test_covering_is_an_order(one: NamePattern, others: set[NamePattern]) -> None:
    """A set covers its own patterns, and `**` covers every pattern."""
    assert all(NameSet(frozenset(others)).covers(pattern) for pattern in others)
    assert ALL_NAMES.covers(one)


@pytest.mark.parametrize(
    ("outer", "inner", "expected"),
    [
        ("team/**", "team/app", True),
        ("team/**", "team/app-*", True),
        ("team/**", "team/*", True),
        ("team/**", "team/*/app", True),
        ("team/**", "team", False),
        ("team/**", "team*/app", False),
        ("team/**", "team**", False),
        ("team/*", "team/app-*", True),
        ("team/*", "team/**", False),
        ("team/*", "team/a/*", False),
        ("team/app-*", "team/app-1", True),
        ("team/app-*", "team/*", False),
        ("team/a", "team/a", True),
        ("team/a", "team/b", False),
        ("*/app", "team/app", True),
        ("*/app", "*/app", True),
        ("*/app", "*/app*", False),
        ("**/app", "*/app", False),
    ],
)
def test_covering(outer: str, inner: str, expected: bool) -> None:
    """In the last case, the set has every name of the pattern, but does not cover it: among different patterns, only a
    simple one covers another."""
    assert NameSet.of([outer]).covers(NamePattern(inner)) is expected


@pytest.mark.parametrize(
    ("outer", "inner", "expected"),
    [
        ("**", "docker.io/**", False),
        ("docker.io/**", "docker.io/library/*", True),
        ("docker.io/library/**", "docker.io/**", False),
        ("**", "team/**", True),
        ("**", "**", True),
        ("d*/**", "docker.io/app", False),
        ("docker.io/**", "docker.io/app", True),
        ("**", "docker.i*/app", True),
    ],
)
def test_covering_below_guarded_segments(outer: str, inner: str, expected: bool) -> None:
    """Below a guarded segment, only a pattern that begins with this segment matches names."""
    assert NameSet.of([outer], ["docker.io"]).covers(NamePattern(inner)) is expected


def test_limits_cover_too() -> None:
    """A set with limits covers what its patterns and its limits cover."""
    names = NameSet.of(["team/**"], limits=["team/a/**", "other/**"])
    assert names.covers(NamePattern("team/a/*"))
    assert names.covers(NamePattern("team/a/b"))
    assert not names.covers(NamePattern("team/**"))
    assert not names.covers(NamePattern("other/*"))


def test_covering_is_quick() -> None:
    """Whatever patterns a set has, `covers` needs one lookup for each character of the pattern."""
    names = NameSet.of([*(f"*{'a*' * 50}{number}" for number in range(200)), *(f"team{n}/**" for n in range(5000))])
    for question in (f"team/*{'b*' * 50}0", "a" * 250 + "0*"):
        pattern = NamePattern(question)
        with count_instructions() as count:
            assert not names.covers(pattern)
        assert count.total < 50 * len(question)
    assert names.covers(NamePattern("team4999/app-*"))


def _kept_by(make: Callable[[int], NameSet]) -> float:
    """Returns how many megabytes 100 sets of names use after each was asked for names with every letter."""
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
    """Equal sets share one matcher, because a thousand tokens may have many patterns each, which are mostly the
    same."""
    assert _kept_by(lambda _: NameSet(_large("a"), limits=_large("b"))) < 12


@pytest.mark.slow
def test_what_matches_large_sets_is_bounded() -> None:
    """A process keeps a limited number of large matchers, however many different sets there are."""
    patterns = [_large(str(number)) for number in range(100)]
    assert _kept_by(lambda number: NameSet(patterns[number])) < 15
