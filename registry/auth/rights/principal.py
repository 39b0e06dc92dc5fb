"""What a credential proved: who holds it, and what it is limited to. Not yet what they may do.

Who acts, and what they may do at this moment.

The principal of a request is in the context variable `PRINCIPAL`. Where none was put there, nothing is allowed: who
forgets to ask gets nowhere.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Final

from storage.access import EVERY_ACTION, Action, TokenLimit
from storage.content import Actor
from storage.errors import NameInvalid
from storage.names import RepositoryName
from storage.pattern_matcher import SharedMatcher
from storage.patterns import ALL_NAMES, NO_NAMES, NamePattern, NameSet

CATALOG: Final = "registry:catalog"
"""In `access`, with any action: the right to list repositories (scope `registry:catalog:*`). No repository is called
that: their names hold no colon."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Holds as long as `stands` of what made it; `registry.auth.rights.policy` asks that anew after every change.

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
    limits: tuple[TokenLimit, ...] | None = None
    expires: float | None = None


ANONYMOUS: Final = Identity(None)
"""Nothing was shown."""


_MOST_CACHED: Final = 64
"""Repositories for which a principal's actions are kept, at the most. There may be a thousand principals, one for each
token that anybody can have."""
_SLOW_WEIGHT: Final = 8
"""The weight of patterns that make a principal slow."""
_CONTENT: Final = (Action.PULL, Action.PUSH, Action.DELETE)
_ACTIONS: Final = (*_CONTENT, Action.ADMIN)
_EVERY_BIT: Final = EVERY_ACTION.value


@dataclass(frozen=True, slots=True)
class Rights:
    """What an account may do, or nobody: names by the actions that are allowed on them; several entries may have the
    same action. `admin`: may do everything, also beside repositories. `more`: further entries."""

    names: Mapping[Action, NameSet]
    admin: bool = False
    more: Sequence[tuple[Action, NameSet]] = ()
    _alike: Mapping[NameSet, int] = field(init=False, repr=False, compare=False)
    """The bits of all actions that are allowed on the same names: most rights are, and a name is looked at once."""

    def __post_init__(self) -> None:
        alike: dict[NameSet, int] = {}
        for actions, names in (*self.names.items(), *self.more):
            alike[names] = alike.get(names, 0) | actions.value
        object.__setattr__(self, "_alike", alike)

    @classmethod
    def everything(cls, guarded: Iterable[str] = (), *, admin: bool = False) -> Rights:
        """Every action on every name, except below `guarded` first segments; the right to grant with `admin` alone."""
        names = NameSet(ALL_NAMES.patterns, frozenset(guarded))
        return cls(dict.fromkeys(_ACTIONS if admin else _CONTENT, names), admin)

    def of(self, action: Action) -> NameSet:
        found = [names for actions, names in (*self.names.items(), *self.more) if action in actions]
        if len(found) <= 1:
            return found[0] if found else NO_NAMES
        return NameSet(frozenset().union(*(names.patterns for names in found)), found[0].guarded)

    def at(self, name: str) -> int:
        """Bits of the actions allowed on a stored name. Plain numbers: each `|` of two actions takes half a
        microsecond, and a store has more repositories than those for which the outcome is remembered."""
        found = 0
        for names, bits in self._alike.items():
            if name in names:
                found |= bits
        return found

    @property
    def weight(self) -> int:
        """See `NameSet.weight`."""
        return sum(names.weight for names in self._alike)

    @property
    def actions_everywhere(self) -> int | None:
        """What `at` gives for every name; None: that depends on the name."""
        names, bits = next(iter(self._alike.items()), (NO_NAMES, 0))
        return bits if names.everything and len(self._alike) == 1 else None


NO_RIGHTS: Final = Rights({})


class Principal:
    """Who acts. `name` is that of an account, or `anonymous`; `nobody` says that no account is behind it. `admin`: may
    do everything, to accounts as well, and is limited in nothing. `expires` (seconds since 1970): it counts until then.
    `open`: there are no accounts here yet. `epoch`: the accounts' when its rights were read; None: of no store.
    `is_admitted`: has shown something, be it the token that anybody gets.

    Names are of two kinds: rights speak of the stored name, what a token was granted of the one the client asked by.
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
        "name",
        "nobody",
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
        self.nobody = identity.name is None
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
        """Bits of `Action`: what may be done to the repository of that stored name, when asked for by the other.
        Remembered where it depends on the names, so that a request costs one look."""
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
        """Whether all of `action` is allowed. `asked`: None: by its stored name."""
        wanted = action.value
        return self.actions(stored, stored if asked is None else asked) & wanted == wanted

    def entitled(self, action: Action, stored: str) -> bool:
        """Whether the account may, if perhaps not with this credential."""
        return self.rights.at(stored) & action.value == action.value

    def _left(self, stored: str, asked: str) -> int:
        """Bits of what the credential's limits leave."""
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
        """There are so many patterns that a look at a name may take a millisecond."""
        limits = 0 if self._limits is None else sum(limiting.matcher.weight for _, limiting in self._limits)
        return self.rights.weight + limits > _SLOW_WEIGHT

    # Many

    def names(self, action: Action) -> NameSet:
        """Every stored name on which `action` is allowed: for mounts from anywhere. A token that was granted access to
        some repositories reaches those alone, where they are stored under the names it has for them."""
        if self.identity.access is None:
            return self._unscoped(action)
        granted = (name for name, actions in self.identity.access.items() if action in actions and _is_name(name))
        return NameSet.of(name for name in granted if self.may(action, name))

    @property
    def may_list(self) -> bool:
        """Whether it gets a list of repositories: everybody who is let in; a token if it was granted the catalog."""
        return self.is_admitted and (self.identity.access is None or CATALOG in self.identity.access)

    @property
    def listed(self) -> NameSet:
        """The names that such a list shows: all that may be pulled."""
        if self._listed is None:
            self._listed = self._unscoped(Action.PULL)
        return self._listed

    def _unscoped(self, action: Action) -> NameSet:
        """The names regardless of what a token was granted."""
        names = self.rights.of(action)
        if self.identity.limits is None:
            return names
        return names.limited(limit.pattern for limit in self.identity.limits if action in limit.actions)


def _by_actions(limits: Iterable[TokenLimit]) -> list[tuple[int, SharedMatcher]]:
    patterns: defaultdict[int, list[NamePattern]] = defaultdict(list)
    for limit in limits:
        patterns[limit.actions.value].append(limit.pattern)
    return [(actions, SharedMatcher(frozenset(found))) for actions, found in patterns.items()]


def _is_name(text: str) -> bool:
    """A pattern is none: what a token was granted is never taken for one."""
    try:
        RepositoryName(text)
    except NameInvalid:
        return False
    return True


def open_principal(guarded: Iterable[str] = ()) -> Principal:
    """Who acts while there are no accounts: everybody may do everything to content, except below `guarded` upstreams;
    nobody grants anything."""
    return Principal(ANONYMOUS, Rights.everything(guarded), open=True)


OPEN_PRINCIPAL: Final = open_principal()
UNPRIVILEGED: Final = Principal(ANONYMOUS, NO_RIGHTS)
"""May do nothing."""

PRINCIPAL: ContextVar[Principal] = ContextVar("principal", default=UNPRIVILEGED)
"""Who acts in the request being answered here."""
REQUESTED_NAME: ContextVar[str] = ContextVar("asked", default="")
"""The repository's name as the client of that request wrote it, which is what its token's access speaks of; empty: the
name that the registry is called with."""
