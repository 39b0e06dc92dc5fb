"""Scopes: what a client asks a token for (Distribution's "Token Scope Documentation").

`repository:team/app:pull,push`, `registry:catalog:*`; several are parted by spaces, or come as parameters of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from registry.auth.rights.principal import CATALOG
from registry.http.errors import RequestInvalid
from storage.access import Action
from storage.errors import NameInvalid
from storage.names import RepositoryName

MOST_NAMES: Final = 100
"""Different names in one request."""
LONGEST_NAMES: Final = 8 * 1024
"""Characters of all the names together: the token has to fit into a request's headers."""
CONTENT_ACTIONS: Final = Action.PULL | Action.PUSH | Action.DELETE
"""What a token can be granted for a repository. Rights are granted with an account, never with a token."""

_REPOSITORY: Final = re.compile(r"repository(\([a-z0-9]+\))?")
"""With its class, such as `repository(plugin)`, which makes no difference here."""


@dataclass(frozen=True, slots=True)
class RequestedAccess:
    """What is asked for, by name (`CATALOG` among them). `unreadable`: there were scopes beside it that mean nothing
    here; they are granted nothing."""

    actions: Mapping[str, Action]
    unreadable: bool = False

    @property
    def anything(self) -> bool:
        return bool(self.actions) or self.unreadable

    @property
    def is_pull_only(self) -> bool:
        """Something is asked for, and nothing beyond pulling."""
        readable = bool(self.actions) and not self.unreadable and CATALOG not in self.actions
        return readable and all(actions == Action.PULL for actions in self.actions.values())


def parse_scopes(values: Iterable[str]) -> RequestedAccess:
    """Raises RequestInvalid: more than `MOST_NAMES` names."""
    found: dict[str, Action] = {}
    unreadable = False
    for scope in (scope for value in values for scope in value.split()):
        name, actions = _parse_scope(scope)
        if not name:
            unreadable = True
            continue
        found[name] = found.get(name, Action.NONE) | actions
        if len(found) > MOST_NAMES or sum(map(len, found)) > LONGEST_NAMES:
            raise RequestInvalid(
                f"a token is for at most {MOST_NAMES} repositories, with {LONGEST_NAMES} characters in their names"
            )
    return RequestedAccess(found, unreadable)


def format_scopes(granted: Mapping[str, Action]) -> str:
    """As a scope, in an answer."""
    return " ".join(
        f"{CATALOG}:*" if name == CATALOG else f"repository:{name}:{','.join((actions & CONTENT_ACTIONS).words)}"
        for name, actions in granted.items()
    )


def _parse_scope(scope: str) -> tuple[str, Action]:
    """Its name, empty where it means nothing here, and its actions; those that are not known are left out."""
    kind, _, rest = scope.partition(":")
    name, _, listed = rest.rpartition(":")
    words = listed.split(",")
    if scope.startswith(f"{CATALOG}:"):
        return (CATALOG, Action.PULL) if "*" in words else ("", Action.NONE)
    if not _REPOSITORY.fullmatch(kind):
        return "", Action.NONE
    actions = Action.NONE
    for word in words:
        actions |= {"pull": Action.PULL, "push": Action.PUSH, "delete": Action.DELETE, "*": CONTENT_ACTIONS}.get(
            word, Action.NONE
        )
    try:
        return (RepositoryName(name), actions) if actions else ("", Action.NONE)
    except NameInvalid:
        return "", Action.NONE
