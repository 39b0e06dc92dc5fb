"""Sets of repository names, written as patterns: whose are they, who may pull which.

`*` stands for anything inside a segment, `**` for anything at all: `team/**` is all below `team`, `*` all names without
a slash, `**` everything.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice, pairwise
from typing import Self

_PATTERN = re.compile(r"[a-z0-9._*-]+(/[a-z0-9._*-]+)*")
_LONGEST = 255
_FIRST, _LAST = "\0", "\U0010ffff"
"""Before and after all that stands in a name."""
_INSIDE, _OUTSIDE = "inside ", "outside "


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    """Takes time that grows with the square of a name's length at the most, whoever wrote the pattern: what a star
    before a text stands for is settled at that text's first place, and not gone back to (an atomic group). That loses
    nothing, since from an earlier place all can be reached that can be from a later one: a slash between the two would
    have kept the star from reaching the later one."""
    *before, last = pattern.split("**")
    found = ""
    for number, part in enumerate(before):
        first, *others = map(re.escape, part.split("*"))
        text = first + "".join(f"(?>[^/]*?{other})" for other in others)
        found += f"(?>.*?{text})" if number else text
    first, *others = map(re.escape, last.split("*"))
    end = f"[^/]*{others.pop()}" if others else ""
    text = first + "".join(f"(?>[^/]*?{other})" for other in others) + end
    return re.compile(f"{found}.*{text}" if before else text)


def _head(pattern: str, slashes: int) -> str:
    """A pattern of what names that match may begin with, up to the last of so many slashes; empty: none has as many."""
    first, several, _ = pattern.partition("**")
    if several and first.count("/") < slashes:
        return first + several
    segments = pattern.split("/")
    return "/".join((*segments[:slashes], "")) if slashes < len(segments) else ""


class NamePattern(str):
    """A pattern of repository names. Raises ValueError, whose text is for a person."""

    __slots__ = ()

    def __new__(cls, text: str) -> Self:
        if not _PATTERN.fullmatch(text) or "***" in text or len(text) > _LONGEST:
            hint = f"; for all below it write {text}**" if text.endswith("/") else ""
            raise ValueError(f"{text!r} is not a pattern of names like team/** or *{hint}")
        return super().__new__(cls, text)

    def matches(self, name: str) -> bool:
        return _compiled(self).fullmatch(name) is not None

    @property
    def prefix(self) -> str:
        """What every name that matches begins with."""
        return self.partition("*")[0]

    @property
    def whole(self) -> bool:
        """Every name that begins with `prefix` matches."""
        return self[len(self.prefix) :] == "**"


@dataclass(frozen=True, slots=True)
class NameRange:
    """Names from `start` up to, not including, `stop`. `whole`: all of them are in the set; otherwise some may be."""

    start: str
    stop: str
    whole: bool


@dataclass(frozen=True)
class Names:
    """A set of repository names: those that a pattern matches.

    `guarded` are first segments (an upstream's name) that want a pattern of their own: below one of them only a pattern
    counts that itself begins with that segment and a slash, so `**` does not reach in there, and `ghcr.io/**` does.
    """

    patterns: frozenset[NamePattern]
    guarded: frozenset[str] = frozenset()

    @classmethod
    def of(cls, patterns: Iterable[str], guarded: Iterable[str] = ()) -> Names:
        """Raises ValueError."""
        return cls(frozenset(map(NamePattern, patterns)), frozenset(guarded))

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        first = name.partition("/")[0]
        return any(
            pattern.matches(name) for pattern in self.patterns if first not in self.guarded or _reaches(pattern, first)
        )

    def without(self, firsts: Iterable[str]) -> Names:
        """The same set without the names below these first segments."""
        out = frozenset(firsts)
        kept = (pattern for pattern in self.patterns if not any(_reaches(pattern, first) for first in out))
        return Names(frozenset(kept), self.guarded | out)

    @cached_property
    def everything(self) -> bool:
        """No name is outside."""
        return not self.guarded and "**" in self.patterns

    @cached_property
    def ranges(self) -> tuple[NameRange, ...]:
        """Where names of the set may lie, in byte order; they neither overlap nor touch, unless `whole` differs."""
        marks: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for first in self.guarded:
            _mark(marks, "guarded", first, first + _FIRST)
            _mark(marks, "guarded", f"{first}/", _after(f"{first}/"))
        for pattern in self.patterns:
            first, slash, _ = pattern.partition("/")
            reach = _INSIDE if slash and first in self.guarded else _OUTSIDE
            exact = pattern == pattern.prefix
            stop = pattern + _FIRST if exact else _after(pattern.prefix)
            _mark(marks, reach + ("whole" if exact or pattern.whole else "some"), pattern.prefix, stop)
        found: list[NameRange] = []
        covering: Counter[str] = Counter()
        for place, following in pairwise(sorted(marks)):
            covering.update(marks[place])
            reach = _INSIDE if covering["guarded"] else _OUTSIDE
            whole = covering[reach + "whole"] > 0
            if whole or covering[reach + "some"]:
                start = found.pop().start if found and (found[-1].stop, found[-1].whole) == (place, whole) else place
                found.append(NameRange(start, following, whole))
        return tuple(found)

    def ranges_from(self, first: str) -> Iterator[NameRange]:
        """Those that hold a name from `first` on; the one in which it lies begins there."""
        for found in islice(self.ranges, bisect_right(self.ranges, first, key=_stop), None):
            yield found if found.start >= first else NameRange(first, found.stop, found.whole)

    def beyond(self, name: str) -> str:
        """Of a name that is not in the set: no later one is that comes before this text."""
        first = name.partition("/")[0]
        patterns = [p for p in self.patterns if first not in self.guarded or _reaches(p, first)]
        for slashes, slash in enumerate(re.finditer("/", name), 1):
            head = name[: slash.end()]
            if not any(_compiled(_head(pattern, slashes)).fullmatch(head) for pattern in patterns):
                return _after(head)
        return name + _FIRST


def _stop(found: NameRange) -> str:
    return found.stop


def _mark(marks: defaultdict[str, Counter[str]], what: str, start: str, stop: str) -> None:
    marks[start][what] += 1
    marks[stop][what] -= 1


def _after(prefix: str) -> str:
    """What follows every name that begins with `prefix`."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else _LAST


def _reaches(pattern: str, first: str) -> bool:
    return pattern.startswith(f"{first}/")


ALL_NAMES = Names(frozenset({NamePattern("**")}))
NO_NAMES = Names(frozenset())
