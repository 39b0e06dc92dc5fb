"""Whether one pattern of names lies wholly below another: who may grant on `team/**` may grant on `team/*/app`.

Asked of names that can be: what only matches texts that are no repository's name lies below everything.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Container
from functools import lru_cache

from storage.names import NAME_LENGTH
from storage.patterns import NamePattern

MOST_STEPS = 60_000
"""Places that are left by a letter, at the most: some 15 milliseconds. Patterns that people write take a hundredth of
that, only many stars take more."""
MOST_REQUEST_STEPS = 80_000
"""The same for all the questions of a request."""
QUESTION_STEPS = 400
"""Steps that it counts for to begin with a question."""

_ALNUM = "abcdefghijklmnopqrstuvwxyz0123456789"
_SEPARATORS = "._-/"
_NAME_GRAMMAR: dict[int, dict[str, int]] = {
    0: {"a": 1},
    1: {"a": 1, ".": 2, "_": 3, "-": 5, "/": 0},
    2: {"a": 1},
    3: {"a": 1, "_": 4},
    4: {"a": 1},
    5: {"a": 1, "-": 5},
}
"""The grammar of names (`storage.names`) as an automaton; `a` is any letter or digit. A name ends in state 1."""


class TooManySteps(Exception):
    """It would take too long to find out."""


class StepBudget:
    """What may still be spent on a row of questions, in steps. Who asks for a whole request's has one for all of them:
    thousands of slow patterns would add up."""

    __slots__ = ("left",)

    def __init__(self, left: int = MOST_REQUEST_STEPS) -> None:
        self.left = left

    def spend(self, steps: int) -> None:
        """Raises TooManySteps."""
        self.left -= steps
        if self.left < 0:
            raise TooManySteps


class _PatternAutomaton:
    """A pattern, read letter by letter: a state is a place before one of its parts."""

    def __init__(self, pattern: NamePattern) -> None:
        self.parts: list[str] = re.findall(r"\*\*|\*|[^*]", pattern)
        self.end = len(self.parts)

    def rest(self, places: set[int]) -> frozenset[int]:
        """With the places that need no letter to get to: a star may stand for nothing."""
        found = set(places)
        for place in sorted(places):
            while place < self.end and self.parts[place][0] == "*":
                place += 1
                found.add(place)
        return frozenset(found)

    def step(self, places: frozenset[int], letter: str) -> frozenset[int]:
        after = set()
        for place in places:
            part = self.parts[place] if place < self.end else ""
            if part == "**" or (part == "*" and letter != "/"):
                after.add(place)
            elif part == letter:
                after.add(place + 1)
        return self.rest(after)


def covers(
    outer: NamePattern, inner: NamePattern, guarded: Container[str] = (), effort: StepBudget | None = None
) -> bool:
    """Every name that `inner` matches, `outer` matches as well. `guarded`: first segments that want a pattern of their
    own, as in `storage.patterns.NameSet`. Where it would take too long to find out, or `effort` is used up: no."""
    first, slash, _ = inner.partition("/")
    if slash and first in guarded and not outer.startswith(f"{first}/"):
        return False
    if outer == inner or (outer.whole and inner.startswith(outer.prefix)):
        return True
    if "*" not in inner and outer.matches(inner):
        return True
    if effort is None:
        return _covers(outer, inner)[0]
    if effort.left <= QUESTION_STEPS:
        effort.left = 0
        return False
    covered, steps = _covers(outer, inner)
    effort.left -= steps + QUESTION_STEPS
    return covered


@lru_cache(maxsize=1024)
def _covers(outer: NamePattern, inner: NamePattern) -> tuple[bool, int]:
    """And how many steps it took."""
    effort = StepBudget(MOST_STEPS)
    try:
        covered = find_uncovered_name(outer, inner, effort) is None
    except TooManySteps:
        covered = False
    return covered, MOST_STEPS - effort.left


def find_uncovered_name(outer: NamePattern, inner: NamePattern, effort: StepBudget) -> str | None:
    """A shortest name that `inner` matches and `outer` does not; None: there is none. Raises TooManySteps.

    Goes through all that both can make of the same letters, breadth first: one place in `inner` at a time, all the
    places of `outer` (the subset construction).
    """
    within, without = _PatternAutomaton(inner), _PatternAutomaton(outer)
    other = next((letter for letter in _ALNUM if letter not in inner and letter not in outer), "")
    alphabet = sorted({letter for letter in inner + outer if letter in _ALNUM} | {other} - {""}) + list(_SEPARATORS)
    begin = (0, within.rest({0}), without.rest({0}))
    seen, waiting = {begin}, deque([(begin, "")])
    while waiting:
        (grammar, inside, outside), name = waiting.popleft()
        if grammar == 1 and within.end in inside and without.end not in outside:
            return name
        if len(name) == NAME_LENGTH:
            continue
        effort.spend(len(alphabet) * (len(inside) + len(outside)))
        for letter in alphabet:
            next_grammar = _NAME_GRAMMAR[grammar].get(letter if letter in _SEPARATORS else "a")
            if next_grammar is None or not (next_inside := within.step(inside, letter)):
                continue
            state = (next_grammar, next_inside, without.step(outside, letter))
            if state not in seen:
                seen.add(state)
                waiting.append((state, name + letter))
    return None
