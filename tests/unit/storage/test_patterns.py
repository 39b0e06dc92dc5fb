"""Patterns of repository names, such as `team/**`, and sets of names that are made of patterns.

`NameSet.covers` tells whether a set has every name that a pattern matches. It is True only if that is so, but it can be
False although it is so. `NameSet.seek` lets a scan of all names in byte order skip names that are not in a set.
"""

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
def test_what_stars_in_a_pattern_match(pattern: str, matches: list[str], not_matches: list[str]) -> None:
    """`*` matches within a segment, `**` over segments, and all other characters match themselves."""
    name_pattern = NamePattern(pattern)
    assert [name for name in matches if not name_pattern.matches(name)] == []
    assert [name for name in not_matches if name_pattern.matches(name)] == []


def matches_by_definition(pattern: str, name: str) -> bool:
    """Returns whether a pattern matches a name. This is a slow reference implementation: it tries every text for which
    a star may stand."""
    if not pattern:
        return not name
    star = next((star for star in ("**", "*") if pattern.startswith(star)), "")
    if not star:
        return name[:1] == pattern[0] and matches_by_definition(pattern[1:], name[1:])
    ends = range(len(name) + 1) if star == "**" or "/" not in name else range(name.index("/") + 1)
    return any(matches_by_definition(pattern[len(star) :], name[end:]) for end in ends)


@given(
    st.text("ab/*", min_size=1, max_size=10).filter(
        lambda text: "***" not in text and "//" not in text and text == text.strip("/")
    ),
    st.text("ab/", max_size=9),
)
@example("**a*b", "a/ab")
@example("a*b/a*b**b*a", "aab/abb/ba")
def test_patterns_match_by_their_definition(pattern: str, name: str) -> None:
    """Any pattern matches exactly the names that the reference implementation matches."""
    assert NamePattern(pattern).matches(name) is matches_by_definition(pattern, name)


@pytest.mark.parametrize("pattern", ["*a" * 100 + "*b", "**a" * 84 + "b", "*/" * 100 + "**a*a*b", "**a*a*a*a*a*b"])
def test_no_pattern_is_slow(pattern: str) -> None:
    """Users write patterns, so no pattern may be slow. A matcher with backtracking would take years for these
    patterns."""
    flat_name, deep_name = "a" * 255, "a/" * 127 + "a"
    with count_instructions() as count:
        assert not NamePattern(pattern).matches(flat_name)
        assert not NamePattern(pattern).matches(deep_name)
        next_name = NameSet.of([pattern]).seek(deep_name)
    assert next_name is None or next_name >= deep_name
    assert count.total < 60_000


def test_many_patterns_are_not_slow() -> None:
    """A lookup in a set takes few instructions for each character of the name, even if the set has 5000 patterns (the
    largest number of grants of one account), or 128 patterns with many stars."""
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
                is_in_set = name in names
            assert is_in_set is NamePattern(patterns[-1]).matches(name)
            assert count.total < 50 * 255  # each character of the name takes a step of some 22 instructions


@pytest.mark.parametrize("pattern", ["", "/", "team/", "/team", "a//b", "Team/**", "a***", "team/?", "a b", "a\n"])
def test_malformed_patterns_are_refused(pattern: str) -> None:
    """The error for a malformed pattern has an example of a right one."""
    with pytest.raises(ValueError, match=r"is not a pattern of names, such as team/\*\*"):
        NamePattern(pattern)


@pytest.mark.parametrize(
    ("pattern", "prefix", "is_prefix_match"),
    [
        ("team/**", "team/", True),
        ("**", "", True),
        ("team/*", "team/", False),
        ("a/b", "a/b", False),
        ("a/**/c", "a/", False),
    ],
)
def test_the_prefix_of_a_pattern(pattern: str, prefix: str, is_prefix_match: bool) -> None:
    """`prefix` is the text before the first star. `is_prefix_match` states whether the pattern matches every name with
    this prefix."""
    name_pattern = NamePattern(pattern)
    assert (name_pattern.prefix, name_pattern.is_prefix_match) == (prefix, is_prefix_match)


def test_which_names_are_in_a_set() -> None:
    """A name is in a set if one of the set's patterns matches it. If the first segment of the name is guarded, only
    patterns that begin with this segment count."""
    names = NameSet.of(["**", "ghcr.io/team/**"], guarded=["ghcr.io", "quay.io"])
    inside = ["app", "docker.io/library/ubuntu", "ghcr.io/team/app"]
    outside = ["ghcr.io/other/app", "quay.io/team/app", "quay.io"]
    assert [name for name in inside if name not in names] == []
    assert [name for name in outside if name in names] == []
    assert "app" in ALL_NAMES
    assert "app" not in NO_NAMES
    assert ALL_NAMES.has_every_name
    assert not names.has_every_name


