"""A kind of request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.system.hostile.attack_requests import AttackAnswer
from tests.system.hostile.attacked_site import AttackedSite

MIB = 1 << 20
KIB = 1 << 10


@dataclass(frozen=True)
class Attack:
    """`limit`: what bounds it, or how far it goes. `attack` sends it once and gives the last answer; each call asks for
    something that was not asked for before, where an answer could be remembered."""

    name: str
    limit: str
    attack: Callable[[AttackedSite], AttackAnswer]
