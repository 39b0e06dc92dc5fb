"""Sets of repository names, written as patterns: whose are they, who may pull which.

`*` stands for anything inside a segment, `**` for anything at all: `team/**` is all below `team`, `*` all names without
a slash, `**` everything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Final, Self

from storage.pattern_matcher import Matcher, SharedMatcher

_PATTERN = re.compile(r"[a-z0-9._*-]+(/[a-z0-9._*-]+)*")
_LONGEST = 255
_TRIES: Final = 4
"""How often `NameSet.first_from` asks each of its sets in turn, before it is content with what it knows."""


class NamePattern(str):
    """A pattern of repository names. Raises ValueError, whose text is for a person."""

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
        """What every name that matches begins with."""
        return self.partition("*")[0]

    @property
    def whole(self) -> bool:
        """Every name that begins with `prefix` matches."""
        return self[len(self.prefix) :] == "**"


@lru_cache(maxsize=1024)
def _matcher(pattern: str) -> Matcher:
    return Matcher((pattern,))


@dataclass(frozen=True)
class NameSet:
    """A set of repository names: those that one of `patterns` matches, and one of `limits` as well (None: there are no
    limits).

    `guarded` are first segments (an upstream's name) that want a pattern of their own: below one of them only a pattern
    counts that itself begins with that segment and a slash, so `**` does not reach in there, and `ghcr.io/**` does.
    Limits only take away, so they reach everywhere.
    """

    patterns: frozenset[NamePattern]
    guarded: frozenset[str] = frozenset()
    limits: frozenset[NamePattern] | None = None

    @classmethod
    def of(cls, patterns: Iterable[str], guarded: Iterable[str] = (), limits: Iterable[str] | None = None) -> NameSet:
        """Raises ValueError."""
        limiting = None if limits is None else frozenset(map(NamePattern, limits))
        return cls(frozenset(map(NamePattern, patterns)), frozenset(guarded), limiting)

    def limited(self, limits: Iterable[NamePattern]) -> NameSet:
        """Those that one of `limits` matches. Of a set without limits."""
        assert self.limits is None
        return NameSet(self.patterns, self.guarded, frozenset(limits))

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str) or not self._reaching(name).matches(name):
            return False
        return self._limits is None or self._limits.matches(name)

    def without(self, firsts: Iterable[str]) -> NameSet:
        """The same set without the names below these first segments."""
        out = frozenset(firsts)
        kept = (pattern for pattern in self.patterns if pattern.partition("/")[0] not in out or "/" not in pattern)
        return NameSet(frozenset(kept), self.guarded | out, self.limits)

    @cached_property
    def everything(self) -> bool:
        """No name is outside."""
        return not self.guarded and "**" in self.patterns and (self.limits is None or "**" in self.limits)

    def prepare(self) -> None:
        """Makes what the first look at a name needs: for many patterns, that takes milliseconds."""
        self._everywhere.prepare()

    @property
    def weight(self) -> int:
        """What it costs to look at one letter of a name, at the most: 1 where there are few patterns with stars inside,
        more where there are many."""
        return self._everywhere.weight + (0 if self._limits is None else self._limits.weight)

    def first_from(self, text: str) -> str | None:
        """A text from `text` on: no name between the two is in the set. None: no name from `text` on is. It may lie
        before the first name of the set, and no name need begin with it."""
        for _ in range(_TRIES):
            found = self._first_reached(text)
            if found is None or self._limits is None:
                return found
            limited = self._limits.first_from(found)
            if limited is None or limited == found:
                return limited
            text = limited
        return text

    def _first_reached(self, text: str) -> str | None:
        """As `first_from`, without the limits. Below a guarded segment the patterns differ, and names below one follow
        each other; so this looks at one such stretch after the other."""
        while True:
            first, slash, _ = text.partition("/")
            inside = bool(slash) and first in self.guarded
            found = (self._below(first) if inside else self._everywhere).first_from(text)
            if inside:
                if found is not None and found.startswith(f"{first}/"):
                    return found
                text = first + "0"  # which follows the slash
                continue
            if found is None:
                return None
            first, slash, _ = found.partition("/")
            if not slash or first not in self.guarded:
                return found
            text = found

    def _reaching(self, name: str) -> Matcher:
        """The patterns that count for a name."""
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
        return None if self._limiting is None else self._limiting.matcher

    @cached_property
    def _matcher(self) -> SharedMatcher:
        return SharedMatcher(self.patterns)

    @cached_property
    def _limiting(self) -> SharedMatcher | None:
        return None if self.limits is None else SharedMatcher(self.limits)

    @cached_property
    def _of_guarded(self) -> dict[str, SharedMatcher]:
        return {}

    def _below(self, first: str) -> Matcher:
        """The patterns that reach below a guarded segment."""
        found = self._of_guarded.get(first)
        if found is None:
            found = SharedMatcher(frozenset(pattern for pattern in self.patterns if pattern.startswith(f"{first}/")))
            self._of_guarded[first] = found
        return found.matcher


ALL_NAMES = NameSet(frozenset({NamePattern("**")}))
NO_NAMES = NameSet(frozenset())
