"""Matches repository names against many patterns at once (`Matcher`).

In a pattern, `*` matches any text without a slash, and `**` matches any text. The *prefix* of a pattern is its text
before the first star. The *rest* is its text from the first star to the end.

Users write patterns (grants, limits of API tokens), so matching has to be fast for every pattern:

- A *simple* pattern is an exact name, or a prefix followed by `*` or `**`. Matching it takes one lookup in a dict.
- Older stores may also contain patterns with a star before the end. If a prefix has such patterns, the rests of all
  patterns with this prefix form one nondeterministic automaton, which reads the name character by character. Each
  position in a pattern is one bit of a large integer, and one shift advances all positions together (the Shift-And
  algorithm: Baeza-Yates and Gonnet 1992). Matching a name of n characters with patterns of m characters in total takes
  about n * m / 30 nanoseconds.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property, lru_cache
from typing import Final

_NAME_CHARACTERS: Final = "-./0123456789_abcdefghijklmnopqrstuvwxyz"
"""The characters that names may contain, in byte order."""
_STAR_AND_TEXT: Final = re.compile(r"(\*\*?)([^*]*)")
"""Matches a `*` or `**` in a pattern, and the text after it, up to the next star."""
_END: Final = "\n"
"""Character that marks the end of a pattern in an automaton. No name contains it."""
_BITS_PER_OPERATION: Final = 1024
"""Size of an integer, in bits, up to which an operation on the integer takes about as long as any other operation in
Python. On a larger integer, the time grows with the number of bits."""
MIN_SHARED_CHARACTERS: Final = 4096
"""Equal sets of patterns share a matcher (`SharedMatcher`) if a set has at least this number of characters in total. A
matcher takes about ten bytes of memory per character, so sharing smaller matchers would save little."""
_MAX_SHARED_MATCHERS: Final = 64
"""Largest number of shared matchers that a process keeps in memory."""


class _Transitions(dict[str, tuple[int, int]]):
    """The transitions of an automaton. The automaton can be at several positions at once. Maps a character of a name to
    two sets of positions:

    - The first set has the positions from which the automaton advances to the next position when it reads the
      character.
    - The second set has the positions at which the automaton stays: those that follow a star that matches the
      character.

    From a position in both sets, the automaton does both. A set is an integer with one bit per position."""

    def __init__(self, expected: str, stars: str) -> None:
        """Both texts have one character per position. `expected`: the character with which the automaton advances from
        the position. `stars`: "1" if the position follows a `*`, "2" if it follows a `**`, otherwise "0"."""
        super().__init__()
        # Both texts are reversed, because `_bit_mask` makes bit 0 from the last character.
        self._expected = expected[::-1].encode("ascii")
        self._stars = stars[::-1].encode("ascii")
        self._all_stars = _bit_mask(self._stars, "12")
        self._double_stars = _bit_mask(self._stars, "2")

    def __missing__(self, character: str) -> tuple[int, int]:
        """Returns the two sets for `character`. Stores them in the dict if names may contain the character."""
        advancing = _bit_mask(self._expected, character) if character in _NAME_CHARACTERS else 0
        sets = advancing, self._double_stars if character == "/" else self._all_stars  # a single star matches no slash
        if character in _NAME_CHARACTERS:
            self[character] = sets
        return sets


def _bit_mask(text: bytes, characters: str) -> int:
    """Returns a bit mask with one bit per character of `text`: 1 if `characters` contains this character, otherwise 0.
    Bit 0 stands for the last character of `text`, bit 1 for the character before it, and so on."""
    digits = bytearray(b"0" * 256)
    for character in characters:
        digits[ord(character)] = ord("1")
    return int(text.translate(bytes(digits)), 2)


class _OneSegment:
    """Matches the rest `*`, which is any text without a slash. Has the methods of `_Automaton`."""

    def matches(self, name: str, prefix_length: int) -> bool:
        return "/" not in name[prefix_length:]

    def seek(self, text: str, prefix_length: int) -> str | None:
        """Does what `Matcher.seek` does, but only for names that begin with the first `prefix_length` characters of
        `text`."""
        # For example, the prefix is `a/` and `text` is `a/b/c`. No name that begins with `a/b/` matches. The scan can
        # continue at `a/b0`, which is after all these names, because "0" is the next character after "/" in byte order.
        slash = text.find("/", prefix_length)
        return text if slash < 0 else text[:slash] + "0"


class _Automaton:
    """Matches the rests of several patterns that have the same prefix."""

    __slots__ = ("_accepting_later", "_end", "_start", "_transitions")

    def __init__(self, rests: Iterable[str]) -> None:
        texts: list[str] = []
        star_digits: list[str] = []
        starts: list[int] = []
        size = 0
        for rest in rests:
            starts.append(size)
            star_digit = text = ""
            for star, text in _STAR_AND_TEXT.findall(rest):
                star_digit = "2" if star == "**" else "1"
                texts.append(text)
                # Only the first character of `text` follows the star.
                star_digits.append(star_digit + "0" * (len(text) - 1) if text else "")
                size += len(text)
            # If the pattern ends with a star, the automaton may stay at the end position, which follows this star.
            texts.append(_END)
            star_digits.append("0" if text else star_digit)
            size += 1
        expected, stars = "".join(texts), "".join(star_digits)
        self._transitions = _Transitions(expected, stars)
        self._end = _bit_mask(expected[::-1].encode("ascii"), _END)
        start_digits = bytearray(b"0" * size)
        for start in starts:
            start_digits[size - 1 - start] = ord("1")  # bit 0 is the last digit
        self._start = int(bytes(start_digits), 2)
        self._accepting_later: dict[str, int] = {}
        """Maps each character that names may contain to the positions that accept at least one later character, in
        byte order. For example, the positions for "x" are those that accept "y" or "z". One bit per position. Empty
        until the first use."""

    def matches(self, name: str, prefix_length: int) -> bool:
        """Returns whether `name`, without its first `prefix_length` characters, matches one of the rests."""
        transitions, positions = self._transitions, self._start
        for character in name[prefix_length:]:
            advancing, staying = transitions[character]
            positions = ((positions & advancing) << 1) | (positions & staying)
            if not positions:
                return False
        return positions & self._end != 0

    def seek(self, text: str, prefix_length: int) -> str | None:
        """Does what `Matcher.seek` does, but only for names that begin with the first `prefix_length` characters of
        `text`."""
        transitions, positions = self._transitions, self._start
        earlier_positions = []  # for each character read so far, the positions before it was read
        for character in text[prefix_length:]:
            advancing, staying = transitions[character]
            earlier_positions.append(positions)
            positions = ((positions & advancing) << 1) | (positions & staying)
            if not positions:
                break
        else:
            return text  # a position is left after all of `text`, and every position can lead to a match
        while earlier_positions:
            index = prefix_length + len(earlier_positions) - 1
            character = self._next_character(earlier_positions.pop(), text[index])
            if character:
                return text[:index] + character
        return None

    def _next_character(self, positions: int, after: str) -> str:
        """Returns the first character after `after`, in byte order, that one of `positions` accepts; empty if there is
        none."""
        accepting_later = self._accepting_later or self._build_accepting_later()
        if after in accepting_later and not positions & accepting_later[after]:
            return ""
        for character in _NAME_CHARACTERS[bisect_left(_NAME_CHARACTERS, after) :]:
            advancing, staying = self._transitions[character]
            if character > after and positions & (advancing | staying):
                return character
        return ""

    def _build_accepting_later(self) -> dict[str, int]:
        """Fills `_accepting_later` and returns it."""
        positions = 0
        for character in reversed(_NAME_CHARACTERS):
            self._accepting_later[character] = positions
            advancing, staying = self._transitions[character]
            positions |= advancing | staying
        return self._accepting_later


class Matcher:
    """Matches names against `patterns`. They must be valid (`storage.patterns.NamePattern`)."""

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
        """The rests of all patterns with a star, by prefix."""
        self._automata: dict[str, _OneSegment | _Automaton | None] = {}
        """The automata built so far, by prefix. A value is None if one of the rests is `**`, so that every name that
        begins with the prefix matches."""
        self._prefix_lengths = sorted({len(prefix) for prefix in rests})
        sizes = [sum(map(len, rests_of_prefix)) for rests_of_prefix in rests.values()]
        # For each length, at most one prefix fits a name. So at most `len(self._prefix_lengths)` automata read a name.
        self.match_cost = 1 + min(sum(sizes), max(sizes, default=0) * len(self._prefix_lengths)) // _BITS_PER_OPERATION
        """Upper bound for the time of matching one character of a name, as a multiple of the time that a matcher of a
        few patterns takes. For example, 3 means: at most three times as long as with a few patterns. The value is 1
        unless many patterns have a star before the end."""

    def prepare(self) -> None:
        """Builds the automaton for the prefix with the most patterns. Every other automaton is built when it is first
        needed."""
        if self._rests:
            self._automaton(max(self._rests, key=lambda prefix: len(self._rests[prefix])))

    def _automaton(self, prefix: str) -> _OneSegment | _Automaton | None:
        """Returns the automaton for the rests after `prefix`, or None if every name that begins with `prefix`
        matches."""
        try:
            return self._automata[prefix]
        except KeyError:
            rests = self._rests[prefix]
            automaton = self._automata[prefix] = None if "**" in rests else _build_automaton(rests)
            return automaton

    @cached_property
    def _starts(self) -> list[str]:
        """All exact names and prefixes, sorted. Every matching name is one of these texts or begins with one."""
        return sorted({*self._exact, *self._rests})

    def matches(self, name: str) -> bool:
        """Returns whether `name` matches at least one pattern."""
        if name in self._exact:
            return True
        for length in self._prefix_lengths:
            prefix = name[:length]
            if prefix in self._rests and len(prefix) == length:
                automaton = self._automaton(prefix)
                if automaton is None or automaton.matches(name, length):
                    return True
        return False

    def seek(self, text: str) -> str | None:
        """Lets a scan of names in byte order skip names that do not match. `text`: where the scan is now. Returns the
        text at which the scan can continue without missing a matching name:

        - `text` itself, if a name that begins with `text` may match
        - otherwise a later text, which need not be a name
        - None, if neither `text` nor any later name matches"""
        index = bisect_left(self._starts, text)
        nearest = self._starts[index] if index < len(self._starts) else None
        for length in self._prefix_lengths:
            prefix = text[:length]
            if len(prefix) < length or prefix not in self._rests:
                continue
            automaton = self._automaton(prefix)
            candidate = text if automaton is None else automaton.seek(text, length)
            if candidate is not None and (nearest is None or candidate < nearest):
                nearest = candidate
        return nearest


def _build_automaton(rests: list[str]) -> _OneSegment | _Automaton:
    """Returns the automaton that matches any of `rests`."""
    return _OneSegment() if all(rest == "*" for rest in rests) else _Automaton(rests)


class SharedMatcher:
    """Gives access to the `matcher` of a set of patterns. This object stores a small matcher itself. Large matchers are
    in a cache of the process, where equal sets of patterns share one matcher. The cache bounds the memory that large
    matchers take. A matcher that the cache has evicted is built again at its next use."""

    __slots__ = ("_patterns", "_small_matcher")

    def __init__(self, patterns: frozenset[str]) -> None:
        self._patterns = patterns
        self._small_matcher = Matcher(patterns) if sum(map(len, patterns)) < MIN_SHARED_CHARACTERS else None

    @property
    def matcher(self) -> Matcher:
        """The matcher of the patterns. Building it may take milliseconds."""
        return self._small_matcher or _shared_matcher(self._patterns)


@lru_cache(maxsize=_MAX_SHARED_MATCHERS)
def _shared_matcher(patterns: frozenset[str]) -> Matcher:
    """Returns the matcher of the patterns from the cache, or builds it."""
    return Matcher(patterns)
