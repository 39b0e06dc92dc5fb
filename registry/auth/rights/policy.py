"""`Policy`: computes the principal of an identity from the grants in the store.

An identity is what a credential proved; a principal is an identity with its rights. A grant allows a *grantee* (an
account, a group, all accounts, or everyone) some actions on the repositories that a pattern matches. Grants only add
rights; no grant takes rights away.

The *epoch* is a number in the store that increases with every change of accounts, groups, grants, signing keys and API
tokens. Everything that this module caches is valid for one epoch, so it reads changed grants again, also those that
another worker changed.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple, Protocol

from registry.auth.authorization_header import REFUSED
from registry.auth.rights.principal import ANONYMOUS, Identity, Principal, Rights, open_principal
from registry.naming import NamingRules
from storage.access import AccountInvalid, AccountName, AccountUnknown, Action, Grantee, GranteeKind
from storage.accounts import Accounts
from storage.errors import Unauthorized
from storage.patterns import NamePattern, NameSet

_MIRRORED_ACTIONS: Final = (Action.PULL | Action.DELETE).value
"""Bits of the actions that apply to mirrored content, which is stored under another name than the client requests. A
push always stores under the requested name."""

_MANY_GRANTS: Final = 200
"""The name sets of a grantee with more grants than this are cached and used as they are. The patterns of grantees with
fewer grants are merged into one name set for each identity."""
_GRANTS_PER_STEP: Final = 2_000
"""The number of grants that are read before the event loop runs other tasks."""
_GRANTEE_COST: Final = 20
"""The time to look up one grantee, as the number of grants that can be read in that time."""
_MAX_CACHED_GRANTS: Final = 100_000
"""The cache of grants is emptied once it holds more grants than this."""


class GranteeGrants(NamedTuple):
    """The grants of one grantee. `names` holds the granted names by actions, `size` the number of grants."""

    names: Mapping[Action, NameSet]
    size: int


class IdentityCheck(Protocol):
    """Checks whether an identity is still valid. `registry.auth.revocation` implements this."""

    def check(self, identity: Identity) -> Identity:
        """Returns the identity with the current limits of its API token. Raises Unauthorized if the identity was
        revoked."""
        ...

    def is_stamp_current(self, identity: Identity) -> bool:
        """Returns whether the source of the identity outside the store is unchanged: the htpasswd file, or the settings
        of an issuer or of the OpenID provider. Such a change does not change the epoch."""
        ...


class Policy:
    """Decides what every identity may do.

    The registry is *open* while it has no accounts: then every client may do everything. After that it is closed.

    - `identity_check` checks whether an identity is still valid.
    - `naming` tells which stored names a requested name may lead to.
    - `guarded` holds the upstreams that need grants of their own: below them, a pattern such as `**` grants nothing.
    - `closed` means that accounts also come from outside the store, so the registry is never open.
    """

    def __init__(
        self,
        accounts: Accounts,
        identity_check: IdentityCheck,
        *,
        naming: NamingRules | None = None,
        guarded: Iterable[str] = (),
        closed: bool = False,
    ) -> None:
        self.accounts = accounts
        self.identity_check = identity_check
        self._naming = naming or NamingRules()
        self._guarded = frozenset(guarded)
        self._closed = closed
        self._open = open_principal(self._guarded)
        self._cached_grants: dict[Grantee, GranteeGrants] = {}
        self._cache_epoch: int | None = None
        self._cached_count = 0

    @property
    def closed(self) -> bool:
        """Whether a request needs a grant, to its account or to everyone. Once true, this stays true."""
        self._closed = self._closed or self.accounts.has_had_account()
        return self._closed

    async def prepare(self, identity: Identity) -> None:
        """Caches the grants that `principal` needs for this identity, and lets other tasks run in between. Call it
        before `principal`, which otherwise reads all grants at once and blocks the event loop."""
        if not self.closed:
            return
        read = 0
        for grantee in self._grantees(identity):
            granted = self._grants_of(grantee)
            read += _GRANTEE_COST + granted.size
            if read >= _GRANTS_PER_STEP:
                await asyncio.sleep(0)
                read = 0
            if granted.size > _MANY_GRANTS:
                for names in granted.names.values():
                    names.prepare()
                    await asyncio.sleep(0)

    def anonymous(self) -> Principal:
        """Returns the principal of requests without credentials."""
        return self.principal(ANONYMOUS)

    def principal(self, identity: Identity, *, checked_at: int | None = None) -> Principal:
        """Returns the principal of an identity, with its current rights. While the registry is open, returns the one
        principal that all clients share.

        `checked_at` is the epoch under which the identity was last checked; the check is skipped if that is still the
        current epoch. Raises Unauthorized if the identity is not valid any more.
        """
        if not self.closed:
            return self._open
        # The epoch is read before the rights: after a change in between, the next request computes the principal anew.
        epoch = self.accounts.epoch()
        is_checked = checked_at == epoch and self.identity_check.is_stamp_current(identity)
        current = identity if is_checked else self.identity_check.check(identity)
        rights = Rights.everything(admin=True) if self._is_admin(current) else self._rights(current)
        return Principal(current, rights, epoch=epoch)

    async def reevaluate(self, principal: Principal) -> Principal:
        """Returns the same principal if its rights are current, or else a new one with the current rights. Does not
        check whether the credential has expired meanwhile, so a request that began in time may finish. Raises
        Unauthorized if the identity is not valid any more."""
        identity = principal.identity
        if principal.epoch == self.accounts.epoch() and identity.stamp is None:
            return principal
        await self.prepare(identity)
        try:
            return self.principal(identity)
        except Unauthorized:
            raise Unauthorized(REFUSED) from None

    async def allowed(self, identity: Identity, names: Iterable[str]) -> dict[str, Action]:
        """Returns the actions that a token can be granted on each of the requested `names`.

        A requested name may lead to mirrored content under several stored names. The result has the actions that are
        allowed on any of these, because each request with the token is checked again for the one stored name. All
        actions are NONE if the identity is not valid any more.
        """
        await self.prepare(identity)
        try:
            principal = self.principal(identity)
        except Unauthorized:
            return dict.fromkeys(names, Action.NONE)
        found = {}
        for name in names:
            if principal.is_slow_to_match:
                await asyncio.sleep(0)
            found[name] = Action(principal.actions(name, name)) | await self._allowed_on_mirrored(principal, name)
        return found

    async def _allowed_on_mirrored(self, principal: Principal, name: str) -> Action:
        """Returns the actions allowed on any mirrored content that a request for `name` may lead to."""
        found = 0
        for stored_name in self._naming.possible_names(name):
            if principal.is_slow_to_match:
                await asyncio.sleep(0)
            found |= principal.actions(stored_name, name)
        return Action(found & _MIRRORED_ACTIONS)

    def _is_admin(self, identity: Identity) -> bool:
        """Returns whether the identity's account is an admin. An account outside the store never is."""
        if identity.name is None or identity.version is None:
            return False
        try:
            return self.accounts.account(AccountName(identity.name)).admin
        except (AccountInvalid, AccountUnknown):
            return False

    def _rights(self, identity: Identity) -> Rights:
        """Returns the rights of an identity. Merges the patterns of grantees with few grants, because matching one
        large set of patterns is faster than matching several small ones."""
        merged: defaultdict[Action, set[NamePattern]] = defaultdict(set)
        unmerged: list[tuple[Action, NameSet]] = []
        for grantee in self._grantees(identity):
            granted = self._grants_of(grantee)
            if granted.size > _MANY_GRANTS:
                unmerged += granted.names.items()
                continue
            for actions, names in granted.names.items():
                merged[actions] |= names.patterns
        merged_names = {actions: NameSet(frozenset(patterns), self._guarded) for actions, patterns in merged.items()}
        return Rights(merged_names, more_names=unmerged)

    def _grants_of(self, grantee: Grantee) -> GranteeGrants:
        """Returns the grants of a grantee. Caches them for one epoch, because most accounts have most grantees in
        common."""
        epoch = self.accounts.epoch()
        if epoch != self._cache_epoch or self._cached_count > _MAX_CACHED_GRANTS:
            self._cached_grants, self._cache_epoch, self._cached_count = {}, epoch, 0
        found = self._cached_grants.get(grantee)
        if found is None:
            patterns = self.accounts.patterns_by_actions([grantee])
            names = {actions: NameSet(granted, self._guarded) for actions, granted in patterns.items()}
            found = self._cached_grants[grantee] = GranteeGrants(names, sum(map(len, patterns.values())))
            self._cached_count += found.size + 1
        return found

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
