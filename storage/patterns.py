"""Patterns of repository names, and sets of names made of them.

`*` matches any text without a slash, `**` matches any text: `team/**` matches every name below `team`, `*` every name
without a slash, `**` every name.

New grants and new token limits use simple patterns only: an exact name, or a prefix with one star form at its end.
Older stores and settings may hold patterns with stars elsewhere; those go on matching.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Final, Self

from storage.pattern_matcher import Matcher, SharedMatcher

_PATTERN = re.compile(r"[a-z0-9._*-]+(/[a-z0-9._*-]+)*")
_SIMPLE = re.compile(r"[^*]*\*{0,2}")
_LONGEST = 255
_MOST_TURNS: Final = 4
"""How often `NameSet.first_from` asks its two matchers in turn before it returns what it knows so far."""


class NamePattern(str):
    """A pattern of repository names. Raises ValueError with a text for the user."""

    __slots__ = ()

    def __new__(cls, text: str) -> Self:
        if not _PATTERN.fullmatch(text) or "***" in text or len(text) > _LONGEST:
            hint = f"; for all below it write {text}**" if text.endswith("/") else ""
            raise ValueError(f"{text!r} is not a pattern of names like team/** or *{hint}")
        return super().__new__(cls, text)

    def matches(self, name: str) -> bool:
        return _matcher(self).matches(name)

    @property
    def prefix(self) -> str:
        """The text before the first star. Every matching name begins with it."""
        return self.partition("*")[0]

    @property
    def whole(self) -> bool:
        """True if every name that begins with `prefix` matches."""
        return self[len(self.prefix) :] == "**"

    @property
    def is_simple(self) -> bool:
        """True for an exact name, and for a prefix with `*` or `**` at its end."""
        return _SIMPLE.fullmatch(self) is not None


def require_simple(pattern: NamePattern) -> NamePattern:
    """Returns `pattern`. Raises ValueError, with a text for the user, if it is not simple."""
    if not pattern.is_simple:
        raise ValueError(
            f"{str(pattern)!r} has a star before its end; write an exact name like team/app, or a prefix that ends "
            "with * or **: team/app-*, team/*, team/** or **"
        )
    return pattern


@lru_cache(maxsize=1024)
def _matcher(pattern: str) -> Matcher:
    return Matcher((pattern,))


@dataclass(frozen=True)
class NameSet:
    """A set of repository names: those that match one of `patterns` and, unless `limits` is None, one of `limits`.

    `guarded` holds first segments (upstream names) that need a pattern of their own. Below such a segment only patterns
    count that begin with the segment and a slash: `**` does not match there, and `ghcr.io/**` does. `limits` are exempt
    from this rule, since they only take names away.
    """

    patterns: frozenset[NamePattern]
    guarded: frozenset[str] = frozenset()
    limits: frozenset[NamePattern] | None = None

    @classmethod
    def of(cls, patterns: Iterable[str], guarded: Iterable[str] = (), limits: Iterable[str] | None = None) -> NameSet:
        """Returns the set of these patterns. Raises ValueError if one of them is not valid."""
        limiting = None if limits is None else frozenset(map(NamePattern, limits))
        return cls(frozenset(map(NamePattern, patterns)), frozenset(guarded), limiting)

    def limited(self, limits: Iterable[NamePattern]) -> NameSet:
        """Returns the names of this set that match one of `limits`. The set must have no limits yet."""
        assert self.limits is None
        return NameSet(self.patterns, self.guarded, frozenset(limits))

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str) or not self._matcher_for(name).matches(name):
            return False
        return self._limits is None or self._limits.matches(name)

    def covers(self, pattern: NamePattern) -> bool:
        """Returns whether every name that `pattern` matches is in the set. Takes one look-up for each of its
        characters.

        The answer is no where only several patterns together, or one that is not simple, would cover `pattern`.
        """
        if "*" not in pattern:
            return pattern in self
        first, slash, _ = pattern.partition("/")
        shortest = len(first) + 1 if slash and first in self.guarded else 0
        covered = _has_cover(self.patterns, pattern, shortest)
        return covered and (self.limits is None or _has_cover(self.limits, pattern))

    def without(self, firsts: Iterable[str]) -> NameSet:
        """Returns the same set without the names below these first segments."""
        out = frozenset(firsts)
        kept = (pattern for pattern in self.patterns if pattern.partition("/")[0] not in out or "/" not in pattern)
        return NameSet(frozenset(kept), self.guarded | out, self.limits)

    @cached_property
    def everything(self) -> bool:
        """True if the set is known to hold every name."""
        return not self.guarded and "**" in self.patterns and (self.limits is None or "**" in self.limits)

    def prepare(self) -> None:
        """Builds what the first look-up needs. For many patterns this takes milliseconds."""
        self._everywhere.prepare()

    @property
    def weight(self) -> int:
        """The highest cost of matching one character of a name: 1 unless many patterns are not simple."""
        return self._everywhere.weight + (0 if self._limits is None else self._limits.weight)

    def first_from(self, text: str) -> str | None:
        """Returns a text at or after `text` such that no name of the set lies between the two, or None if no name of
        the set follows `text`.

        The returned text may lie before the first name of the set, and need not begin any name.
        """
        for _ in range(_MOST_TURNS):
            found = self._first_matching(text)
            if found is None or self._limits is None:
                return found
            limited = self._limits.first_from(found)
            if limited is None or limited == found:
                return limited
            text = limited
        return text

    def _first_matching(self, text: str) -> str | None:
        """Does what `first_from` does, without the limits. Other patterns count below a guarded segment than elsewhere,
        and the names below one segment follow each other, so this goes through one such stretch after the other."""
        while True:
            first, slash, _ = text.partition("/")
            inside = bool(slash) and first in self.guarded
            found = (self._below(first) if inside else self._everywhere).first_from(text)
            if inside:
                if found is not None and found.startswith(f"{first}/"):
                    return found
                text = first + "0"  # "0" follows "/"
                continue
            if found is None:
                return None
            first, slash, _ = found.partition("/")
            if not slash or first not in self.guarded:
                return found
            text = found

    def _matcher_for(self, name: str) -> Matcher:
        """Returns the matcher of the patterns that count for `name`."""
        if self.guarded:
            first = name.partition("/")[0]
            if first in self.guarded:
                return self._below(first)
        return self._everywhere

    @property
    def _everywhere(self) -> Matcher:
        return self._matcher.matcher

    @property
    def _limits(self) -> Matcher | None:
        return None if self._limit_matcher is None else self._limit_matcher.matcher

    @cached_property
    def _matcher(self) -> SharedMatcher:
        return SharedMatcher(self.patterns)

    @cached_property
    def _limit_matcher(self) -> SharedMatcher | None:
        return None if self.limits is None else SharedMatcher(self.limits)

    @cached_property
    def _guarded_matchers(self) -> dict[str, SharedMatcher]:
        return {}

    def _below(self, first: str) -> Matcher:
        """Returns the matcher of the patterns that count below a guarded segment."""
        found = self._guarded_matchers.get(first)
        if found is None:
            found = SharedMatcher(frozenset(pattern for pattern in self.patterns if pattern.startswith(f"{first}/")))
            self._guarded_matchers[first] = found
        return found.matcher


def _has_cover(patterns: Collection[NamePattern], pattern: NamePattern, shortest: int = 0) -> bool:
    """Returns whether `patterns` holds `pattern`, or a prefix of it with a star form that spans the rest. The prefix
    has at least `shortest` characters. `pattern` has a star."""
    if pattern in patterns:
        return True
    end = len(pattern.prefix) + 1
    if any(pattern[:length] + "**" in patterns for length in range(shortest, end)):
        return True
    shortest = max(shortest, pattern.rfind("/") + 1)  # one star spans the last segment alone
    return "**" not in pattern and any(pattern[:length] + "*" in patterns for length in range(shortest, end))


ALL_NAMES = NameSet(frozenset({NamePattern("**")}))
NO_NAMES = NameSet(frozenset())
