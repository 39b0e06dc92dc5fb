"""Scopes: the access that a client requests for a token (Distribution's "Token Scope Documentation").

`repository:team/app:pull,push`, `registry:catalog:*`. Several are separated by spaces or sent as several parameters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from registry.auth.rights.principal import CATALOG
from registry.request import RequestInvalid
from storage.access import Action
from storage.errors import NameInvalid
from storage.names import RepositoryName

MAX_NAMES: Final = 100
"""Different names in one request."""
MAX_NAME_CHARACTERS: Final = 8 * 1024
"""Characters of all names together, so that the token fits into a request's headers."""
CONTENT_ACTIONS: Final = Action.PULL | Action.PUSH | Action.DELETE
"""The actions that a token can be granted on a repository. The right to grant needs an account, never a token."""

_REPOSITORY: Final = re.compile(r"repository(\([a-z0-9]+\))?")
"""May carry a class, such as `repository(plugin)`, which is ignored."""


@dataclass(frozen=True, slots=True)
class RequestedAccess:
    """The requested actions, by name (`CATALOG` is one of the names). `unreadable`: there were scopes that this
    registry does not know; they are granted nothing."""

    actions: Mapping[str, Action]
    unreadable: bool = False

    @property
    def anything(self) -> bool:
        return bool(self.actions) or self.unreadable

    @property
    def is_pull_only(self) -> bool:
        """Whether pulls, and nothing else, are requested."""
        readable = bool(self.actions) and not self.unreadable and CATALOG not in self.actions
        return readable and all(actions == Action.PULL for actions in self.actions.values())


def parse_scopes(values: Iterable[str]) -> RequestedAccess:
    """Parses scopes. Raises RequestInvalid for more than `MAX_NAMES` names."""
    found: dict[str, Action] = {}
    unreadable = False
    for scope in (scope for value in values for scope in value.split()):
        name, actions = _parse_scope(scope)
        if not name:
            unreadable = True
            continue
        found[name] = found.get(name, Action.NONE) | actions
        if len(found) > MAX_NAMES or sum(map(len, found)) > MAX_NAME_CHARACTERS:
            raise RequestInvalid(
                f"a token is for at most {MAX_NAMES} repositories, with {MAX_NAME_CHARACTERS} characters in their names"
            )
    return RequestedAccess(found, unreadable)


def format_scopes(granted: Mapping[str, Action]) -> str:
    """Returns granted access in the form of a scope."""
    return " ".join(
        f"{CATALOG}:*" if name == CATALOG else f"repository:{name}:{','.join((actions & CONTENT_ACTIONS).words)}"
        for name, actions in granted.items()
    )


def _parse_scope(scope: str) -> tuple[str, Action]:
    """Returns a scope's name, empty for an unknown kind of scope, and its actions; unknown ones are left out."""
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
