"""Parses scopes: texts with which a client requests access for a token.

Examples are `repository:team/app:pull,push` and, for the list of repositories, `registry:catalog:*`. A request may have
several, separated by spaces or sent as several parameters. Source: Distribution's "Token Scope Documentation".
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
"""The most repositories in one request."""
MAX_NAME_CHARACTERS: Final = 8 * 1024
"""The most characters in all names of one request together, so that the token fits into a request's headers."""
CONTENT_ACTIONS: Final = Action.PULL | Action.PUSH | Action.DELETE
"""The actions that a token can grant on a repository. No token can grant the action admin."""

_REPOSITORY_KIND: Final = re.compile(r"repository(\([a-z0-9]+\))?")
"""The kind of a repository's scope. It may name a class, such as `repository(plugin)`, which is ignored."""


@dataclass(frozen=True, slots=True)
class RequestedAccess:
    """The access that a client requests.

    - `actions`: the requested actions by repository name. The name `CATALOG` stands for the list of repositories.
    - `has_unknown_scopes`: whether there were scopes that this registry does not know. It grants nothing for those.
    """

    actions: Mapping[str, Action]
    has_unknown_scopes: bool = False

    @property
    def is_any_requested(self) -> bool:
        """Whether the client requests any access, known or unknown."""
        return bool(self.actions) or self.has_unknown_scopes

    @property
    def is_pull_only(self) -> bool:
        """Whether the client requests to pull from repositories, and nothing else."""
        only_repositories = bool(self.actions) and not self.has_unknown_scopes and CATALOG not in self.actions
        return only_repositories and all(actions == Action.PULL for actions in self.actions.values())


def parse_scopes(values: Iterable[str]) -> RequestedAccess:
    """Parses the scopes in all parameters of a request. Raises RequestInvalid for more than `MAX_NAMES` repositories or
    `MAX_NAME_CHARACTERS` characters in their names."""
    found: dict[str, Action] = {}
    has_unknown_scopes = False
    for scope in (scope for value in values for scope in value.split()):
        name, actions = _parse_scope(scope)
        if not name:
            has_unknown_scopes = True
            continue
        found[name] = found.get(name, Action.NONE) | actions
        if len(found) > MAX_NAMES or sum(map(len, found)) > MAX_NAME_CHARACTERS:
            raise RequestInvalid(
                f"a token is for at most {MAX_NAMES} repositories, with {MAX_NAME_CHARACTERS} characters in their names"
            )
    return RequestedAccess(found, has_unknown_scopes)


def format_scopes(granted: Mapping[str, Action]) -> str:
    """Returns the granted actions as scopes, separated by spaces."""
    return " ".join(
        f"{CATALOG}:*" if name == CATALOG else f"repository:{name}:{','.join((actions & CONTENT_ACTIONS).words)}"
        for name, actions in granted.items()
    )


def _parse_scope(scope: str) -> tuple[str, Action]:
    """Returns the name and the actions of one scope, without unknown actions. The name is empty if the scope is of an
    unknown kind, has no valid name, or no known action."""
    kind, _, rest = scope.partition(":")
    name, _, action_list = rest.rpartition(":")
    words = action_list.split(",")
    if scope.startswith(f"{CATALOG}:"):
        return (CATALOG, Action.PULL) if "*" in words else ("", Action.NONE)
    if not _REPOSITORY_KIND.fullmatch(kind):
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