# Names and patterns for the test of matching and `seek`. Of the characters in the names, `-` and `.`
# sort before `/`, and all others after it.
_MATCHED_SEGMENTS = ["a", "b", "ab", "a-b", "a.b", "a0"]
_MATCHED_NAMES = st.lists(st.sampled_from(_MATCHED_SEGMENTS), min_size=1, max_size=3).map("/".join)
_MATCHING_PATTERNS = st.lists(
    st.sampled_from([*_MATCHED_SEGMENTS, "*", "**", "a*", "a**", "*b"]), min_size=1, max_size=3
).map("/".join)


@given(
    patterns=st.sets(_MATCHING_PATTERNS, max_size=4),
    guarded=st.sets(st.sampled_from(_MATCHED_SEGMENTS), max_size=2),
    limits=st.none() | st.sets(_MATCHING_PATTERNS, max_size=3),
    names=st.sets(_MATCHED_NAMES, min_size=1, max_size=12),
    first=st.just("") | _MATCHED_NAMES,
)
@example({"a"}, {"a"}, None, {"a"}, "")
@example({"**", "a/b**"}, {"a"}, None, {"a", "a/b", "a/a", "a-b", "a0"}, "a/a")
@example({"a/**"}, {"b"}, {"*/b"}, {"a/a", "a/b", "b/b"}, "")
@pytest.mark.slow
def test_sets_match_by_their_definition(
    patterns: set[str], guarded: set[str], limits: set[str] | None, names: set[str], first: str
) -> None:
    """A set has the names that match one of its patterns and, if it has limits, one of its limits. Below a guarded
    segment, only patterns that begin with this segment count. `seek` skips no name of the set."""
    name_set = NameSet.of(patterns, guarded, limits)

    def inside(name: str) -> bool:
        segment = name.partition("/")[0]
        applicable = [p for p in patterns if segment not in guarded or p.startswith(f"{segment}/")]
        allowed = any(matches_by_definition(pattern, name) for pattern in applicable)
        return allowed and (limits is None or any(matches_by_definition(pattern, name) for pattern in limits))

    assert {name for name in names if name in name_set} == {name for name in names if inside(name)}
    for start in (first, first + "\0", *names):
        next_start = name_set.seek(start)
        assert next_start is None or next_start >= start
        skipped = [name for name in names if name >= start and (next_start is None or name < next_start)]
        assert not [name for name in skipped if inside(name)]


