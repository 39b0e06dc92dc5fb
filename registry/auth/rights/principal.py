"""Identities, rights and principals: the client that sends a request, and what this client may do.

- An `Identity` is the account that a credential has proved, with the limits of the credential.
- `Rights` are the actions that an account may do on each repository. They come from grants. A grant allows an account,
  a group or everyone some actions on all repositories whose names match a pattern.
- A `Principal` is an identity with the rights that its account has at one moment. Each request has a principal, which
  `current_principal` returns.

The *epoch* is a number in the store. It increases when an account, a group, a grant or a signing key changes, and when
an API token is revoked. A principal contains the epoch of its rights. When a request finds a newer epoch in the store,
`registry.auth.authenticators` makes a new principal.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from registry.client_addresses import visitor_key
from registry.request import current_request
from storage.access import EVERY_ACTION, Action, TokenLimit
from storage.content import Actor
from storage.errors import NameInvalid
from storage.names import RepositoryName
from storage.pattern_matcher import SharedMatcher
from storage.patterns import ALL_NAMES, NO_NAMES, NamePattern, NameSet

CATALOG: Final = "registry:catalog"
"""The key in `Identity.access` for the right to list repositories (scope `registry:catalog:*`). No repository has this
name, because repository names contain no colon."""


@dataclass(frozen=True, slots=True)
class Identity:
    """The account that a credential has proved, with the limits of the credential.

    An identity becomes invalid when its account, its API token, its signing key or its source outside the store (see
    `stamp`) changes. `registry.auth.revocation` checks this.

    - `name`: the account's name. None: the client sent no credential, or an anonymous bearer token.
    - `robot`: whether the account belongs to a program and not to a person.
    - `version`: the version of the account in the store when the credential was verified. It changes when the account
      is disabled or enabled, and when its password or its admin right changes. None: the store has no such account.
    - `stamp`: a hash of the source outside the store that proved the identity: the account's line of the htpasswd file,
      or the settings of a token issuer or of the OpenID provider. None: there is no such source.
    - `token`: the id of the API token that the client sent, or with which the client got its bearer token. None: no API
      token was used.
    - `key_id`: the id of the store's key that signed the bearer token. None: the client sent no bearer token that this
      registry issued.
    - `session`: the id of the login session of the browser that sent the request. None: there is none.
    - `groups`: groups that an issuer or the OpenID provider named, in addition to the account's groups in the store.
    - `access`: the actions that a bearer token grants. The keys are repository names and `CATALOG`. None: the client
      sent no bearer token that this registry issued.
    - `limits`: the limits of the API token. None: the token has no limits, or no API token was used.
    - `expires`: when the credential expires, in seconds since 1970. None: never.
    """

    name: str | None
    robot: bool = False
    version: int | None = None
    stamp: str | None = None
    token: str | None = None
    key_id: str | None = None
    session: str | None = None
    groups: tuple[str, ...] = ()
    access: Mapping[str, Action] | None = None
    limits: tuple[TokenLimit, ...] | None = None
    expires: float | None = None


ANONYMOUS: Final = Identity(None)
"""The identity of a client that sent no credential."""

_MAX_CACHED_REPOSITORIES: Final = 64
"""The largest number of repositories for which one principal caches the allowed actions. The number is small because
a process caches a thousand principals or more, one for each bearer token."""
_SLOW_MATCH_COST: Final = 8
"""A principal is slow to match if matching one name costs more than this, in the unit of `NameSet.match_cost`."""
_CONTENT_ACTIONS: Final = (Action.PULL, Action.PUSH, Action.DELETE)
"""The actions on content. The only other action is `ADMIN`, the right to give rights to others."""
_ALL_ACTIONS: Final = (*_CONTENT_ACTIONS, Action.ADMIN)
_ALL_ACTION_BITS: Final = EVERY_ACTION.value
"""The bits of all actions, as a plain int."""


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Rights:
    """The actions that an account, or an anonymous client, may do on repositories.

    - `names`: maps each combination of actions to the names of the repositories on which these actions are allowed.
    - `admin`: whether the account is an admin, who may also manage accounts, groups, grants and tokens.
    - `more_names`: more pairs of actions and names, like the items of `names`. Several pairs can have the same actions.

    An *upstream* is a remote registry that this registry mirrors. The stored names of mirrored repositories begin with
    the upstream's name, such as `ghcr.io`. Names below a *guarded* upstream match only patterns that begin with the
    upstream's name: `ghcr.io/**`, but not `**`.

    The constructor raises ValueError if the sets of names have different guarded upstreams, or if a set has limits
    (`NameSet.limits`), because `names_allowing` could not return a union of such sets.
    """

    names: Mapping[Action, NameSet]
    admin: bool = False
    more_names: Sequence[tuple[Action, NameSet]] = ()
    _bits_by_names: Mapping[NameSet, int] = field(init=False, repr=False, compare=False)
    """For each set of names, the bits of all actions that are allowed on it."""
    _unions: dict[Action, NameSet] = field(init=False, repr=False, compare=False)
    """Cache of the results of `names_allowing` that are unions of several sets."""

    def __post_init__(self) -> None:
        bits_by_names: dict[NameSet, int] = {}
        for actions, names in (*self.names.items(), *self.more_names):
            bits_by_names[names] = bits_by_names.get(names, 0) | actions.value
        if len({names.guarded for names in bits_by_names}) > 1 or any(
            names.limits is not None for names in bits_by_names
        ):
            raise ValueError("the sets of names differ in their guarded upstreams, or have limits")
        object.__setattr__(self, "_bits_by_names", bits_by_names)
        object.__setattr__(self, "_unions", {})

    @classmethod
    def everything(cls, guarded: Iterable[str] = (), *, admin: bool = False) -> Rights:
        """Returns the rights to pull, push and delete everywhere, except below the `guarded` upstreams. If `admin` is
        True, returns the rights of an admin, which include the right to give rights to others."""
        names = NameSet(ALL_NAMES.patterns, frozenset(guarded))
        return cls(dict.fromkeys(_ALL_ACTIONS if admin else _CONTENT_ACTIONS, names), admin)

    def names_allowing(self, action: Action) -> NameSet:
        """Returns the repository names on which `action` is allowed."""
        matching_sets = [names for actions, names in (*self.names.items(), *self.more_names) if action in actions]
        if len(matching_sets) <= 1:
            return matching_sets[0] if matching_sets else NO_NAMES
        if action not in self._unions:
            # All sets have the same guarded upstreams (see the class), so the union has those of the first set.
            patterns = frozenset().union(*(names.patterns for names in matching_sets))
            self._unions[action] = NameSet(patterns, matching_sets[0].guarded)
        return self._unions[action]

    def action_bits(self, stored_name: str) -> int:
        """Returns the actions allowed on a repository, as the bits of an `Action`: an int, because `|` of two `Action`
        values is slow. `stored_name` is the repository's name in the store."""
        allowed_bits = 0
        for names, bits in self._bits_by_names.items():
            if stored_name in names:
                allowed_bits |= bits
        return allowed_bits

    @property
    def match_cost(self) -> int:
        """The largest possible cost of matching a name against all sets of names, in the unit of
        `NameSet.match_cost`."""
        return sum(names.match_cost for names in self._bits_by_names)

    @property
    def actions_everywhere(self) -> int | None:
        """The result of `action_bits` if it is the same for all names. None: it can depend on the name."""
        names, bits = next(iter(self._bits_by_names.items()), (NO_NAMES, 0))
        return bits if names.has_every_name and len(self._bits_by_names) == 1 else None


