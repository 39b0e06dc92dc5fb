"""What a credential proved: who holds it, and what it is limited to. Not yet what they may do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from storage.access import Action, Limit

CATALOG: Final = "registry:catalog"
"""In `access`, with any action: the right to list repositories (scope `registry:catalog:*`). No repository is called
that: their names hold no colon."""


@dataclass(frozen=True, slots=True)
class Proof:
    """Holds as long as `stands` of what made it; `registry.auth.policy` asks that anew after every change.

    `name`: None is nobody, who holds an anonymous token or nothing at all. `version`: the account's at the time, None
    for one that is not in the store (htpasswd, an issuer). `stamp`: the same for those. `token`: the API token that was
    shown, or of which the token was made. `groups`: those an issuer or the OpenID provider says, beside the store's.
    `access`: what a token of `/token` was granted, by name; None: all. `limits`: what an API token is limited to; None:
    nothing. `expires`: seconds since 1970.
    """

    name: str | None
    robot: bool = False
    version: int | None = None
    stamp: str | None = None
    token: str | None = None
    groups: tuple[str, ...] = ()
    access: Mapping[str, Action] | None = None
    limits: tuple[Limit, ...] | None = None
    expires: float | None = None


NOBODY: Final = Proof(None)
"""Nothing was shown."""
