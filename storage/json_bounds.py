"""Bounds on JSON from outside, checked on its bytes before anything is built from them.

CPython decodes an array in one call that holds the interpreter lock from its first to its last value, and each value
takes fifty bytes of memory or more: 8 MiB of `[],[],…` stop every other thread for a second and take 200 MiB. The check
reads the bytes in slices, at about 200 MB/s, and lets other threads run between two of them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final

SMALL: Final = 16 * 1024
"""Bytes up to which no document can hold anything up: they are not counted."""
_SLICE: Final = 64 * 1024
_OPENING: Final = b"[{,"


class OutOfBounds(ValueError):
    """The document is larger than it may be; the text says in what."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """The largest document that is decoded. The defaults suit the largest manifests known: indexes of some thousand
    images, artifacts of some thousand files with annotations on each."""

    values: int = 60_000
    """Values in all: members of objects and arrays, these included."""
    escapes: int = 1_000_000
    """Backslashes. Each one makes the decoder start a new piece of its text."""
    digits: int = 64
    """Characters of a number. To read one takes time that grows with the square of its length."""


BOUNDS: Final = Bounds()


def check_bounds(body: bytes, bounds: Bounds = BOUNDS) -> None:
    """Raises OutOfBounds. A `body` that is no JSON may pass; one that passes costs the decoder a bounded time."""
    if len(body) <= SMALL:
        return
    values = escapes = at = 0
    in_text = False
    while at < len(body):
        stop = _slice_end(body, at)
        part = body[at:stop]
        at = stop
        if b"\\" in part:
            escapes += part.count(b"\\")
            part = part.replace(b"\\\\", b"").replace(b'\\"', b"")
        pieces = part.split(b'"')
        outside = b"".join(pieces[1::2] if in_text else pieces[::2])
        in_text ^= len(pieces) % 2 == 0
        values += len(outside) - len(outside.translate(None, _OPENING))
        if values > bounds.values:
            raise OutOfBounds(f"it holds more than {bounds.values} values, the most that are taken")
        if escapes > bounds.escapes:
            raise OutOfBounds(f"it holds more than {bounds.escapes} backslashes, the most that are taken")


def _slice_end(body: bytes, start: int) -> int:
    """Where a slice ends that cuts no escape in two: never after an odd number of backslashes."""
    stop = min(start + _SLICE, len(body))
    last = body[start:stop]
    return stop + (len(last) - len(last.rstrip(b"\\"))) % 2


def load_bounded(body: bytes, bounds: Bounds = BOUNDS) -> object:
    """What `json.loads` gives. Raises ValueError (also: OutOfBounds), RecursionError."""
    check_bounds(body, bounds)
    return _DECODER.decode(body.decode("utf-8"))


def whole_number(text: str) -> int:
    """For `json.JSONDecoder(parse_int=...)`. Raises OutOfBounds."""
    return int(_number(text))


def fraction(text: str) -> float:
    """For `json.JSONDecoder(parse_float=...)`. Raises OutOfBounds."""
    return float(_number(text))


def _number(text: str) -> str:
    if len(text) > BOUNDS.digits:
        raise OutOfBounds(f"it holds a number of {len(text)} characters; at most {BOUNDS.digits} are taken")
    return text


_DECODER: Final = json.JSONDecoder(parse_int=whole_number, parse_float=fraction)
