"""Who makes a request, and what they may do: identities, rights and principals.

- An `Identity` is what a credential proved: the account, and the limits of the credential.
- `Rights` are the actions that an account may do on each repository, as its grants say.
- A `Principal` joins an identity with the account's rights at one moment. Each request has one; `current_principal`
  returns it.

The *epoch* is a number in the store that increases with every change of accounts, groups, grants, signing keys and API
tokens. A principal remembers the epoch of its rights. Once the store has another epoch, `registry.auth.authenticators`
makes a new principal; `registry.auth.revocation_across_workers` describes this.
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
"""The key in `Identity.access` that stands for listing repositories (scope `registry:catalog:*`). It cannot be a
repository's name, because repository names contain no colon."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a credential proved: the account, and the limits of the credential.

    An identity stays valid while its account, its API token and its source stay unchanged. `registry.auth.revocation`
    checks this again after every change of the epoch.

    - `name`: the account's name. None: the request has no credential, or an anonymous bearer token.
    - `robot`: whether the account belongs to a program and not to a person.
    - `version`: the account's version when the credential was verified. None: the account is not in the store but in an
      htpasswd file, or there is no account.
    - `stamp`: a hash of the source outside the store that proved the identity: the account's line of the htpasswd file,
      or the settings of a token issuer or of the OpenID provider. None: the store alone proved it.
    - `token`: the id of the API token that logged in, or from which a bearer token was made. None: no API token.
    - `groups`: groups that an issuer or the OpenID provider named, in addition to the account's groups in the store.
    - `access`: the actions that a bearer token grants, by repository name. None: no bearer token limits the identity.
    - `limits`: the limits of the API token. None: no limits.
    - `expires`: when the credential expires, in seconds since 1970. None: never.
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

_MAX_CACHED_REPOSITORIES: Final = 64
"""The most repositories for which one principal caches the allowed actions. The number is small because a process may
hold a thousand principals: one for each token, and every client can get tokens."""
_SLOW_WEIGHT: Final = 8
"""A principal whose patterns weigh more than this is slow to match; `NameSet.match_cost` defines the weight."""
_CONTENT_ACTIONS: Final = (Action.PULL, Action.PUSH, Action.DELETE)
"""The actions on content. The remaining action, `ADMIN`, is the right to grant."""
_ALL_ACTIONS: Final = (*_CONTENT_ACTIONS, Action.ADMIN)
_EVERY_BIT: Final = EVERY_ACTION.value


@dataclass(frozen=True, slots=True)
class Rights:
    """The actions that an account, or an anonymous client, may do on repositories.

    - `names`: the repository names on which each combination of actions is allowed.
    - `admin`: whether the account may do everything, also to accounts and settings of the registry.
    - `more_names`: further pairs like those in `names`. A combination of actions may occur in several pairs.

    A *guarded* upstream is the first segment of mirrored names, such as `ghcr.io`, that needs grants of its own: the
    pattern `**` does not match below it, and `ghcr.io/**` does. All sets of names must have the same guarded upstreams,
    and no limits. Raises ValueError otherwise, because the union that `names_allowing` returns could then hold names
    that none of the sets holds.
    """

    names: Mapping[Action, NameSet]
    admin: bool = False
    more_names: Sequence[tuple[Action, NameSet]] = ()
    _bits_by_names: Mapping[NameSet, int] = field(init=False, repr=False, compare=False)
    """The bits of all actions that are allowed on the same set of names, so that a name is matched once per set."""

    def __post_init__(self) -> None:
        bits_by_names: dict[NameSet, int] = {}
        for actions, names in (*self.names.items(), *self.more_names):
            bits_by_names[names] = bits_by_names.get(names, 0) | actions.value
        if len({names.guarded for names in bits_by_names}) > 1 or any(n.limits is not None for n in bits_by_names):
            raise ValueError("the sets of names differ in their guarded upstreams, or have limits")
        object.__setattr__(self, "_bits_by_names", bits_by_names)

    @classmethod
    def everything(cls, guarded: Iterable[str] = (), *, admin: bool = False) -> Rights:
        """Returns the rights to pull, push and delete everywhere except below the `guarded` upstreams. With `admin`,
        the rights include granting rights to others, and everything else in the registry."""
        names = NameSet(ALL_NAMES.patterns, frozenset(guarded))
        return cls(dict.fromkeys(_ALL_ACTIONS if admin else _CONTENT_ACTIONS, names), admin)

    def names_allowing(self, action: Action) -> NameSet:
        """Returns the repository names on which `action` is allowed."""
        found = [names for actions, names in (*self.names.items(), *self.more_names) if action in actions]
        if len(found) <= 1:
            return found[0] if found else NO_NAMES
        # All sets have the same guarded upstreams (see the class), so those of the first set hold for the union.
        return NameSet(frozenset().union(*(names.patterns for names in found)), found[0].guarded)

    def action_bits(self, stored_name: str) -> int:
        """Returns the actions allowed on a repository, as the bits of an `Action`. The bits are a plain int because `|`
        of two `Action` values takes half a microsecond."""
        found = 0
        for names, bits in self._bits_by_names.items():
            if stored_name in names:
                found |= bits
        return found

    @property
    def weight(self) -> int:
        """The cost of matching one name; see `NameSet.match_cost`."""
        return sum(names.match_cost for names in self._bits_by_names)

    @property
    def actions_everywhere(self) -> int | None:
        """The result of `action_bits` if that is the same for every name. None: it depends on the name."""
        names, bits = next(iter(self._bits_by_names.items()), (NO_NAMES, 0))
        return bits if names.has_every_name and len(self._bits_by_names) == 1 else None


NO_RIGHTS: Final = Rights({})
"""The rights to do nothing."""


