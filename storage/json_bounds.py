"""Limits for JSON documents that clients or other servers send. `check_bounds` checks a document before it is parsed.

CPython parses a document in one call that holds the global interpreter lock, and each value takes at least fifty bytes
of memory. For example, parsing 8 MiB of `[],[],…` blocks all other threads for a second and takes 200 MiB. The check
does not parse the document; it only counts certain bytes. It reads the document in slices, at about 200 MB/s, and lets
other threads run between two slices.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final

QUICK_PARSE_BYTES: Final = 16 * 1024
"""Largest size in bytes of a document that `check_bounds` accepts without a check. Parsing such a document is quick,
whatever it contains."""
_SLICE_BYTES: Final = 64 * 1024
"""Size in bytes of the slices in which a document is checked."""
_MAX_NUMBER_CHARACTERS: Final = 64
"""Largest number of characters of one number. The limit exists because the time to parse a number grows with the square
of its length."""
_VALUE_MARKS: Final = b"[{,"
"""Bytes that `check_bounds` counts outside strings. The number of values in a document is at most one more than the
number of these bytes: each value except the outermost one is the first in its array or object, or follows a comma."""


class OutOfBounds(ValueError):
    """A document exceeds a limit. The text of the error names the limit, such as "it holds more than 60000 values"."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Limits that a document must not exceed. The defaults admit the largest manifests known: indexes of a few thousand
    images, and artifacts of a few thousand files with annotations on each."""

    max_values: int = 60_000
    """Largest number of values in the document, including objects and arrays."""
    max_backslashes: int = 1_000_000
    """Largest number of backslashes. The limit exists because the parser allocates a new piece of a string at each
    backslash."""


BOUNDS: Final = Bounds()
"""The default limits."""


def check_bounds(body: bytes, bounds: Bounds = BOUNDS) -> None:
    """Raises OutOfBounds if `body` has too many values or backslashes. Checks nothing if `body` has at most
    `QUICK_PARSE_BYTES`. Does not check whether `body` is valid JSON. Does not check the length of numbers, which
    `parse_bounded_int` and `parse_bounded_float` check during the parsing."""
    if len(body) <= QUICK_PARSE_BYTES:
        return
    value_count = backslash_count = start = 0
    in_string = False  # whether the current slice begins inside a string
    while start < len(body):
        stop = _slice_end(body, start)
        part = body[start:stop]
        start = stop
        if b"\\" in part:
            backslash_count += part.count(b"\\")
            # Removes escaped backslashes and quotes. Each quote that is left begins or ends a string.
            part = part.replace(b"\\\\", b"").replace(b'\\"', b"")
        pieces = part.split(b'"')  # alternately a piece outside a string and a piece inside a string
        outside = b"".join(pieces[1::2] if in_string else pieces[::2])
        in_string ^= len(pieces) % 2 == 0  # an even number of pieces means an odd number of quotes
        value_count += len(outside) - len(outside.translate(None, _VALUE_MARKS))
        if value_count > bounds.max_values:
            raise OutOfBounds(f"it holds more than {bounds.max_values} values, the most that are accepted")
        if backslash_count > bounds.max_backslashes:
            raise OutOfBounds(f"it holds more than {bounds.max_backslashes} backslashes, the most that are accepted")


def _slice_end(body: bytes, start: int) -> int:
    """Returns the end of the slice that begins at `start`. A slice never ends between the two characters of an escape
    such as `\\"`: it does not end after an odd number of backslashes."""
    stop = min(start + _SLICE_BYTES, len(body))
    part = body[start:stop]
    return stop + (len(part) - len(part.rstrip(b"\\"))) % 2


def load_bounded(body: bytes, bounds: Bounds = BOUNDS) -> object:
    """Checks and parses a JSON document in UTF-8. Raises:

    - OutOfBounds if the document exceeds a limit.
    - another ValueError if the document is not JSON in UTF-8.
    - RecursionError if the document is nested too deeply."""
    check_bounds(body, bounds)
    return _DECODER.decode(body.decode("utf-8"))


def parse_bounded_int(text: str) -> int:
    """Parses an integer, as `parse_int` of `json.JSONDecoder`. Raises OutOfBounds if `text` is too long."""
    return int(_checked_number(text))


def parse_bounded_float(text: str) -> float:
    """Parses a float, as `parse_float` of `json.JSONDecoder`. Raises OutOfBounds if `text` is too long."""
    return float(_checked_number(text))


def _checked_number(text: str) -> str:
    """Returns the number `text`. Raises OutOfBounds if it has more than `_MAX_NUMBER_CHARACTERS` characters."""
    if len(text) > _MAX_NUMBER_CHARACTERS:
        raise OutOfBounds(f"it holds a number of {len(text)} characters; at most {_MAX_NUMBER_CHARACTERS} are accepted")
    return text


_DECODER: Final = json.JSONDecoder(parse_int=parse_bounded_int, parse_float=parse_bounded_float)
"""A decoder that refuses long numbers."""
