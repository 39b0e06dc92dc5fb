"""Limits on JSON documents that clients or other servers send, checked before they are parsed (`check_bounds`).

CPython parses a document in one call that holds the global interpreter lock, and each value takes at least fifty bytes
of memory. So parsing 8 MiB of `[],[],…` blocks all other threads for a second and takes 200 MiB. The check does not
parse; it only counts certain bytes of the document. It reads the document in slices, at about 200 MB/s, and lets other
threads run between two slices.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final

QUICK_PARSE_BYTES: Final = 16 * 1024
"""Up to this size in bytes, a document is parsed quickly, whatever it contains. So its bounds are not checked."""
_SLICE_BYTES: Final = 64 * 1024
"""Size of the slices in which a document is checked."""
_MAX_NUMBER_CHARACTERS: Final = 64
"""Largest number of characters of one number. They are limited because the time to parse a number grows with the square
of its length."""
_VALUE_MARKS: Final = b"[{,"
"""Bytes that are counted outside strings. The number of values in a document is at most one more than the number of
these bytes: each value except the outermost one is the first in a list or an object, or follows a comma."""


class OutOfBounds(ValueError):
    """A document exceeds a limit. The text of the error says which one, such as "it holds more than 60000 values"."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Limits that a document must not exceed. The defaults admit the largest manifests known: indexes of a few thousand
    images, and artifacts of a few thousand files with annotations on each."""

    values: int = 60_000
    """Largest number of values in the document, including objects and arrays."""
    escapes: int = 1_000_000
    """Largest number of backslashes. They are limited because the parser allocates a new piece of the string at each
    backslash."""


BOUNDS: Final = Bounds()
"""The default limits."""


def check_bounds(body: bytes, bounds: Bounds = BOUNDS) -> None:
    """Raises OutOfBounds if `body` has too many values or backslashes. Checks nothing if `body` has at most
    `QUICK_PARSE_BYTES`. Never checks that `body` is valid JSON. Does not check the length of numbers: the decoder does
    that with `parse_bounded_int` and `parse_bounded_float`."""
    if len(body) <= QUICK_PARSE_BYTES:
        return
    value_count = escape_count = start = 0
    in_string = False  # whether the current slice begins inside a string
    while start < len(body):
        stop = _slice_end(body, start)
        part = body[start:stop]
        start = stop
        if b"\\" in part:
            escape_count += part.count(b"\\")
            # Only quotes that begin or end a string are left after this.
            part = part.replace(b"\\\\", b"").replace(b'\\"', b"")
        pieces = part.split(b'"')  # alternately a piece outside a string and a piece inside a string
        outside = b"".join(pieces[1::2] if in_string else pieces[::2])
        in_string ^= len(pieces) % 2 == 0  # an even number of pieces means an odd number of quotes
        value_count += len(outside) - len(outside.translate(None, _VALUE_MARKS))
        if value_count > bounds.values:
            raise OutOfBounds(f"it holds more than {bounds.values} values, the most that are accepted")
        if escape_count > bounds.escapes:
            raise OutOfBounds(f"it holds more than {bounds.escapes} backslashes, the most that are accepted")


def _slice_end(body: bytes, start: int) -> int:
    """Returns the end of the slice that begins at `start`. A slice never ends between the two characters of an escape
    such as `\\"`: it does not end after an odd number of backslashes."""
    stop = min(start + _SLICE_BYTES, len(body))
    part = body[start:stop]
    return stop + (len(part) - len(part.rstrip(b"\\"))) % 2


def load_bounded(body: bytes, bounds: Bounds = BOUNDS) -> object:
    """Checks and parses a JSON document in UTF-8. Raises OutOfBounds, ValueError (not JSON), RecursionError
    (nested too deeply)."""
    check_bounds(body, bounds)
    return _DECODER.decode(body.decode("utf-8"))


def parse_bounded_int(text: str) -> int:
    """Parses an integer; passed to `json.JSONDecoder` as `parse_int`. Raises OutOfBounds if it has too many digits."""
    return int(_check_digits(text))


def parse_bounded_float(text: str) -> float:
    """Parses a float; passed to `json.JSONDecoder` as `parse_float`. Raises OutOfBounds if it has too many digits."""
    return float(_check_digits(text))


def _check_digits(text: str) -> str:
    """Returns `text`, a number. Raises OutOfBounds if it has more than `_MAX_NUMBER_CHARACTERS` characters."""
    if len(text) > _MAX_NUMBER_CHARACTERS:
        raise OutOfBounds(f"it holds a number of {len(text)} characters; at most {_MAX_NUMBER_CHARACTERS} are accepted")
    return text


_DECODER: Final = json.JSONDecoder(parse_int=parse_bounded_int, parse_float=parse_bounded_float)
"""A decoder that refuses long numbers."""