NO_RIGHTS: Final = Rights({})
"""The rights to do nothing."""


class Principal:
    """The client that sends a request, with its rights.

    - `name`: the account's name, or `anonymous`.
    - `is_anonymous`: whether the client has no account.
    - `robot`: whether the account belongs to a program and not to a person.
    - `admin`: whether the client may do everything that an admin may. False for every bearer token and limited API
      token, even if the account is an admin's.
    - `expires`: when the credential expires, in seconds since 1970. None: never.
    - `is_registry_open`: whether the registry requires no login because it has no accounts yet.
    - `epoch`: the epoch of the store when the rights were read. None: the rights do not come from the store.
    - `is_admitted`: whether the client sent a valid credential, or the registry requires none. An anonymous bearer
      token is a valid credential.

    A mirrored repository can have two names. The *stored name* is its name in the store, such as
    `docker.io/library/ubuntu`. The *requested name* is its name in the client's request, such as `ubuntu`. Grants
    contain stored names. A bearer token contains the names that the client requested.
    """

    __slots__ = (
        "_actions_everywhere",
        "_cached_bits",
        "_limits",
        "_listable_names",
        "admin",
        "epoch",
        "expires",
        "identity",
        "is_admitted",
        "is_anonymous",
        "is_registry_open",
        "name",
        "rights",
        "robot",
    )

    def __init__(
        self,
        identity: Identity,
        rights: Rights,
        *,
        is_registry_open: bool = False,
        epoch: int | None = None,
    ) -> None:
        self.identity = identity
        self.rights = rights
        self.name = Actor().name if identity.name is None else identity.name  # `Actor().name` is `anonymous`
        self.is_anonymous = identity.name is None
        self.robot = identity.robot
        self.expires = identity.expires
        self.is_registry_open = is_registry_open
        self.epoch = epoch
        self.is_admitted = is_registry_open or identity.name is not None or identity.access is not None
        self.admin = rights.admin and identity.limits is None and identity.access is None
        self._cached_bits: dict[tuple[str, str], int] = {}
        """Results of `action_bits`, by its arguments."""
        self._listable_names: NameSet | None = None
        """The cached value of `listable_names`; None before its first use."""
        self._limits = None if identity.limits is None else _matchers_by_actions(identity.limits)
        """The limits of the API token in a form that is fast to match; None if there are none."""
        self._actions_everywhere = (
            rights.actions_everywhere if identity.limits is None and identity.access is None else None
        )
        """The result of `action_bits` if the result is the same for all names; None if it can depend on the name."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    def for_pages(self) -> Principal:
        """Returns a principal with the same rights for requests to the web pages (`registry.ui`). The pages admit every
        client, because they show anonymous clients what everyone may pull."""
        if self.is_admitted:
            return self
        principal = Principal(self.identity, self.rights, is_registry_open=self.is_registry_open, epoch=self.epoch)
        principal.is_admitted = True
        return principal

    def visitor_key_at(self, address: str) -> str:
        """Returns the key of the client's *visitor*, for limits that apply to each visitor. The visitor is the account;
        for an anonymous client, it is the network of the IP address `address`."""
        return visitor_key(None if self.is_anonymous else self.name, address)

    # Rights on one repository

    def action_bits(self, stored_name: str, requested_name: str) -> int:
        """Returns the actions allowed on a repository, as the bits of an `Action`, and caches them."""
        if self._actions_everywhere is not None:
            return self._actions_everywhere
        key = (stored_name, requested_name)
        allowed_bits = self._cached_bits.get(key)
        if allowed_bits is None:
            allowed_bits = self.rights.action_bits(stored_name) & self._credential_bits(stored_name, requested_name)
            if len(self._cached_bits) >= _MAX_CACHED_REPOSITORIES:
                self._cached_bits.clear()
            self._cached_bits[key] = allowed_bits
        return allowed_bits

    def may(self, action: Action, stored_name: str, requested_name: str | None = None) -> bool:
        """Returns whether every action in `action` is allowed on a repository. `requested_name`: None if it is the
        same as `stored_name`."""
        wanted_bits = action.value
        return (
            self.action_bits(stored_name, stored_name if requested_name is None else requested_name) & wanted_bits
            == wanted_bits
        )

    def account_may(self, action: Action, stored_name: str) -> bool:
        """Returns whether the account's rights allow `action` on a repository. Ignores the credential, which may allow
        less."""
        return self.rights.action_bits(stored_name) & action.value == action.value

    def _credential_bits(self, stored_name: str, requested_name: str) -> int:
        """Returns the bits of the actions that the credential allows on a repository. A bearer token allows the actions
        that its access contains for the stored or the requested name. An API token allows the actions that its limits
        allow. Ignores the rights of the account."""
        allowed = _ALL_ACTION_BITS
        access = self.identity.access
        if access is not None:
            allowed = access.get(requested_name, Action.NONE).value | access.get(stored_name, Action.NONE).value
        if self._limits is not None:
            allowed_by_limits = 0
            for actions, shared_matcher in self._limits:
                if shared_matcher.matcher.matches(stored_name):
                    allowed_by_limits |= actions
            allowed &= allowed_by_limits
        return allowed

    @property
    def is_slow_to_match(self) -> bool:
        """Whether matching one name can take a millisecond, because the rights and the limits have many patterns."""
        limits = self._limits or ()
        limits_cost = sum(shared_matcher.matcher.match_cost for _, shared_matcher in limits)
        return self.rights.match_cost + limits_cost > _SLOW_MATCH_COST

    # Rights on sets of repositories

    def names_allowing(self, action: Action) -> NameSet:
        """Returns the stored names on which `action` is allowed. With a bearer token, returns only those stored names
        that the token's access contains."""
        if self.identity.access is None:
            return self._names_ignoring_access(action)
        granted = (name for name, actions in self.identity.access.items() if action in actions and _is_valid_name(name))
        return NameSet.of(name for name in granted if self.may(action, name))

    @property
    def may_list(self) -> bool:
        """Whether the client may list repositories: it is admitted, and its bearer token, if it sent one, has `CATALOG`
        in its access."""
        return self.is_admitted and (self.identity.access is None or CATALOG in self.identity.access)

    @property
    def listable_names(self) -> NameSet:
        """The names that a list of repositories shows: the names on which the account's rights and the API token's
        limits allow pulls. Ignores the access of a bearer token."""
        if self._listable_names is None:
            self._listable_names = self._names_ignoring_access(Action.PULL)
        return self._listable_names

    def _names_ignoring_access(self, action: Action) -> NameSet:
        """Returns the names on which the account's rights and the API token's limits allow `action`. Ignores the access
        of a bearer token."""
        names = self.rights.names_allowing(action)
        if self.identity.limits is None:
            return names
        return names.limited_to(limit.pattern for limit in self.identity.limits if action in limit.actions)


