"""Parses and formats scopes. A *scope* is a text in a client's request for a token. It names the access that the client
requests. For example, `repository:team/app:pull,push` requests access to a repository, and `registry:catalog:*`
requests access to the list of repositories.

A request can have several `scope` parameters. A parameter can contain several scopes, separated by spaces. Source:
Distribution's "Token Scope Documentation".
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
"""The largest number of repositories in one request for a token."""
MAX_NAME_CHARACTERS: Final = 8 * 1024
"""The largest total number of characters in the repository names of one request for a token. The token contains the
names, and the client sends the token in a header."""
MAX_SCOPES: Final = 200
"""The largest number of scopes in one request for a token. Repeated and unknown scopes count. A client may thus name
each of `MAX_NAMES` repositories in two scopes."""
CONTENT_ACTIONS: Final = Action.PULL | Action.PUSH | Action.DELETE
"""The actions that a token can grant on a repository. No token grants `ADMIN`."""

_ACTIONS: Final[Mapping[str, Action]] = {
    "pull": Action.PULL,
    "push": Action.PUSH,
    "delete": Action.DELETE,
    "*": CONTENT_ACTIONS,
}
"""The known actions in a scope for a repository, by their word in the scope."""
_CATALOG_ACTIONS: Final = frozenset({"*", "search"})
"""The known actions in a scope for the list of repositories. `docker search` requests `registry:catalog:search`. Both
actions grant the same access."""
_REPOSITORY_KIND: Final = re.compile(r"repository(\([a-z0-9]+\))?")
"""The first part of a scope for a repository. In `repository(plugin)`, `plugin` is a class of repositories, which this
registry ignores."""


@dataclass(frozen=True, slots=True)
class RequestedAccess:
    """The access that a client requests.

    - `actions`: the requested actions by repository name. The key `CATALOG` stands for the list of repositories.
    - `has_unknown_scopes`: whether the client sent scopes that this registry does not know. They grant nothing.
    """

    actions: Mapping[str, Action]
    has_unknown_scopes: bool = False

    @property
    def is_any_requested(self) -> bool:
        """Whether the client sent any scope, known or unknown."""
        return bool(self.actions) or self.has_unknown_scopes

    @property
    def is_pull_only(self) -> bool:
        """Whether the client requests to pull from one or more repositories, and requests nothing else."""
        names_only_repositories = bool(self.actions) and not self.has_unknown_scopes and CATALOG not in self.actions
        return names_only_repositories and all(actions == Action.PULL for actions in self.actions.values())


def parse_scopes(values: Iterable[str]) -> RequestedAccess:
    """Returns the access that a client requests. `values`: the values of all `scope` parameters of the request.
    Raises RequestInvalid for more than `MAX_SCOPES` scopes, for more than `MAX_NAMES` repositories, and for repository
    names with more than `MAX_NAME_CHARACTERS` characters in total."""
    requested_actions: dict[str, Action] = {}
    has_unknown_scopes = False
    name_characters = 0
    for scope in _split_scopes(values):
        name, actions = _parse_scope(scope)
        if not name:
            has_unknown_scopes = True
            continue
        if name not in requested_actions:
            name_characters += len(name)
        requested_actions[name] = requested_actions.get(name, Action.NONE) | actions
        if len(requested_actions) > MAX_NAMES or name_characters > MAX_NAME_CHARACTERS:
            raise RequestInvalid(
                f"a request for a token names at most {MAX_NAMES} repositories, and their names have at most "
                f"{MAX_NAME_CHARACTERS} characters in total"
            )
    return RequestedAccess(requested_actions, has_unknown_scopes)


def format_scopes(granted: Mapping[str, Action]) -> str:
    """Returns the scopes for the access that a token grants, separated by spaces. `granted`: the actions by repository
    name. The key `CATALOG` stands for the list of repositories."""
    return " ".join(
        f"{CATALOG}:*" if name == CATALOG else f"repository:{name}:{','.join((actions & CONTENT_ACTIONS).words)}"
        for name, actions in granted.items()
    )


def _split_scopes(values: Iterable[str]) -> list[str]:
    """Returns the scopes in the values of all `scope` parameters. Raises RequestInvalid for more than `MAX_SCOPES`."""
    scopes: list[str] = []
    for value in values:
        scopes += value.split(maxsplit=MAX_SCOPES)
        if len(scopes) > MAX_SCOPES:
            raise RequestInvalid(f"a request for a token has at most {MAX_SCOPES} scopes; send fewer")
    return scopes


def _parse_scope(scope: str) -> tuple[str, Action]:
    """Returns the name and the known actions in one scope. Returns an empty name and no action if the kind of the scope
    is unknown, its name is invalid, or it has no known action."""
    kind, _, name_and_actions = scope.partition(":")
    name, _, action_list = name_and_actions.rpartition(":")
    words = frozenset(action_list.split(","))  # a set, because a scope can repeat the same action thousands of times
    if scope.startswith(f"{CATALOG}:"):
        return (CATALOG, Action.PULL) if _CATALOG_ACTIONS.intersection(words) else ("", Action.NONE)
    if not _REPOSITORY_KIND.fullmatch(kind):
        return "", Action.NONE
    actions = Action.NONE
    for word in words & _ACTIONS.keys():
        actions |= _ACTIONS[word]
    try:
        return (RepositoryName(name), actions) if actions else ("", Action.NONE)
    except NameInvalid:
        return "", Action.NONE
