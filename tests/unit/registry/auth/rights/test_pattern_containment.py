"""Whether one pattern of names lies below another: `registry.auth.rights.pattern_containment` against the definition,
name by name."""

from __future__ import annotations

import time
from contextlib import suppress
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.auth.rights.pattern_containment import MOST_STEPS, StepBudget, TooManySteps, covers, find_uncovered_name
from storage.errors import NameInvalid
from storage.names import RepositoryName
from storage.patterns import NamePattern


def all_names() -> list[RepositoryName]:
    """Every name of up to six of these letters."""
    names = []
    for length in range(1, 7):
        for letters in product("ab/-", repeat=length):
            with suppress(NameInvalid):
                names.append(RepositoryName("".join(letters)))
    return names


NAMES = all_names()
PARTS = st.sampled_from(["a", "b", "ab", "*", "**", "a*", "*b", "a**", "-", "a-*", "*a*"])
PATTERNS = st.lists(PARTS, min_size=1, max_size=4).map("/".join).filter(lambda text: "***" not in text).map(NamePattern)


@given(PATTERNS, PATTERNS)
def test_as_defined(outer: NamePattern, inner: NamePattern) -> None:
    """Where a pattern covers another, no name of all short ones is matched by the inner alone; where it does not, there
    is a name that says so."""
    if covers(outer, inner):
        assert [name for name in NAMES if inner.matches(name) and not outer.matches(name)] == []
    else:
        witness = find_uncovered_name(outer, inner, StepBudget(MOST_STEPS))
        assert witness is not None
        assert inner.matches(RepositoryName(witness))
        assert not outer.matches(witness)


@given(PATTERNS, PATTERNS, PATTERNS)
def test_an_order(one: NamePattern, two: NamePattern, three: NamePattern) -> None:
    """Every pattern covers itself, `**` covers all, and what lies below something that lies below lies below."""
    assert covers(one, one)
    assert covers(NamePattern("**"), one)
    if covers(one, two) and covers(two, three):
        assert covers(one, three)


@pytest.mark.parametrize(
    ("outer", "inner", "expected"),
    [
        ("team/**", "team/app", True),
        ("team/**", "team/*/app", True),
        ("team/**", "team", False),
        ("team/**", "team*/app", False),
        ("team/*", "team/**", False),
        ("t*/**", "team/**", True),
        ("*", "**", False),
        ("*/**", "**/app", True),
        ("**/app", "*/app", True),
        ("*a*b*", "*ab*", True),
        ("team/a", "team/a", True),
        ("team/a", "team/b", False),
        ("b", "a-", True),
    ],
)
def test_examples(outer: str, inner: str, expected: bool) -> None:
    """The last: no name ends with `-`, so nothing is outside."""
    assert covers(NamePattern(outer), NamePattern(inner)) is expected


@pytest.mark.parametrize(
    ("outer", "inner", "expected"),
    [
        ("**", "docker.io/**", False),
        ("docker.io/**", "docker.io/library/*", True),
        ("docker.io/library/**", "docker.io/**", False),
        ("**", "team/**", True),
        ("**", "**", True),
        ("d*/**", "docker.io/app", False),
        ("**", "docker.i*/app", True),
    ],
)
def test_guarded(outer: str, inner: str, expected: bool) -> None:
    """Below a guarded first segment only a pattern counts that begins with it, as in sets of names; one that does not
    begin with it reaches nothing there, so it is no more than any other."""
    assert covers(NamePattern(outer), NamePattern(inner), frozenset({"docker.io"})) is expected


def test_too_many_stars() -> None:
    """Patterns made to be slow are given up on, and count as not covered."""
    outer, inner = NamePattern("**/*a" * 40), NamePattern("**/*b" * 40)
    with pytest.raises(TooManySteps):
        find_uncovered_name(outer, inner, StepBudget(MOST_STEPS))
    assert not covers(outer, inner)


def test_many_slow_patterns() -> None:
    """One effort for all the questions of a request bounds what they take together; what is easily seen stays seen."""
    effort = StepBudget()
    slow = [NamePattern(f"*{'a*' * 50}{number}") for number in range(200)]
    begun = time.process_time()
    assert not any(covers(NamePattern("team/*b"), pattern, (), effort) for pattern in slow)
    assert time.process_time() - begun < 2.0
    assert covers(NamePattern("team/**"), NamePattern("team/*/app"), (), effort)
    assert not covers(NamePattern("t*/**"), NamePattern("team/**"), (), effort)
