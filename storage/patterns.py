"""Patterns of repository names (`NamePattern`), and sets of names that patterns define (`NameSet`).

In a pattern, `*` matches any text without a slash and `**` matches any text. `team/**` matches every name below `team`,
`*` matches every name without a slash, and `**` matches every name.

A *simple* pattern is an exact name, or a prefix followed by `*` or `**`. New grants and new limits of API tokens accept
only simple patterns. Older stores and settings may contain patterns with a star elsewhere; these still work.

The *first segment* of a name is the text before its first slash. For a mirrored repository it is the name of the
upstream registry, such as `ghcr.io`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Final, Self

from storage.pattern_matcher import MIN_SHARED_CHARACTERS, Matcher, SharedMatcher

_PATTERN = re.compile(r"[a-z0-9._*-]+(/[a-z0-9._*-]+)*")
_SIMPLE = re.compile(r"[^*]*\*{0,2}")
_MAX_LENGTH = 255
"""Longest pattern, in characters."""
_MAX_SEEK_ROUNDS: Final = 4
"""Largest number of rounds in one call of `NameSet.seek`. A round searches the patterns and then the limits."""

_EMPTY_SET_BYTES: Final = 2048
"""Approximate memory of a `NameSet` without patterns, in bytes."""
_PATTERN_AND_MATCHER_BYTES: Final = 1200
"""Approximate memory of a pattern and of the matcher's entries for the pattern, without the characters, in bytes."""
_CHARACTER_BYTES: Final = 8
"""Approximate memory per character of a pattern, in the pattern and the matcher together, in bytes."""
_PATTERN_BYTES: Final = 64
"""Approximate memory of a pattern alone, without the characters and without a matcher, in bytes."""


class NamePattern(str):
    """A pattern of repository names. The constructor raises ValueError, with a text for the user, if the text is not a
    valid pattern."""

    __slots__ = ()

    def __new__(cls, text: str) -> Self:
        if not _PATTERN.fullmatch(text) or "***" in text or len(text) > _MAX_LENGTH:
            hint = f"; for all names below it write {text}**" if text.endswith("/") else ""
            raise ValueError(f"{text!r} is not a pattern of names, such as team/** or *{hint}")
        return super().__new__(cls, text)

    def matches(self, name: str) -> bool:
        """Returns whether `name` matches the pattern."""
        return _matcher(self).matches(name)

    @property
    def prefix(self) -> str:
        """The text before the first star, or the whole pattern if it has no star. Every matching name begins with this
        text."""
        return self.partition("*")[0]

    @property
    def is_prefix_match(self) -> bool:
        """Whether the pattern is a prefix followed by `**`, so that every name that begins with `prefix` matches."""
        return self[len(self.prefix) :] == "**"

    @property
    def is_simple(self) -> bool:
        """Whether the pattern is an exact name, or a prefix followed by `*` or `**`."""
        return _SIMPLE.fullmatch(self) is not None


def require_simple(pattern: NamePattern) -> NamePattern:
    """Returns `pattern` if it is simple. Otherwise raises ValueError, with a text for the user."""
    if not pattern.is_simple:
        raise ValueError(
            f"{str(pattern)!r} has a star before its end; write an exact name like team/app, or a prefix that ends "
            "with * or **: team/app-*, team/*, team/** or **"
        )
    return pattern


@lru_cache(maxsize=1024)
def _matcher(pattern: str) -> Matcher:
    """Returns the matcher of a single pattern."""
    return Matcher((pattern,))