def _matchers_by_actions(limits: Iterable[TokenLimit]) -> list[tuple[int, SharedMatcher]]:
    """Groups the limits by their actions. Returns one pair for each group: the bits of the actions, and a matcher for
    the patterns."""
    patterns_by_actions: defaultdict[int, list[NamePattern]] = defaultdict(list)
    for limit in limits:
        patterns_by_actions[limit.actions.value].append(limit.pattern)
    return [(actions, SharedMatcher(frozenset(patterns))) for actions, patterns in patterns_by_actions.items()]


def _is_valid_name(text: str) -> bool:
    """Returns whether `text` is a valid repository name."""
    try:
        RepositoryName(text)
    except NameInvalid:
        return False
    return True


def open_principal(guarded: Iterable[str] = ()) -> Principal:
    """Returns the principal of every request while the registry has no accounts. The principal may pull, push and
    delete, except below the `guarded` upstreams. It may not give rights to others."""
    return Principal(ANONYMOUS, Rights.everything(guarded), is_registry_open=True)


UNPRIVILEGED: Final = Principal(ANONYMOUS, NO_RIGHTS)
"""An anonymous principal that may do nothing."""


def current_principal() -> Principal:
    """Returns the principal of the current request. Returns `UNPRIVILEGED` before the request is authenticated, and
    outside any request."""
    principal = current_request().principal
    return principal if type(principal) is Principal else UNPRIVILEGED
