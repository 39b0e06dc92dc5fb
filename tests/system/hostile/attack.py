"""The class of the expensive requests that the modules `attacks_*` define."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.system.hostile.attack_requests import AttackAnswer
from tests.system.hostile.attacked_site import AttackedSite

MIB = 1 << 20
KIB = 1 << 10


@dataclass(frozen=True)
class Attack:
    """One kind of expensive request. `limit`: the limit of the server that applies to the request, or the size of the
    request. `attack` sends the request once and returns the last response. Each call sends a new request, so that no
    cache has the response."""

    name: str
    limit: str
    attack: Callable[[AttackedSite], AttackAnswer]
