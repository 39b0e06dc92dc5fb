"""Matches names against many patterns at once.

Users write patterns (grants, limits of API tokens), so no pattern may be slow. An exact name, and a prefix with `*` or
`**` at its end, take one look-up. Patterns with stars elsewhere, as older stores hold them, are read together,
character by character: each position in one of them has a bit, and one operation moves all bits (the Shift-And
algorithm: Baeza-Yates and Gonnet 1992). A match takes the characters of the name times the characters of those patterns
divided by 30, in steps of about a nanosecond, whatever the patterns are.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property, lru_cache
from typing import Final

_LETTERS: Final = "-./0123456789_abcdefghijklmnopqrstuvwxyz"
"""The characters of names, in byte order."""
_PARTS: Final = re.compile(r"(\*\*?)([^*]*)")
_END: Final = "\n"
"""Marks the end of a pattern. No name holds it."""
_BITS_PER_STEP: Final = 1024
"""Positions in patterns that one operation moves in about the time that Python needs for the operation itself."""
_LARGE: Final = 4096
"""Characters of patterns from which on `SharedMatcher` shares a matcher. A matcher takes about ten bytes for each."""
_SHARED: Final = 64
"""Large matchers that a process keeps."""


class _Steps(dict[str, tuple[int, int]]):
    """For each character of a name, two sets of positions as bits: those that it moves on from, and those where it
    stays (stars)."""

    def __init__(self, letters: str, loops: str) -> None:
        super().__init__()
        self._letters = letters[::-1].encode("ascii")  # bit 0 is a number's last digit
        self._loops = loops[::-1].encode("ascii")
        self.segment_loops = self._loop("12")
        self.any_loops = self._loop("2")

    def _loop(self, kinds: str) -> int:
        return _number(self._loops, kinds)

    def __missing__(self, letter: str) -> tuple[int, int]:
        leads = _number(self._letters, letter) if letter in _LETTERS else 0
        found = leads, self.any_loops if letter == "/" else self.segment_loops
        if letter in _LETTERS:
            self[letter] = found
        return found


def _number(text: bytes, wanted: str) -> int:
    """Returns a number with a bit for each character of `text`: 1 if it is one of `wanted`."""
    digits = bytearray(b"0" * 256)
    for character in wanted:
        digits[ord(character)] = ord("1")
    return int(text.translate(bytes(digits)), 2)


class _OneSegment:
    """Matches what has no slash: the star form `*` at the end of a prefix."""

    def matches(self, name: str, begin: int) -> bool:
        return "/" not in name[begin:]

    def first_from(self, text: str, begin: int) -> str | None:
        slash = text.find("/", begin)
        return text if slash < 0 else text[:slash] + "0"  # "0" follows "/"


class _Automaton:
    """Matches what follows the same prefix in several patterns, from the first star on."""

    __slots__ = ("_above", "_first", "_last", "_steps", "places")

    def __init__(self, rests: Iterable[str]) -> None:
        texts: list[str] = []
        kinds: list[str] = []
        starts: list[int] = []
        place = 0
        for rest in rests:
            starts.append(place)
            kind = text = ""
            for star, text in _PARTS.findall(rest):
                kind = "2" if star == "**" else "1"
                texts.append(text)
                kinds.append(kind + "0" * (len(text) - 1) if text else "")
                place += len(text)
            # A pattern that ends with a star stays at its end.
            texts.append(_END)
            kinds.append("0" if text else kind)
            place += 1
        letters, loops = "".join(texts), "".join(kinds)
        self.places = place
        self._steps = _Steps(letters, loops)
        self._last = _number(letters[::-1].encode("ascii"), _END)
        first = bytearray(b"0" * place)
        for start in starts:
            first[place - 1 - start] = ord("1")
        self._first = int(bytes(first), 2)
        self._above: dict[str, int] = {}
        """For each character: the positions from which a later character moves on. Built at the first use."""

    def matches(self, name: str, begin: int) -> bool:
        steps, places = self._steps, self._first
        for letter in name[begin:]:
            leads, loops = steps[letter]
            places = ((places & leads) << 1) | (places & loops)
            if not places:
                return False
        return places & self._last != 0

    def first_from(self, text: str, begin: int) -> str | None:
        """Does what `Matcher.first_from` does, for texts that begin with the first `begin` characters of `text`."""
        steps, places = self._steps, self._first
        passed = []
        for letter in text[begin:]:
            leads, loops = steps[letter]
            passed.append(places)
            places = ((places & leads) << 1) | (places & loops)
            if not places:
                break
        else:
            return text  # a position is reached, and every position has characters that move on
        while passed:
            at = begin + len(passed) - 1
            letter = self._next_letter(passed.pop(), text[at])
            if letter:
                return text[:at] + letter
        return None

    def _next_letter(self, places: int, after: str) -> str:
        """Returns the first character after `after` that moves on from any of `places`, or an empty text if none
        does."""
        above = self._above or self._places_above()
        if after in above and not places & above[after]:
            return ""
        for letter in _LETTERS[bisect_left(_LETTERS, after) :]:
            leads, loops = self._steps[letter]
            if letter > after and places & (leads | loops):
                return letter
        return ""

    def _places_above(self) -> dict[str, int]:
        places = 0
        for letter in reversed(_LETTERS):
            self._above[letter] = places
            leads, loops = self._steps[letter]
            places |= leads | loops
        return self._above


class Matcher:
    """Tells which names match one of `patterns`, which have to be valid (`storage.patterns.NamePattern`)."""

    def __init__(self, patterns: Iterable[str]) -> None:
        exact = set()
        rests: defaultdict[str, list[str]] = defaultdict(list)
        for pattern in patterns:
            prefix, star, _ = pattern.partition("*")
            if star:
                rests[prefix].append(pattern[len(prefix) :])
            else:
                exact.add(pattern)
        self._exact = exact
        self._rests = dict(rests)
        """What follows the first star, by the text before it."""
        self._automata: dict[str, _OneSegment | _Automaton | None] = {}
        """Those that were built so far. None stands for a prefix with `**`: every name that begins with it matches."""
        self._lengths = sorted({len(prefix) for prefix in rests})
        sizes = [sum(map(len, found)) for found in rests.values()]
        # A name begins with at most one text of each length.
        self.weight = 1 + min(sum(sizes), max(sizes, default=0) * len(self._lengths)) // _BITS_PER_STEP
        """The highest cost of matching one character of a name: 1 unless many patterns have stars before their ends."""

    def prepare(self) -> None:
        """Builds what takes longest: the automaton of the prefix with most patterns."""
        if self._rests:
            self._after(max(self._rests, key=lambda prefix: len(self._rests[prefix])))

    def _after(self, prefix: str) -> _OneSegment | _Automaton | None:
        try:
            return self._automata[prefix]
        except KeyError:
            rests = self._rests[prefix]
            made = self._automata[prefix] = None if "**" in rests else _automaton_of(rests)
            return made

    @cached_property
    def _starts(self) -> list[str]:
        """All exact names and prefixes, sorted. Every matching name is one of these or begins with one."""
        return sorted({*self._exact, *self._rests})

    def matches(self, name: str) -> bool:
        if name in self._exact:
            return True
        for length in self._lengths:
            prefix = name[:length]
            if prefix in self._rests and len(prefix) == length:
                automaton = self._after(prefix)
                if automaton is None or automaton.matches(name, length):
                    return True
        return False

    def first_from(self, text: str) -> str | None:
        """Returns a text at or after `text` such that no matching name lies between the two, or None if no matching
        name follows. It is `text` itself where a name that begins with it may match."""
        at = bisect_left(self._starts, text)
        found = self._starts[at] if at < len(self._starts) else None
        for length in self._lengths:
            prefix = text[:length]
            if len(prefix) < length or prefix not in self._rests:
                continue
            automaton = self._after(prefix)
            first = text if automaton is None else automaton.first_from(text, length)
            if first is not None and (found is None or first < found):
                found = first
        return found


def _automaton_of(rests: list[str]) -> _OneSegment | _Automaton:
    return _OneSegment() if all(rest == "*" for rest in rests) else _Automaton(rests)


class SharedMatcher:
    """Gives the `matcher` of some patterns. All sets with the same patterns share a large one, which is dropped when it
    was not used for long and built again when needed: a thousand principals may have many patterns each."""

    __slots__ = ("_own", "_patterns")

    def __init__(self, patterns: frozenset[str]) -> None:
        self._patterns = patterns
        self._own = Matcher(patterns) if sum(map(len, patterns)) < _LARGE else None

    @property
    def matcher(self) -> Matcher:
        return self._own or _large_matcher(self._patterns)


@lru_cache(maxsize=_SHARED)
def _large_matcher(patterns: frozenset[str]) -> Matcher:
    return Matcher(patterns)
