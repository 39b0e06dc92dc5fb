"""Identities, rights and principals.

An `Identity` is what a credential proved: whose it is, and what it is limited to. `Rights` are what an account may do.
A `Principal` is both together, at one moment: who acts and what they may do now. `current_principal` returns the one of
the current request; without a request, nothing is allowed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from registry.request import current_request
from storage.access import EVERY_ACTION, Action, TokenLimit
from storage.content import Actor
from storage.errors import NameInvalid
from storage.names import RepositoryName
from storage.pattern_matcher import SharedMatcher
from storage.patterns import ALL_NAMES, NO_NAMES, NamePattern, NameSet

CATALOG: Final = "registry:catalog"
"""The key in `Identity.access` that stands for listing repositories (scope `registry:catalog:*`). No repository has
this name, since repository names hold no colon."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a credential proved. It holds until what it rests on changes or is revoked; `registry.auth.rights.policy`
    checks that again after every change of the accounts.

    `name`: the account's; None for an anonymous token or no credential at all. `version`: the account's at that time;
    None for an account that is not in the store (htpasswd, an issuer). `stamp`: the version of such an account.
    `token`: the id of the API token that was shown, or from which the bearer token was made. `groups`: groups that an
    issuer or the OpenID provider asserts, in addition to the store's. `access`: the access of a bearer token, by
    repository name; None: everything. `limits`: what an API token is limited to; None: nothing. `expires`: seconds
    since 1970.
    """

    name: str | None
    robot: bool = False
    version: int | None = None
    stamp: str | None = None
    token: str | None = None
    groups: tuple[str, ...] = ()
    access: Mapping[str, Action] | None = None
    limits: tuple[TokenLimit, ...] | None = None
    expires: float | None = None


ANONYMOUS: Final = Identity(None)
"""The identity of a request without credentials."""

_MOST_CACHED: Final = 64
"""Repositories for which a principal caches its actions. A process may hold a thousand principals, one for each token,
and every client can get tokens."""
_SLOW_WEIGHT: Final = 8
"""Patterns with more weight than this make a principal slow."""
_CONTENT: Final = (Action.PULL, Action.PUSH, Action.DELETE)
_ACTIONS: Final = (*_CONTENT, Action.ADMIN)
_EVERY_BIT: Final = EVERY_ACTION.value


@dataclass(frozen=True, slots=True)
class Rights:
    """What an account, or an anonymous client, may do: names, by the actions that are allowed on them. `more`: further
    entries, which may repeat an action. `admin`: may do everything, beyond repositories as well."""

    names: Mapping[Action, NameSet]
    admin: bool = False
    more: Sequence[tuple[Action, NameSet]] = ()
    _alike: Mapping[NameSet, int] = field(init=False, repr=False, compare=False)
    """The bits of all actions that are allowed on the same set of names, so that a name is matched once per set."""

    def __post_init__(self) -> None:
        alike: dict[NameSet, int] = {}
        for actions, names in (*self.names.items(), *self.more):
            alike[names] = alike.get(names, 0) | actions.value
        object.__setattr__(self, "_alike", alike)

    @classmethod
    def everything(cls, guarded: Iterable[str] = (), *, admin: bool = False) -> Rights:
        """Returns every action on every name except those below the `guarded` first segments. Only with `admin` does
        that include the right to grant."""
        names = NameSet(ALL_NAMES.patterns, frozenset(guarded))
        return cls(dict.fromkeys(_ACTIONS if admin else _CONTENT, names), admin)

    def of(self, action: Action) -> NameSet:
        """Returns the names on which `action` is allowed."""
        found = [names for actions, names in (*self.names.items(), *self.more) if action in actions]
        if len(found) <= 1:
            return found[0] if found else NO_NAMES
        return NameSet(frozenset().union(*(names.patterns for names in found)), found[0].guarded)

    def at(self, name: str) -> int:
        """Returns the bits of the actions allowed on a stored name. Plain numbers, since each `|` of two `Action`s
        takes half a microsecond."""
        found = 0
        for names, bits in self._alike.items():
            if name in names:
                found |= bits
        return found

    @property
    def weight(self) -> int:
        """The cost of matching one name; see `NameSet.match_cost`."""
        return sum(names.match_cost for names in self._alike)

    @property
    def actions_everywhere(self) -> int | None:
        """The result of `at` where it is the same for every name; None: it depends on the name."""
        names, bits = next(iter(self._alike.items()), (NO_NAMES, 0))
        return bits if names.has_every_name and len(self._alike) == 1 else None


NO_RIGHTS: Final = Rights({})


class Principal:
    """Who acts, and what they may do.

    `name`: an account's, or `anonymous`; `is_anonymous`: no account acts. `admin`: may do everything, to accounts as
    well, without limits. `expires`: seconds since 1970. `open`: the registry has no accounts yet. `epoch`: that of the
    accounts when the rights were read; None without a store. `is_admitted`: a credential was shown, be it an anonymous
    token, or none is needed.

    Methods take names of two kinds: rights speak of the stored name, a bearer token's access of the name that the
    client requested.
    """

    __slots__ = (
        "_everywhere",
        "_limits",
        "_listed",
        "_memo",
        "admin",
        "epoch",
        "expires",
        "identity",
        "is_admitted",
        "is_anonymous",
        "name",
        "open",
        "rights",
        "robot",
    )

    def __init__(
        self,
        identity: Identity,
        rights: Rights,
        *,
        open: bool = False,
        epoch: int | None = None,
    ) -> None:
        self.identity = identity
        self.rights = rights
        self.name = Actor().name if identity.name is None else identity.name
        self.is_anonymous = identity.name is None
        self.robot = identity.robot
        self.expires = identity.expires
        self.open = open
        self.epoch = epoch
        self.is_admitted = open or identity.name is not None or identity.access is not None
        self.admin = rights.admin and identity.limits is None and identity.access is None
        self._memo: dict[tuple[str, str], int] = {}
        self._listed: NameSet | None = None
        self._limits = None if identity.limits is None else _by_actions(identity.limits)
        self._everywhere = rights.actions_everywhere if identity.limits is None and identity.access is None else None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    # One repository

    def actions(self, stored: str, asked: str) -> int:
        """Returns the bits of the actions allowed on the repository stored as `stored` and requested as `asked`. Cached
        where the result depends on the names."""
        if self._everywhere is not None:
            return self._everywhere
        key = (stored, asked)
        found = self._memo.get(key)
        if found is None:
            found = self.rights.at(stored) & self._left(stored, asked)
            if len(self._memo) >= _MOST_CACHED:
                self._memo.clear()
            self._memo[key] = found
        return found

    def may(self, action: Action, stored: str, asked: str | None = None) -> bool:
        """Returns whether all of `action` is allowed. `asked`: the requested name; None: the stored one."""
        wanted = action.value
        return self.actions(stored, stored if asked is None else asked) & wanted == wanted

    def entitled(self, action: Action, stored: str) -> bool:
        """Returns whether the account may do it, though perhaps not with this credential."""
        return self.rights.at(stored) & action.value == action.value

    def _left(self, stored: str, asked: str) -> int:
        """Returns the bits of the actions that the credential's access and limits leave."""
        left = _EVERY_BIT
        access = self.identity.access
        if access is not None:
            left = access.get(asked, Action.NONE).value | access.get(stored, Action.NONE).value
        if self._limits is not None:
            within = 0
            for actions, limiting in self._limits:
                if limiting.matcher.matches(stored):
                    within |= actions
            left &= within
        return left

    @property
    def slow(self) -> bool:
        """Whether there are so many patterns that matching one name may take a millisecond."""
        limits = 0 if self._limits is None else sum(limiting.matcher.match_cost for _, limiting in self._limits)
        return self.rights.weight + limits > _SLOW_WEIGHT

    # Many

    def names(self, action: Action) -> NameSet:
        """Returns every stored name on which `action` is allowed, for mounts from any repository. A bearer token
        reaches only the repositories in its access that are stored under the requested name."""
        if self.identity.access is None:
            return self._unscoped(action)
        granted = (name for name, actions in self.identity.access.items() if action in actions and _is_name(name))
        return NameSet.of(name for name in granted if self.may(action, name))

    @property
    def may_list(self) -> bool:
        """Whether it may list repositories: with any credential, but a bearer token needs the catalog in its
        access."""
        return self.is_admitted and (self.identity.access is None or CATALOG in self.identity.access)

    @property
    def listed(self) -> NameSet:
        """The names that such a list shows: those that may be pulled."""
        if self._listed is None:
            self._listed = self._unscoped(Action.PULL)
        return self._listed

    def _unscoped(self, action: Action) -> NameSet:
        """Returns the names on which `action` is allowed, whatever the bearer token's access is."""
        names = self.rights.of(action)
        if self.identity.limits is None:
            return names
        return names.limited_to(limit.pattern for limit in self.identity.limits if action in limit.actions)


def _by_actions(limits: Iterable[TokenLimit]) -> list[tuple[int, SharedMatcher]]:
    patterns: defaultdict[int, list[NamePattern]] = defaultdict(list)
    for limit in limits:
        patterns[limit.actions.value].append(limit.pattern)
    return [(actions, SharedMatcher(frozenset(found))) for actions, found in patterns.items()]


def _is_name(text: str) -> bool:
    """Returns whether `text` is a repository name. A pattern is none: a token's access holds exact names only."""
    try:
        RepositoryName(text)
    except NameInvalid:
        return False
    return True


def open_principal(guarded: Iterable[str] = ()) -> Principal:
    """Returns the principal of every request while there are no accounts: it may do everything to content, except
    below the `guarded` upstreams, and grants nothing."""
    return Principal(ANONYMOUS, Rights.everything(guarded), open=True)


UNPRIVILEGED: Final = Principal(ANONYMOUS, NO_RIGHTS)
"""A principal that may do nothing."""


def current_principal() -> Principal:
    """Returns the principal of the current request; `UNPRIVILEGED` without a request, or before it is
    authenticated."""
    principal = current_request().principal
    return principal if type(principal) is Principal else UNPRIVILEGED