class Principal:
    """Who makes a request, and what they may do.

    - `name`: the account's name, or `anonymous`.
    - `is_anonymous`: whether the principal has no account.
    - `robot`: whether the account belongs to a program and not to a person.
    - `admin`: whether the principal may do everything, also to accounts. False if the credential has limits, even for
      an admin's account.
    - `expires`: when the credential expires, in seconds since 1970. None: never.
    - `open`: whether the registry has no accounts yet, so that every client may use it.
    - `epoch`: the epoch of the store when the rights were read. None: there is no store of accounts.
    - `is_admitted`: whether the client sent a valid credential, which may be an anonymous token, or needs none.

    A mirror stores content under another name than the client requests: `ubuntu` as `docker.io/library/ubuntu`. The
    methods take both names, because grants name the stored repository, and a bearer token names the requested one.
    """

    __slots__ = (
        "_everywhere",
        "_limits",
        "_listable_names",
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
        self._listable_names: NameSet | None = None
        self._limits = None if identity.limits is None else _matchers_by_actions(identity.limits)
        self._everywhere = rights.actions_everywhere if identity.limits is None and identity.access is None else None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    # Rights on one repository

    def actions(self, stored_name: str, requested_name: str) -> int:
        """Returns the actions allowed on a repository, as the bits of an `Action`. Caches the result."""
        if self._everywhere is not None:
            return self._everywhere
        key = (stored_name, requested_name)
        found = self._memo.get(key)
        if found is None:
            found = self.rights.action_bits(stored_name) & self._credential_bits(stored_name, requested_name)
            if len(self._memo) >= _MAX_CACHED_REPOSITORIES:
                self._memo.clear()
            self._memo[key] = found
        return found

    def may(self, action: Action, stored_name: str, requested_name: str | None = None) -> bool:
        """Returns whether every action in `action` is allowed on a repository. Without `requested_name`, the client
        requested the stored name."""
        wanted = action.value
        return self.actions(stored_name, stored_name if requested_name is None else requested_name) & wanted == wanted

    def account_may(self, action: Action, stored_name: str) -> bool:
        """Returns whether the account's rights allow `action`. The limits of this credential may still forbid it."""
        return self.rights.action_bits(stored_name) & action.value == action.value

    def _credential_bits(self, stored_name: str, requested_name: str) -> int:
        """Returns the bits of the actions that a bearer token's access and an API token's limits allow on a
        repository."""
        allowed = _EVERY_BIT
        access = self.identity.access
        if access is not None:
            allowed = access.get(requested_name, Action.NONE).value | access.get(stored_name, Action.NONE).value
        if self._limits is not None:
            allowed_by_limits = 0
            for actions, patterns in self._limits:
                if patterns.matcher.matches(stored_name):
                    allowed_by_limits |= actions
            allowed &= allowed_by_limits
        return allowed

    @property
    def is_slow_to_match(self) -> bool:
        """Whether matching one name may take a millisecond, because there are many patterns."""
        limits = 0 if self._limits is None else sum(patterns.matcher.match_cost for _, patterns in self._limits)
        return self.rights.weight + limits > _SLOW_WEIGHT

    # Rights on sets of repositories

    def names(self, action: Action) -> NameSet:
        """Returns every stored name on which `action` is allowed. With a bearer token, these are only
        repositories in its access whose requested and stored names are the same."""
        if self.identity.access is None:
            return self._names_without_access(action)
        granted = (name for name, actions in self.identity.access.items() if action in actions and _is_name(name))
        return NameSet.of(name for name in granted if self.may(action, name))

    @property
    def may_list(self) -> bool:
        """Whether the principal may list repositories. Any credential allows this, but a bearer token must have
        `CATALOG` in its access."""
        return self.is_admitted and (self.identity.access is None or CATALOG in self.identity.access)

    @property
    def listable_names(self) -> NameSet:
        """The names that a list of repositories shows: those that the account, within the API token's limits, may pull.
        The repositories in a bearer token's access do not limit the list."""
        if self._listable_names is None:
            self._listable_names = self._names_without_access(Action.PULL)
        return self._listable_names

    def _names_without_access(self, action: Action) -> NameSet:
        """Returns the names on which the account's rights and the API token's limits allow `action`. Ignores the access
        of a bearer token."""
        names = self.rights.names_allowing(action)
        if self.identity.limits is None:
            return names
        return names.limited_to(limit.pattern for limit in self.identity.limits if action in limit.actions)


def _matchers_by_actions(limits: Iterable[TokenLimit]) -> list[tuple[int, SharedMatcher]]:
    """Returns one matcher for all patterns that limit to the same actions, with the bits of those actions."""
    patterns: defaultdict[int, list[NamePattern]] = defaultdict(list)
    for limit in limits:
        patterns[limit.actions.value].append(limit.pattern)
    return [(actions, SharedMatcher(frozenset(found))) for actions, found in patterns.items()]


def _is_name(text: str) -> bool:
    """Returns whether `text` is a valid repository name, and not a pattern. A token's access names single
    repositories."""
    try:
        RepositoryName(text)
    except NameInvalid:
        return False
    return True


def open_principal(guarded: Iterable[str] = ()) -> Principal:
    """Returns the principal of every request while there are no accounts. It may pull, push and delete, except below
    the `guarded` upstreams (first segments of names), and may not grant."""
    return Principal(ANONYMOUS, Rights.everything(guarded), open=True)


UNPRIVILEGED: Final = Principal(ANONYMOUS, NO_RIGHTS)
"""A principal that may do nothing."""


def current_principal() -> Principal:
    """Returns the principal of the current request. Returns `UNPRIVILEGED` before the request is authenticated, and
    outside any request."""
    principal = current_request().principal
    return principal if type(principal) is Principal else UNPRIVILEGED
