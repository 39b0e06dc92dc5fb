"""One kind of expensive request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.system.hostile.attack_requests import AttackAnswer
from tests.system.hostile.attacked_site import AttackedSite

MIB = 1 << 20
KIB = 1 << 10


@dataclass(frozen=True)
class Attack:
    """`limit`: the limit that applies, or how large the request is. `attack` sends the request once and returns the
    last response. Each call requests something new, so that no cache has the response."""

    name: str
    limit: str
    attack: Callable[[AttackedSite], AttackAnswer]
