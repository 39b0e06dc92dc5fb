"""Reading `WWW-Authenticate` (RFC 9110, 11.6.1; RFC 6750, 3): several challenges, each with parameters, one list."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PARAMETER = re.compile(rf'({_TOKEN})[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)"|({_TOKEN}))')
_SCHEME = re.compile(rf"({_TOKEN})(?:[ \t]+|(?=,|$))")
_TOKEN68 = re.compile(r"[0-9A-Za-z._~+/-]+=*[ \t]*(?=,|$)")
LONGEST = 16 << 10
"""Characters of the field. A longer one names nothing here: reading 95 KB held the event loop for 200 ms."""
MOST = 16
"""Challenges that are read."""
_GAP = re.compile(r"[ \t,]*")


@dataclass(frozen=True, slots=True)
class Challenge:
    """How a registry wants to be asked: the scheme in lower case, parameters by their names in lower case."""

    scheme: str
    parameters: Mapping[str, str] = field(default_factory=dict)


def parse_challenges(text: str) -> list[Challenge]:
    """The challenges of a `WWW-Authenticate` field, in order. What cannot be read ends the list; none of a field that
    is too long."""
    found: list[Challenge] = []
    if len(text) > LONGEST:
        return found
    at = _past_gap(text, 0)
    while at < len(text) and len(found) < MOST:
        scheme = _SCHEME.match(text, at)
        if scheme is None:
            break
        parameters, at = _parameters(text, scheme.end())
        found.append(Challenge(scheme[1].lower(), parameters))
    return found


def _past_gap(text: str, at: int) -> int:
    gap = _GAP.match(text, at)
    return gap.end() if gap else at


def _parameters(text: str, at: int) -> tuple[dict[str, str], int]:
    """The parameters from `at` on, and where the next challenge starts."""
    parameters: dict[str, str] = {}
    while True:
        at = _past_gap(text, at)
        if found := _PARAMETER.match(text, at):
            quoted = found[2]
            value = found[3] if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
            parameters.setdefault(found[1].lower(), value)
            at = found.end()
        elif not parameters and (single := _TOKEN68.match(text, at)) and not _SCHEME.fullmatch(single[0].strip()):
            at = single.end()  # `Negotiate a87421000492aa==`: nothing for us
        else:
            return parameters, at


def choose(challenges: list[Challenge], basic: bool) -> Challenge | None:
    """The challenge to meet: Bearer, which names a realm; else Basic, where there is a password for it (`basic`)."""
    for challenge in challenges:
        if challenge.scheme == "bearer" and challenge.parameters.get("realm"):
            return challenge
    return next((c for c in challenges if c.scheme == "basic" and basic), None)
