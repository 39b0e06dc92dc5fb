"""`Policy`: computes the principal of an identity from the grants in the store.

Grants only add up. An identity counts while its account is enabled and unchanged, and while the API token it came from
exists. Everything cached here is valid for one epoch of the accounts.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple, Protocol

from registry.auth.authorization_header import REFUSED
from registry.auth.rights.principal import ANONYMOUS, Identity, Principal, Rights, open_principal
from registry.naming import NamingRules
from storage.access import AccountInvalid, AccountName, AccountUnknown, Action, Grantee
from storage.access import GranteeKind as To
from storage.accounts import Accounts
from storage.errors import Unauthorized
from storage.patterns import NamePattern, NameSet

_MIRRORED_ACTIONS: Final = (Action.PULL | Action.DELETE).value
"""Bits of the actions that a client requests under one name and that apply to mirrored content stored under another."""

_MANY_GRANTS: Final = 200
"""A grantee with more grants than this keeps name sets of its own; those of the others are merged."""
_GRANTS_PER_TURN: Final = 2_000
"""Grants that are read before the event loop runs other tasks."""
_GRANTEE_COST: Final = 20
"""The cost of one grantee, counted in grants."""
_MOST_CACHED: Final = 100_000
"""Grants that are cached, about."""


class GranteeGrants(NamedTuple):
    """The grants of one grantee: names by actions, and the number of grants."""

    names: Mapping[Action, NameSet]
    size: int


class IdentityCheck(Protocol):
    """Checks whether an identity still holds (`registry.auth.revocation`)."""

    def check(self, proof: Identity) -> Identity:
        """Returns the identity, with the limits that its API token has now. Raises Unauthorized: it was revoked."""
        ...

    def is_stamp_current(self, proof: Identity) -> bool:
        """Returns whether its source outside the store, which no epoch covers, is unchanged."""
        ...


class Policy:
    """Decides what every identity may do. `naming`: which stored names a requested name may lead to. `guarded`: the
    upstreams that need a grant of their own. `closed`: accounts also come from outside the store, so the registry is
    never open."""

    def __init__(
        self,
        accounts: Accounts,
        standing: IdentityCheck,
        *,
        naming: NamingRules | None = None,
        guarded: Iterable[str] = (),
        closed: bool = False,
    ) -> None:
        self.accounts = accounts
        self.standing = standing
        self._naming = naming or NamingRules()
        self._guarded = frozenset(guarded)
        self._closed = closed
        self._open = open_principal(self._guarded)
        self._granted: dict[Grantee, GranteeGrants] = {}
        self._granted_at: int | None = None
        self._kept = 0

    @property
    def closed(self) -> bool:
        """Whether requests need an account, or a grant to everyone. Once true, it stays true."""
        self._closed = self._closed or self.accounts.has_had_account()
        return self._closed

    async def prepare(self, proof: Identity) -> None:
        """Reads what `principal` needs for this identity, and lets other tasks run between grantees with many grants.
        Without it, `principal` would block the event loop for longer."""
        if not self.closed:
            return
        read = 0
        for grantee in self._grantees(proof):
            granted = self._granted_to(grantee)
            read += _GRANTEE_COST + granted.size
            if read >= _GRANTS_PER_TURN:
                await asyncio.sleep(0)
                read = 0
            if granted.size > _MANY_GRANTS:
                for names in granted.names.values():
                    names.prepare()
                    await asyncio.sleep(0)

    def anonymous(self) -> Principal:
        """Returns the principal of requests without credentials."""
        return self.principal(ANONYMOUS)

    def principal(self, proof: Identity, *, checked_at: int | None = None) -> Principal:
        """Returns the principal of an identity. While the registry is open, that of everybody. `checked_at`: the epoch
        under which the identity was checked last. Raises Unauthorized: what the identity rests on has changed or was
        revoked."""
        if not self.closed:
            return self._open
        epoch = self.accounts.epoch()  # read before the rights, so that a change meanwhile is noticed the next time
        is_checked = checked_at == epoch and self.standing.is_stamp_current(proof)
        held = proof if is_checked else self.standing.check(proof)
        rights = Rights.everything(admin=True) if self._is_admin(held) else self._rights(held)
        return Principal(held, rights, epoch=epoch)

    async def reevaluate(self, principal: Principal) -> Principal:
        """Returns the principal with the rights of now. Does not check whether the credential has expired: a request
        that began in time may finish. Raises Unauthorized."""
        proof = principal.identity
        if principal.epoch == self.accounts.epoch() and proof.stamp is None:
            return principal
        await self.prepare(proof)
        try:
            return self.principal(proof)
        except Unauthorized:
            raise Unauthorized(REFUSED) from None

    async def allowed(self, proof: Identity, names: Iterable[str]) -> dict[str, Action]:
        """Returns the actions that a token can be granted, by each of the requested `names`. Mirrored content is stored
        under other names than the requested one: an action on any of those can be granted, since each request is
        checked against the stored name it leads to. NONE for an identity that was revoked."""
        await self.prepare(proof)
        try:
            principal = self.principal(proof)
        except Unauthorized:
            return dict.fromkeys(names, Action.NONE)
        found = {}
        for name in names:
            if principal.slow:
                await asyncio.sleep(0)
            found[name] = Action(principal.actions(name, name)) | await self._allowed_on_mirrored(principal, name)
        return found

    async def _allowed_on_mirrored(self, principal: Principal, name: str) -> Action:
        """Returns the actions allowed on mirrored content that a request for `name` may lead to."""
        found = 0
        for stored in self._naming.possible_names(name):
            if principal.slow:
                await asyncio.sleep(0)
            found |= principal.actions(stored, name)
        return Action(found & _MIRRORED_ACTIONS)

    def _is_admin(self, proof: Identity) -> bool:
        """Returns whether the account is an admin. Only accounts in the store can be."""
        if proof.name is None or proof.version is None:
            return False
        try:
            return self.accounts.account(AccountName(proof.name)).admin
        except (AccountInvalid, AccountUnknown):
            return False

    def _rights(self, proof: Identity) -> Rights:
        """Returns the rights of an identity. Grants of grantees with few are merged, so that a name is matched once."""
        few: defaultdict[Action, set[NamePattern]] = defaultdict(set)
        many: list[tuple[Action, NameSet]] = []
        for grantee in self._grantees(proof):
            granted = self._granted_to(grantee)
            if granted.size > _MANY_GRANTS:
                many += granted.names.items()
                continue
            for actions, names in granted.names.items():
                few[actions] |= names.patterns
        names_of = {actions: NameSet(frozenset(patterns), self._guarded) for actions, patterns in few.items()}
        return Rights(names_of, more=many)

    def _granted_to(self, grantee: Grantee) -> GranteeGrants:
        """Returns a grantee's grants. Cached for one epoch, since most accounts share most of their grantees."""
        epoch = self.accounts.epoch()
        if epoch != self._granted_at or self._kept > _MOST_CACHED:
            self._granted, self._granted_at, self._kept = {}, epoch, 0
        found = self._granted.get(grantee)
        if found is None:
            patterns = self.accounts.patterns_by_actions([grantee])
            names = {actions: NameSet(these, self._guarded) for actions, these in patterns.items()}
            found = self._granted[grantee] = GranteeGrants(names, sum(map(len, patterns.values())))
            self._kept += found.size + 1
        return found

    def _grantees(self, proof: Identity) -> Sequence[Grantee]:
        """Returns the grantees whose grants apply to an identity."""
        grantees = [Grantee(To.EVERYONE)]
        if proof.name is not None:
            groups = dict.fromkeys((*self.accounts.groups_of(proof.name), *proof.groups))
            grantees += [Grantee(To.AUTHENTICATED), Grantee(To.ROBOT if proof.robot else To.USER, proof.name)]
            grantees += [Grantee(To.GROUP, group) for group in groups]
        return grantees
