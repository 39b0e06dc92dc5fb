"""Matches names against many patterns at once.

Whoever may grant rights, or makes an API token, writes patterns, so no pattern may be slow. A pattern without a star is
looked up. One that is a text and a star for the rest is looked up by that text. All other patterns are read letter by
letter, together: a bit stands for each place in one of them, and a letter moves all bits at once (the Shift-And
algorithm: Baeza-Yates and Gonnet 1992). A match takes a name's letters times the patterns' letters divided by 30, in
steps of about a nanosecond, whatever the patterns are.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property, lru_cache
from typing import Final

_LETTERS: Final = "-./0123456789_abcdefghijklmnopqrstuvwxyz"
"""What names are made of, in byte order."""
_PARTS: Final = re.compile(r"(\*\*?)([^*]*)")
_END: Final = "\n"
"""Stands where a pattern ends, since it is in no name."""
_BITS_PER_STEP: Final = 1024
"""Places in patterns that one operation moves in about the time that Python takes for the operation itself."""
_LARGE: Final = 4096
"""Letters of patterns from which on a matcher takes much memory: ten bytes for each of them, about."""
_SHARED: Final = 64
"""Large matchers that a process keeps."""


class _Steps(dict[str, tuple[int, int]]):
    """For each letter: the places that it leads on from, and the places that it leads back to (a star's)."""

    def __init__(self, letters: str, loops: str) -> None:
        super().__init__()
        self._letters = letters[::-1].encode("ascii")  # bit 0 is the last digit of a number
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
    """A bit for each character: whether it is one of `wanted`."""
    digits = bytearray(b"0" * 256)
    for character in wanted:
        digits[ord(character)] = ord("1")
    return int(text.translate(bytes(digits)), 2)


class _Automaton:
    """What follows the same text in several patterns, from the first star on."""

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
            # A pattern that ends with a star stays where it ends.
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
        """For each letter: the places from which one that follows it leads on. Made when it is asked for."""

    def matches(self, name: str, begin: int) -> bool:
        steps, places = self._steps, self._first
        for letter in name[begin:]:
            leads, loops = steps[letter]
            places = ((places & leads) << 1) | (places & loops)
            if not places:
                return False
        return places & self._last != 0

    def first_from(self, text: str, begin: int) -> str | None:
        """See `Matcher.first_from`; of texts that begin as `text` does up to `begin`."""
        steps, places = self._steps, self._first
        passed = []
        for letter in text[begin:]:
            leads, loops = steps[letter]
            passed.append(places)
            places = ((places & leads) << 1) | (places & loops)
            if not places:
                break
        else:
            return text  # some place has been reached, and letters lead on from each
        while passed:
            at = begin + len(passed) - 1
            letter = self._next_letter(passed.pop(), text[at])
            if letter:
                return text[:at] + letter
        return None

    def _next_letter(self, places: int, after: str) -> str:
        """The first letter after that one that leads anywhere from `places`; empty: none does."""
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
    """Tells which names one of `patterns` matches, which are valid (`storage.patterns.NamePattern`)."""

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
        """By the text before the first star: what follows it."""
        self._automata: dict[str, _Automaton | None] = {}
        """Those that were made so far. None: everything that begins with that text matches."""
        self._lengths = sorted({len(prefix) for prefix in rests})
        sizes = [sum(map(len, found)) for found in rests.values()]
        # Of texts of the same length a name begins with one alone.
        self.weight = 1 + min(sum(sizes), max(sizes, default=0) * len(self._lengths)) // _BITS_PER_STEP
        """What a letter of a name costs at the most: 1 where there are few patterns with stars inside."""

    def prepare(self) -> None:
        """Makes what takes longest: what is read where most patterns begin with the same text."""
        if self._rests:
            self._after(max(self._rests, key=lambda prefix: len(self._rests[prefix])))

    def _after(self, prefix: str) -> _Automaton | None:
        try:
            return self._automata[prefix]
        except KeyError:
            rests = self._rests[prefix]
            made = self._automata[prefix] = None if "**" in rests else _Automaton(rests)
            return made

    @cached_property
    def _starts(self) -> list[str]:
        """Whatever matches is one of these, or begins with one."""
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
        """A text from `text` on: no name between the two matches. It is `text` itself where a name that begins with it
        may match. None: no name from `text` on matches."""
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


class SharedMatcher:
    """The `matcher` of some patterns. A large one belongs to all that have the same patterns, and is made again if it
    was not used for long: a thousand principals may have many patterns each."""

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
