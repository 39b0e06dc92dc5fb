"""Limits on JSON from clients and upstreams, checked on its bytes before it is parsed (`Bounds`).

CPython parses an array in one call that holds the interpreter's lock, and each value takes at least fifty bytes of
memory: 8 MiB of `[],[],…` block every other thread for a second and take 200 MiB. The check reads the bytes in slices,
at about 200 MB/s, and lets other threads run in between.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final

SMALL: Final = 16 * 1024
"""Size in bytes up to which a document is not checked, since it cannot block other threads for long."""
_SLICE: Final = 64 * 1024
_OPENING: Final = b"[{,"


class OutOfBounds(ValueError):
    """The document exceeds a limit, which the text names."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """The largest document that is parsed. The defaults suit the largest known manifests: indexes of some thousand
    images, artifacts of some thousand files with annotations on each."""

    values: int = 60_000
    """Number of values, objects and arrays included."""
    escapes: int = 1_000_000
    """Number of backslashes. At each one the parser starts a new piece of the text."""
    digits: int = 64
    """Characters of a number. Parsing takes time quadratic in them."""


BOUNDS: Final = Bounds()


def check_bounds(body: bytes, bounds: Bounds = BOUNDS) -> None:
    """Raises OutOfBounds. A `body` that passes takes the parser a bounded time; it need not be JSON."""
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
    """Returns the end of a slice that splits no escape: never after an odd number of backslashes."""
    stop = min(start + _SLICE, len(body))
    last = body[start:stop]
    return stop + (len(last) - len(last.rstrip(b"\\"))) % 2


def load_bounded(body: bytes, bounds: Bounds = BOUNDS) -> object:
    """Parses JSON. Raises ValueError (OutOfBounds is one), RecursionError."""
    check_bounds(body, bounds)
    return _DECODER.decode(body.decode("utf-8"))


def whole_number(text: str) -> int:
    """Parses an integer, for `json.JSONDecoder(parse_int=...)`. Raises OutOfBounds."""
    return int(_number(text))


def fraction(text: str) -> float:
    """Parses a float, for `json.JSONDecoder(parse_float=...)`. Raises OutOfBounds."""
    return float(_number(text))


def _number(text: str) -> str:
    if len(text) > BOUNDS.digits:
        raise OutOfBounds(f"it holds a number of {len(text)} characters; at most {BOUNDS.digits} are taken")
    return text


_DECODER: Final = json.JSONDecoder(parse_int=whole_number, parse_float=fraction)
