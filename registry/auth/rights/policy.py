"""`Policy`: computes the rights of an identity from the grants in the store.

An identity is the account that a credential has proved, with the limits of the credential. A *principal* is an identity
with its rights. A grant allows a *grantee* (an account, a group, all accounts, or everyone) some actions on all
repositories whose names match a pattern. Grants only add rights; no grant takes rights away.

The *epoch* is a number in the store. It increases when any worker changes an account, a group, a grant or a signing
key, or revokes an API token. When the epoch has changed, this module computes rights again, from cached grants. The
*version* of the grants is another number in the store. It increases only when a grant changes. When the version has
changed, this module reads the grants from the store again. Grants are cached because an account can have thousands of
grants, and any account can change the epoch often, such as by revoking its own API tokens.

To save memory, all principals to which the same grants apply share one `Rights` object, even if the principals have
different epochs.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol
from weakref import WeakValueDictionary

from registry.auth.authorization_header import INVALID_CREDENTIALS
from registry.auth.rights.principal import ANONYMOUS, Identity, Principal, Rights, open_principal
from registry.config import Settings
from registry.config.auth_settings import has_external_logins
from registry.naming import NamingRules
from storage.access import AccountInvalid, AccountName, AccountUnknown, Action, Grant, Grantee, GranteeKind
from storage.accounts import Accounts
from storage.errors import Unauthorized
from storage.patterns import NamePattern, NameSet

_MIRRORED_ACTION_BITS: Final = (Action.PULL | Action.DELETE).value
"""The bits of the actions that clients can do on mirrored content: they can pull and delete it, but not push to it."""

_MAX_MERGED_GRANTS: Final = 200
"""If a grantee has at most this many grants, `Policy._merge` merges their patterns with those of other grantees. If a
grantee has more grants, `Policy._merge` uses the name sets of this grantee unchanged. Then all `Rights` objects that
include the grants of this grantee share these name sets."""
_GRANTS_PER_STEP: Final = 2_000
"""After reading this number of grants, `Policy.prepare` and `Policy.grants_on` let the event loop run other tasks."""
_GRANTEE_COST: Final = 20
"""Looking up one grantee takes as long as reading this many grants."""
_MAX_CACHED_GRANTS: Final = 100_000
"""The cache of grants is emptied when the number of its grants plus the number of its grantees exceeds this."""


@dataclass(frozen=True, slots=True, eq=False)
class GranteeGrants:
    """The grants of one grantee. Objects of this class are equal only if they are the same object, so a frozenset of
    such objects is a dictionary key that is fast to compare.

    - `names`: for each combination of actions, the granted repository names. An `Action` is a set of flags, such as
      `PULL | PUSH`.
    - `size`: the number of grants.
    """

    names: Mapping[Action, NameSet]
    size: int

    def has_patterns(self, patterns_by_actions: Mapping[Action, frozenset[NamePattern]]) -> bool:
        """Returns whether `patterns_by_actions` contains exactly the actions and patterns of these grants."""
        return {actions: names.patterns for actions, names in self.names.items()} == patterns_by_actions


class _CachedGrants(NamedTuple):
    """The cached `grants` of a grantee. `version` is the version of the store's grants at the last time when `grants`
    were read."""

    grants: GranteeGrants
    version: int


class IdentityCheck(Protocol):
    """Checks whether an identity is still valid. `registry.auth.revocation.RevocationCheck` implements this."""

    def check(self, identity: Identity) -> Identity:
        """Returns the identity with the current limits of its API token. Raises Unauthorized if the identity is not
        valid any more."""
        ...

    def is_stamp_current(self, identity: Identity) -> bool:
        """Returns whether the identity's source outside the store is unchanged: its line of the htpasswd file, or the
        settings of a token issuer or of the OpenID provider. The identity's *stamp* is a hash of this source. A change
        of the source does not change the epoch."""
        ...


class Policy:
    """Computes the rights of identities.

    The registry is *open* until the first account is added. If `is_closed`, it is never open. While the registry is
    open, every client may pull, push and delete everything except the content of the `guarded` upstreams. A closed
    registry never opens again: each request needs a grant, or the account of an admin, who may do everything.

    - `identity_check`: checks whether an identity is still valid.
    - `naming`: returns the stored names to which a requested name can lead. Mirrored content is stored under the name
      of its upstream, the registry that is mirrored: `ubuntu` as `docker.io/library/ubuntu`.
    - `guarded`: the names of the upstreams whose content needs grants that name the upstream. A grant for a pattern
      such as `**` does not apply to this content.
    - `is_closed`: whether the registry is closed even without accounts in the store, because the settings allow logins
      by an htpasswd file, by token issuers or at an OpenID provider.
    """

    def __init__(
        self,
        accounts: Accounts,
        identity_check: IdentityCheck,
        *,
        naming: NamingRules | None = None,
        guarded: Iterable[str] = (),
        is_closed: bool = False,
    ) -> None:
        self.accounts = accounts
        self.identity_check = identity_check
        self.naming = naming or NamingRules()
        self._guarded = frozenset(guarded)
        self._is_closed = is_closed
        self._open_principal = open_principal(self._guarded)
        self._cached_grants: dict[Grantee, _CachedGrants] = {}
        self._cached_count = 0
        """The number of cached grants, plus the number of grantees that they are cached for."""
        self._rights_by_grants: WeakValueDictionary[frozenset[GranteeGrants], Rights] = WeakValueDictionary()
        """The rights of living principals, by the grants that give these rights. Rights that no principal has any more
        disappear from this dictionary, so its size needs no limit."""

    @classmethod
    def from_settings(cls, settings: Settings, accounts: Accounts, identity_check: IdentityCheck) -> Policy:
        """Returns the policy of the server with these settings."""
        return cls(
            accounts,
            identity_check,
            naming=NamingRules.from_settings(settings),
            guarded=[upstream.name for upstream in settings.upstream if upstream.needs_upstream_grant],
            # If there are logins outside the store, a request needs a grant even while the store has no accounts.
            is_closed=has_external_logins(settings.auth, settings.issuer, settings.oidc.issuer),
        )

    @property
    def is_closed(self) -> bool:
        """Whether the registry is closed, as the class describes. Once true, this stays true."""
        self._is_closed = self._is_closed or self.accounts.has_had_account()
        return self._is_closed

    async def prepare(self, identity: Identity) -> None:
        """Reads and caches the grants that the method `principal` needs for this identity. Pauses now and then so that
        other tasks can run. Call this method before `principal`, which blocks the event loop while it reads grants that
        are not cached."""
        if not self.is_closed:
            return
        cost_since_pause = 0
        for grantee in self._grantees(identity):
            granted = self._grants_of(grantee, self.accounts.grants_version())
            cost_since_pause += _GRANTEE_COST + granted.size
            if cost_since_pause >= _GRANTS_PER_STEP:
                await asyncio.sleep(0)  # lets other tasks run
                cost_since_pause = 0
            if granted.size > _MAX_MERGED_GRANTS:
                for names in granted.names.values():
                    names.prepare()  # builds the matcher, which takes milliseconds
                    await asyncio.sleep(0)

    def anonymous(self) -> Principal:
        """Returns the principal of requests without a credential."""
        return self.principal(ANONYMOUS)

    def unchecked_principal(self, identity: Identity) -> Principal:
        """Returns the principal of an identity that no credential has proved, to show what an account may do. Does not
        check whether the identity is valid, such as whether the account is enabled."""
        if not self.is_closed:
            return self._open_principal
        rights = Rights.everything(admin=True) if self._is_admin(identity) else self._rights(identity)
        return Principal(identity, rights)

    async def grants_on(self, identity: Identity, stored_name: str, limit: int) -> list[Grant]:
        """Returns the grants by which an identity has rights on a repository, at most `limit` of them. Pauses now and
        then so that other tasks can run."""
        grants: list[Grant] = []
        for grantee in self._grantees(identity):
            after: str | None = None
            while len(grants) < limit:
                page = self.accounts.grant_page([grantee], after, _GRANTS_PER_STEP)
                grants += [grant for grant in page.items if self._applies(grant.pattern, stored_name)]
                await asyncio.sleep(0)
                if not page.more or not page.items:
                    break
                after = f"{page.items[-1].subject} {page.items[-1].pattern}"  # the key of the last grant
        return grants[:limit]

    def _applies(self, pattern: NamePattern, stored_name: str) -> bool:
        """Returns whether grants for `pattern` apply to a repository."""
        return stored_name.startswith(pattern.prefix) and stored_name in NameSet(frozenset({pattern}), self._guarded)

    def principal(self, identity: Identity, *, checked_epoch: int | None = None) -> Principal:
        """Returns the principal of an identity, with its current rights. While the registry is open, returns the one
        principal that all clients share.

        If the registry is closed, checks whether the identity is still valid, and raises Unauthorized if it is not.
        `checked_epoch` is the epoch at which the identity was last checked, or None if it was never checked. Skips the
        check if `checked_epoch` is still the current epoch and the identity's source outside the store is unchanged.
        """
        if not self.is_closed:
            return self._open_principal
        # The epoch is read before the rights. If the rights change between the two reads, the principal has an old
        # epoch, so the next request computes a new principal.
        epoch = self.accounts.epoch()
        is_checked = checked_epoch == epoch and self.identity_check.is_stamp_current(identity)
        current_identity = identity if is_checked else self.identity_check.check(identity)
        rights = Rights.everything(admin=True) if self._is_admin(current_identity) else self._rights(current_identity)
        return Principal(current_identity, rights, epoch=epoch)

    async def reevaluate(self, principal: Principal) -> Principal:
        """Returns a principal with the current rights: `principal` itself if its epoch is the current epoch and its
        identity has no stamp, otherwise a new principal. Raises Unauthorized if the identity is not valid
        any more. Does not check whether the credential has expired: a request that started before the expiry may
        finish."""
        identity = principal.identity
        if principal.epoch == self.accounts.epoch() and identity.stamp is None:
            return principal
        await self.prepare(identity)
        try:
            return self.principal(identity)
        except Unauthorized:
            raise Unauthorized(INVALID_CREDENTIALS) from None

    async def allowed_actions(self, identity: Identity, names: Iterable[str]) -> dict[str, Action]:
        """Returns the actions that a bearer token for `identity` can grant on each of the requested `names`.

        A requested name can lead to one of several stored names. The result contains an action if the action is allowed
        on any of these stored names. When a client later sends the token, `registry.auth.rights.guard` checks the
        rights on the stored name to which the request leads. Raises Unauthorized if the identity is not valid any more.
        """
        await self.prepare(identity)
        try:
            principal = self.principal(identity)
        except Unauthorized:
            raise Unauthorized(INVALID_CREDENTIALS) from None
        allowed_by_name = {}
        for name in names:
            if principal.is_slow_to_match:
                await asyncio.sleep(0)
            # The repository to which clients push under a name is stored under the same name.
            allowed_on_pushed = Action(principal.action_bits(stored_name=name, requested_name=name))
            allowed_by_name[name] = allowed_on_pushed | await self._allowed_on_mirrored(principal, name)
        return allowed_by_name

    async def _allowed_on_mirrored(self, principal: Principal, name: str) -> Action:
        """Returns the actions that are allowed on any of the mirrored repositories to which a request for `name` can
        lead. A request can name any upstream, in its Host header or query. `names_at_all_upstreams` returns a stored
        name for each upstream."""
        allowed_bits = 0
        for stored_name in self.naming.names_at_all_upstreams(name):
            if principal.is_slow_to_match:
                await asyncio.sleep(0)
            allowed_bits |= principal.action_bits(stored_name, name)
        return Action(allowed_bits & _MIRRORED_ACTION_BITS)

    def _is_admin(self, identity: Identity) -> bool:
        """Returns whether the identity's account is an admin. An account outside the store is never an admin."""
        if identity.name is None or identity.version is None:
            return False
        try:
            return self.accounts.account(AccountName(identity.name)).admin
        except (AccountInvalid, AccountUnknown):
            return False

    def _rights(self, identity: Identity) -> Rights:
        """Returns the rights that the grants give an identity. Returns the same object for all identities with the same
        grants."""
        version = self.accounts.grants_version()
        grants_of_each = (self._grants_of(grantee, version) for grantee in self._grantees(identity))
        grants = frozenset(granted for granted in grants_of_each if granted.size)
        rights = self._rights_by_grants.get(grants)
        if rights is None:
            rights = self._rights_by_grants[grants] = self._merge(grants)
        return rights

    def _merge(self, grants: Iterable[GranteeGrants]) -> Rights:
        """Returns the rights that the grants of several grantees give together. Merges the patterns of grantees with
        few grants, because one large set of patterns is faster to match than several small ones."""
        merged: defaultdict[Action, set[NamePattern]] = defaultdict(set)
        unmerged: list[tuple[Action, NameSet]] = []
        for granted in grants:
            if granted.size > _MAX_MERGED_GRANTS:
                unmerged += granted.names.items()
                continue
            for actions, names in granted.names.items():
                merged[actions] |= names.patterns
        merged_names = {actions: NameSet(frozenset(patterns), self._guarded) for actions, patterns in merged.items()}
        return Rights(merged_names, more_names=unmerged)

    def _grants_of(self, grantee: Grantee, version: int) -> GranteeGrants:
        """Returns the grants of a grantee. `version` is the current version of all grants. If the cached grants of the
        grantee were read at this version, returns them. Otherwise reads the grantee's grants again; if the grants are
        unchanged, returns the same object as before."""
        cached = self._cached_grants.get(grantee)
        if cached is not None and cached.version == version:
            return cached.grants
        patterns = self.accounts.patterns_by_actions([grantee])
        if cached is not None and cached.grants.has_patterns(patterns):
            self._cached_grants[grantee] = _CachedGrants(cached.grants, version)
            return cached.grants
        if self._cached_count > _MAX_CACHED_GRANTS:
            self._cached_grants, self._cached_count, cached = {}, 0, None
        names = {actions: NameSet(granted_patterns, self._guarded) for actions, granted_patterns in patterns.items()}
        grants = GranteeGrants(names, sum(map(len, patterns.values())))
        self._cached_grants[grantee] = _CachedGrants(grants, version)
        self._cached_count += grants.size + 1 - (0 if cached is None else cached.grants.size + 1)
        return grants

    def _grantees(self, identity: Identity) -> Sequence[Grantee]:
        """Returns the grantees whose grants apply to an identity: everyone, all accounts, the account itself, and its
        groups."""
        grantees = [Grantee(GranteeKind.EVERYONE)]
        if identity.name is not None:
            groups = dict.fromkeys((*self.accounts.groups_of(identity.name), *identity.groups))
            own_kind = GranteeKind.ROBOT if identity.robot else GranteeKind.USER
            grantees += [Grantee(GranteeKind.AUTHENTICATED), Grantee(own_kind, identity.name)]
            grantees += [Grantee(GranteeKind.GROUP, group) for group in groups]
        return grantees
