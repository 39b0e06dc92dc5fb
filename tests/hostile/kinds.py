"""A kind of request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.hostile.sending import Answer
from tests.hostile.site import Site

MIB = 1 << 20
KIB = 1 << 10


@dataclass(frozen=True)
class Kind:
    """`limit`: what bounds it, or how far it goes. `attack` sends it once and gives the last answer; each call asks for
    something that was not asked for before, where an answer could be remembered."""

    name: str
    limit: str
    attack: Callable[[Site], Answer]