@pytest.mark.parametrize(
    ("patterns", "name", "expected"),
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
def test_seek_skips_names_that_cannot_match(patterns: list[str], name: str, expected: str | None) -> None:
    """`seek` lets a scan that has just read `name` skip ahead to `expected`, because no name of the set sorts between
    the two. None means that no name of the set sorts after `name`."""
    assert NameSet.of(patterns).seek(name + "\0") == expected


def test_seek_skips_guarded_segments() -> None:
    """`seek` skips a guarded segment unless a pattern begins with it."""
    names = NameSet.of(["**", "b/x/**"], ["a", "b"])
    assert names.seek("a/x") == "a0"
    assert names.seek("b/a") == "b/x/"
    assert names.seek("b/y") == "b0"
    assert names.seek("a-") == "a-"


SIMPLE_PATTERNS = ["team/app", "a", "team/app-*", "team/*", "team/**", "te**", "*", "**"]
OTHER_PATTERNS = ["*/app", "**/app", "team/*/app", "a*b", "team/**x", "*/*", "team/*/**", "**a**"]


@pytest.mark.parametrize("pattern", SIMPLE_PATTERNS)
def test_simple_patterns(pattern: str) -> None:
    """A pattern is simple if it is an exact name, or a prefix with `*` or `**` at its end."""
    assert require_simple(NamePattern(pattern)) == pattern


@pytest.mark.parametrize("pattern", OTHER_PATTERNS)
def test_patterns_that_are_not_simple(pattern: str) -> None:
    """`require_simple` refuses a pattern that is not simple, and its error shows the simple forms. Such patterns, which
    older versions accepted, can still match names."""
    with pytest.raises(ValueError, match=r"star before its end; .* team/app-\*, team/\*, team/\*\* or \*\*"):
        require_simple(NamePattern(pattern))
    assert any(NamePattern(pattern).matches(name) for name in ("a/app", "team/x/app", "ab", "team/x", "a/b/c"))


def _all_names() -> list[RepositoryName]:
    """Returns every valid name of up to five characters from `ab/-`."""
    names = []
    for length in range(1, 6):
        for letters in product("ab/-", repeat=length):
            with suppress(NameInvalid):
                names.append(RepositoryName("".join(letters)))
    return names


# Names and patterns for the tests of `covers`. All of them consist of `a`, `b`, `-`, `/` and stars.
_SHORT_NAMES = _all_names()
_SEGMENTS_WITH_STARS = st.sampled_from(["a", "b", "ab", "*", "**", "a*", "*b", "a**", "-", "a-*", "*a*"])
_ANY_PATTERN = (
    st.lists(_SEGMENTS_WITH_STARS, min_size=1, max_size=3)
    .map("/".join)
    .filter(lambda text: "***" not in text)
    .map(NamePattern)
)
_PATTERN_ENDS = st.sampled_from(["", "*", "**"])
_SIMPLE_PATTERN = st.builds(lambda text, end: text + end, st.text("ab/-", max_size=4), _PATTERN_ENDS).filter(
    lambda text: bool(re.fullmatch(r"[ab*-]+(/[ab*-]+)*", text))
)


@given(
    st.sets(_ANY_PATTERN | _SIMPLE_PATTERN, max_size=3),
    _ANY_PATTERN,
    st.sets(st.sampled_from(["a", "b"])),
    st.none() | st.sets(_ANY_PATTERN),
)
@example({"a/**"}, NamePattern("a/*/b"), set(), None)
@example({"**"}, NamePattern("a/*"), {"a"}, None)
@example({"a*"}, NamePattern("a*/b"), set(), None)
@pytest.mark.slow
def test_covering_is_never_wrong(
    patterns: set[str], inner: NamePattern, guarded: set[str], limits: set[str] | None
) -> None:
    """If `covers` reports that a set covers a pattern, the set has every name that the pattern matches."""
    outer = NameSet.of(patterns, guarded, limits)
    if outer.covers(inner):
        matched_names = NameSet.of([inner], guarded)
        assert [name for name in _SHORT_NAMES if name in matched_names and name not in outer] == []


@given(_SIMPLE_PATTERN, _SIMPLE_PATTERN)
@example("a*", "ab*")
@example("a/**", "a/*")
def test_covering_of_simple_patterns_is_complete(outer: str, inner: str) -> None:
    """If the simple pattern `outer` does not cover the simple pattern `inner`, there is a name that only `inner`
    matches."""
    if not NameSet.of([outer]).covers(NamePattern(inner)):
        names = {inner.rstrip("*") + ending for ending in ("", "b", "b/b")}
        assert [name for name in names if NamePattern(inner).matches(name) and not NamePattern(outer).matches(name)]


@given(_ANY_PATTERN, st.sets(_ANY_PATTERN, max_size=3))
@pytest.mark.slow
def test_a_set_covers_its_own_patterns(pattern: NamePattern, others: set[NamePattern]) -> None:
    """A set covers its own patterns, and `**` covers every pattern."""
    assert all(NameSet(frozenset(others)).covers(other) for other in others)
    assert ALL_NAMES.covers(pattern)


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
    """A pattern covers itself, and a simple pattern may cover other patterns. In the last case, the set has every name
    of the pattern, but `covers` does not find this, because `**/app` is not simple."""
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
    """With the guarded segment `docker.io`, a set covers a pattern below this segment only if one of its own patterns
    begins with `docker.io/`."""
    assert NameSet.of([outer], ["docker.io"]).covers(NamePattern(inner)) is expected


def test_covering_with_limits() -> None:
    """A set with limits covers a pattern if both the set's patterns and its limits cover the pattern."""
    names = NameSet.of(["team/**"], limits=["team/a/**", "other/**"])
    assert names.covers(NamePattern("team/a/*"))
    assert names.covers(NamePattern("team/a/b"))
    assert not names.covers(NamePattern("team/**"))
    assert not names.covers(NamePattern("other/*"))


def test_covering_is_quick() -> None:
    """However many patterns a set has, `covers` needs one lookup for each character of the given pattern."""
    names = NameSet.of([*(f"*{'a*' * 50}{number}" for number in range(200)), *(f"team{n}/**" for n in range(5000))])
    for pattern_text in (f"team/*{'b*' * 50}0", "a" * 250 + "0*"):
        pattern = NamePattern(pattern_text)
        with count_instructions() as count:
            assert not names.covers(pattern)
        assert count.total < 50 * len(pattern_text)
    assert names.covers(NamePattern("team4999/app-*"))


def _megabytes_of_sets(make: Callable[[int], NameSet]) -> float:
    """Makes 100 sets of names. In each set, looks up one name for each character that names may contain, because a
    matcher takes memory for a character only after the first lookup with it. Returns the memory in megabytes that the
    sets use."""
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


def _large_patterns(seed: str) -> frozenset[NamePattern]:
    return frozenset(NamePattern(f"team/*{seed}-{number}-{'x' * 230}") for number in range(128))


@pytest.mark.slow
def test_equal_sets_share_one_matcher() -> None:
    """Equal sets share one matcher. This saves memory if a thousand tokens have many patterns each and most of them
    have the same patterns."""
    assert _megabytes_of_sets(lambda _: NameSet(_large_patterns("a"), limits=_large_patterns("b"))) < 12


@pytest.mark.slow
def test_the_number_of_large_matchers_is_limited() -> None:
    """A process keeps a limited number of large matchers in memory, even if there are many different sets."""
    patterns = [_large_patterns(str(number)) for number in range(100)]
    assert _megabytes_of_sets(lambda number: NameSet(patterns[number])) < 15