@dataclass(frozen=True)
class NameSet:
    """A set of repository names. A name is in the set if it matches one of `patterns`. If `limits` is not None, the
    name must also match one of `limits`.

    `guarded` contains first segments, for example of upstreams whose content may be private. To names below
    a guarded segment, a pattern of `patterns` applies only if it begins with the segment and a slash. If `ghcr.io` is
    guarded, the pattern `ghcr.io/**` puts `ghcr.io/app` into the set, but the pattern `**` does not. `limits` apply to
    all names.
    """

    patterns: frozenset[NamePattern]
    guarded: frozenset[str] = frozenset()
    limits: frozenset[NamePattern] | None = None

    @classmethod
    def of(cls, patterns: Iterable[str], guarded: Iterable[str] = (), limits: Iterable[str] | None = None) -> NameSet:
        """Returns the set that these texts define. Raises ValueError if one of `patterns` or `limits` is not a valid
        pattern."""
        valid_limits = None if limits is None else frozenset(map(NamePattern, limits))
        return cls(frozenset(map(NamePattern, patterns)), frozenset(guarded), valid_limits)

    def limited_to(self, limits: Iterable[NamePattern]) -> NameSet:
        """Returns the set of the names in this set that match one of `limits`. This set must have no limits yet."""
        assert self.limits is None
        return NameSet(self.patterns, self.guarded, frozenset(limits))

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str) or not self._matcher_for(name).matches(name):
            return False
        return self._limit_matcher is None or self._limit_matcher.matches(name)

    def covers(self, pattern: NamePattern) -> bool:
        """Compares this set with a second set, which has only the pattern `pattern`, the same guarded segments and no
        limits. Returns True only if this set contains every name of the second set. Takes one lookup per character of
        `pattern`.

        A result of False for a pattern with a star proves nothing: the method considers only `pattern` itself and
        simple patterns, one at a time.
        """
        if "*" not in pattern:
            return pattern in self
        segment, slash, _ = pattern.partition("/")
        min_prefix_length = len(segment) + 1 if slash and segment in self.guarded else 0
        covered = _has_cover(self.patterns, pattern, min_prefix_length)
        return covered and (self.limits is None or _has_cover(self.limits, pattern))

    def without_names_below(self, first_segments: Iterable[str]) -> NameSet:
        """Returns the set of the names in this set that are not below one of these first segments."""
        removed_segments = frozenset(first_segments)
        # The new set lacks the patterns that begin with a removed segment and a slash. The other patterns do not match
        # below the segment, because the new set guards it.
        kept_patterns = (
            pattern
            for pattern in self.patterns
            if pattern.partition("/")[0] not in removed_segments or "/" not in pattern
        )
        return NameSet(frozenset(kept_patterns), self.guarded | removed_segments, self.limits)

    @cached_property
    def has_every_name(self) -> bool:
        """Whether the set certainly contains every name: no segment is guarded, and `patterns` contain `**`, and so do
        `limits` unless they are None."""
        return not self.guarded and "**" in self.patterns and (self.limits is None or "**" in self.limits)

    @cached_property
    def memory_bytes(self) -> int:
        """Approximate memory of the set, in bytes. If `patterns` have at least `MIN_SHARED_CHARACTERS` characters in
        total, their matcher is not counted, because it is in a cache of the process (`SharedMatcher`). The same applies
        to `limits`."""
        size = _EMPTY_SET_BYTES + _PATTERN_AND_MATCHER_BYTES * len(self.guarded)
        for patterns in (self.patterns, self.limits or ()):
            characters = sum(map(len, patterns))
            if characters < MIN_SHARED_CHARACTERS:
                size += _PATTERN_AND_MATCHER_BYTES * len(patterns) + _CHARACTER_BYTES * characters
            else:
                size += _PATTERN_BYTES * len(patterns) + characters
        return size

    def prepare(self) -> None:
        """Builds the matcher of the patterns before the first lookup, which would otherwise build it. Building takes
        milliseconds for many patterns."""
        self._general_matcher.prepare()

    @property
    def match_cost(self) -> int:
        """Upper bound for the cost of matching one character of a name; the unit is the cost of one lookup. The bound
        is 1 without limits and 2 with limits. If many patterns are not simple, the bound is larger."""
        return self._general_matcher.match_cost + (0 if self._limit_matcher is None else self._limit_matcher.match_cost)

    def seek(self, text: str) -> str | None:
        """Lets a scan of names in byte order skip names outside the set. `text`: the text that the scan has reached.
        Returns the text at which the scan can continue without missing a name of the set. This text can be `text`
        itself, and need not be a name of the set. Returns None if the rest of the scan has no name of the set.
        """
        for _ in range(_MAX_SEEK_ROUNDS):
            candidate = self._seek_patterns(text)
            if candidate is None or self._limit_matcher is None:
                return candidate
            limit_candidate = self._limit_matcher.seek(candidate)
            if limit_candidate is None or limit_candidate == candidate:
                return limit_candidate
            text = limit_candidate
        return text

    def _seek_patterns(self, text: str) -> str | None:
        """Does what `seek` does, but ignores the limits. In byte order, the names below a guarded segment form one
        range. Only the patterns below the segment apply in this range. Outside these ranges, all patterns apply."""
        while True:
            segment, slash, _ = text.partition("/")
            is_guarded = bool(slash) and segment in self.guarded
            candidate = (self._matcher_below(segment) if is_guarded else self._general_matcher).seek(text)
            if is_guarded:
                if candidate is not None and candidate.startswith(f"{segment}/"):
                    return candidate
                text = segment + "0"  # sorts after all names below the segment: "0" is the character after "/"
                continue
            if candidate is None:
                return None
            segment, slash, _ = candidate.partition("/")
            if not slash or segment not in self.guarded:
                return candidate
            text = candidate

    def _matcher_for(self, name: str) -> Matcher:
        """Returns the matcher of the patterns that apply to `name`."""
        if self.guarded:
            segment = name.partition("/")[0]
            if segment in self.guarded:
                return self._matcher_below(segment)
        return self._general_matcher

    @property
    def _general_matcher(self) -> Matcher:
        """The matcher of all patterns, for names that are not below a guarded segment."""
        return self._shared_matcher.matcher

    @property
    def _limit_matcher(self) -> Matcher | None:
        return None if self._shared_limit_matcher is None else self._shared_limit_matcher.matcher

    @cached_property
    def _shared_matcher(self) -> SharedMatcher:
        return SharedMatcher(self.patterns)

    @cached_property
    def _shared_limit_matcher(self) -> SharedMatcher | None:
        return None if self.limits is None else SharedMatcher(self.limits)

    @cached_property
    def _guarded_matchers(self) -> dict[str, SharedMatcher]:
        """The matchers that `_matcher_below` has built so far, by segment."""
        return {}

    def _matcher_below(self, segment: str) -> Matcher:
        """Returns the matcher of the patterns that apply below the guarded first segment `segment`."""
        shared = self._guarded_matchers.get(segment)
        if shared is None:
            shared = SharedMatcher(frozenset(pattern for pattern in self.patterns if pattern.startswith(f"{segment}/")))
            self._guarded_matchers[segment] = shared
        return shared.matcher


def _has_cover(patterns: Collection[NamePattern], pattern: NamePattern, min_prefix_length: int = 0) -> bool:
    """Returns whether `patterns` contains `pattern` itself, or a simple pattern that matches all names that `pattern`
    matches. Does not consider simple patterns whose prefix is shorter than `min_prefix_length` characters. `pattern`
    must contain a star."""
    if pattern in patterns:
        return True
    end = len(pattern.prefix) + 1
    if any(pattern[:length] + "**" in patterns for length in range(min_prefix_length, end)):
        return True
    # A single star matches only within the last segment.
    min_prefix_length = max(min_prefix_length, pattern.rfind("/") + 1)
    return "**" not in pattern and any(pattern[:length] + "*" in patterns for length in range(min_prefix_length, end))


ALL_NAMES = NameSet(frozenset({NamePattern("**")}))
"""The set of all names."""
NO_NAMES = NameSet(frozenset())
"""The empty set."""
