"""What the store's grants come to: from a proof to the principal it makes at this moment.

Grants only add up. A proof counts while the account is enabled and has not changed since, and while the API token it
came from is there. What is remembered of all this is good under one `epoch` of the accounts alone.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple, Protocol

from registry.auth.authorization_header import REFUSED
from registry.auth.rights.principal import ANONYMOUS, Identity, Principal, Rights, open_principal
from registry.config import DOCKER_HUB, HUB_LIBRARY
from storage.access import AccountInvalid, AccountName, AccountUnknown, Action, Grantee
from storage.access import GranteeKind as To
from storage.accounts import Accounts
from storage.errors import Unauthorized
from storage.patterns import NamePattern, NameSet

_MIRRORED_ACTIONS: Final = (Action.PULL | Action.DELETE).value
"""Bits of the actions that are asked for by one name and may mean content stored under another: a mirror's."""

_MANY_GRANTS: Final = 200
"""Grants of one subject that are more than a few."""
_GRANTS_PER_TURN: Final = 2_000
"""Grants that are read before others get their turn."""
_SUBJECT_COST: Final = 20
"""What a subject costs, in grants."""
_MOST_CACHED: Final = 100_000
"""Grants that are kept, about."""


class SubjectGrants(NamedTuple):
    """What a subject was granted: names by actions, and how many grants these are."""

    names: Mapping[Action, NameSet]
    size: int


class IdentityCheck(Protocol):
    """Whether what made a proof still stands (`registry.auth.revocation`)."""

    def check(self, proof: Identity) -> Identity:
        """The proof, with what its API token is limited to now. Raises Unauthorized."""
        ...

    def is_stamp_current(self, proof: Identity) -> bool:
        """Whether what it rests on beside the store, of which no epoch tells, is still the same."""
        ...


class Policy:
    """The rights of everybody. `upstreams`: the names of those that are mirrored; `guarded`: of those that want a grant
    of their own. `closed`: accounts come from elsewhere as well, so there is no time without."""

    def __init__(
        self,
        accounts: Accounts,
        standing: IdentityCheck,
        *,
        upstreams: Iterable[str] = (),
        guarded: Iterable[str] = (),
        closed: bool = False,
    ) -> None:
        self.accounts = accounts
        self.standing = standing
        self._upstreams = tuple(upstreams)
        self._guarded = frozenset(guarded)
        self._closed = closed
        self._open = open_principal(self._guarded)
        self._granted: dict[Grantee, SubjectGrants] = {}
        self._granted_at: int | None = None
        self._kept = 0

    @property
    def closed(self) -> bool:
        """Whether it takes an account, or a grant to everyone, to do anything. Once so, always."""
        self._closed = self._closed or self.accounts.closed()
        return self._closed

    async def prepare(self, proof: Identity) -> None:
        """Before `principal`, where others wait for the event loop: reads what that needs, and lets others go on
        between two subjects with many grants."""
        if not self.closed:
            return
        done = 0
        for subject in self._subjects(proof):
            granted = self._granted_to(subject)
            done += _SUBJECT_COST + granted.size
            if done >= _GRANTS_PER_TURN:
                await asyncio.sleep(0)
                done = 0
            if granted.size > _MANY_GRANTS:
                for names in granted.names.values():
                    names.prepare()
                    await asyncio.sleep(0)

    def nobody(self) -> Principal:
        """Who acts without credentials."""
        return self.principal(ANONYMOUS)

    def principal(self, proof: Identity, *, checked_at: int | None = None) -> Principal:
        """Raises Unauthorized: what the proof was made of has changed or is gone. While the registry is open, whoever
        asks may do what everybody may. `checked_at`: the epoch under which the proof was checked last."""
        if not self.closed:
            return self._open
        epoch = self.accounts.epoch()  # before the rights: what changes meanwhile is seen the next time
        is_checked = checked_at == epoch and self.standing.is_stamp_current(proof)
        held = proof if is_checked else self.standing.check(proof)
        rights = Rights.everything(admin=True) if self._is_admin(held) else self._rights(held)
        return Principal(held, rights, epoch=epoch)

    async def reevaluate(self, principal: Principal) -> Principal:
        """What it is by now, if anything has changed since it was made. How long the credential counts is not looked
        at: what was begun in time may end. Raises Unauthorized."""
        proof = principal.identity
        if principal.epoch == self.accounts.epoch() and proof.stamp is None:
            return principal
        await self.prepare(proof)
        try:
            return self.principal(proof)
        except Unauthorized:
            raise Unauthorized(REFUSED) from None

    async def allowed(self, proof: Identity, names: Iterable[str]) -> dict[str, Action]:
        """What a token for each of `names` can be granted. It is asked for by the name the client uses, of which a
        mirror's content is stored under another: so what is allowed on one of those counts, and each request is checked
        against the one it comes to. NONE where the proof counts no more."""
        await self.prepare(proof)
        try:
            principal = self.principal(proof)
        except Unauthorized:
            return dict.fromkeys(names, Action.NONE)
        found = {}
        for name in names:
            if principal.slow:
                await asyncio.sleep(0)
            found[name] = Action(principal.actions(name, name)) | await self._allowed_along(principal, name)
        return found

    async def _allowed_along(self, principal: Principal, name: str) -> Action:
        """Of content that a mirror may keep for that name."""
        found = 0
        for stored in self._stored_names(name):
            if principal.slow:
                await asyncio.sleep(0)
            found |= principal.actions(stored, name)
        return Action(found & _MIRRORED_ACTIONS)

    def _is_admin(self, proof: Identity) -> bool:
        """Only an account of the store can be one."""
        if proof.name is None or proof.version is None:
            return False
        try:
            return self.accounts.account(AccountName(proof.name)).admin
        except (AccountInvalid, AccountUnknown):
            return False

    def _rights(self, proof: Identity) -> Rights:
        """Those of subjects with few grants are put together, so that a name is looked at once."""
        few: defaultdict[Action, set[NamePattern]] = defaultdict(set)
        many: list[tuple[Action, NameSet]] = []
        for subject in self._subjects(proof):
            granted = self._granted_to(subject)
            if granted.size > _MANY_GRANTS:
                many += granted.names.items()
                continue
            for actions, names in granted.names.items():
                few[actions] |= names.patterns
        names_of = {actions: NameSet(frozenset(patterns), self._guarded) for actions, patterns in few.items()}
        return Rights(names_of, more=many)

    def _granted_to(self, subject: Grantee) -> SubjectGrants:
        """What a subject was granted. Kept while nothing changes: most accounts share most of theirs."""
        epoch = self.accounts.epoch()
        if epoch != self._granted_at or self._kept > _MOST_CACHED:
            self._granted, self._granted_at, self._kept = {}, epoch, 0
        found = self._granted.get(subject)
        if found is None:
            patterns = self.accounts.granted([subject])
            names = {actions: NameSet(these, self._guarded) for actions, these in patterns.items()}
            found = self._granted[subject] = SubjectGrants(names, sum(map(len, patterns.values())))
            self._kept += found.size + 1
        return found

    def _subjects(self, proof: Identity) -> Sequence[Grantee]:
        """Whose grants count."""
        subjects = [Grantee(To.EVERYONE)]
        if proof.name is not None:
            groups = dict.fromkeys((*self.accounts.groups_of(proof.name), *proof.groups))
            subjects += [Grantee(To.AUTHENTICATED), Grantee(To.ROBOT if proof.robot else To.USER, proof.name)]
            subjects += [Grantee(To.GROUP, group) for group in groups]
        return subjects

    def _stored_names(self, name: str) -> list[str]:
        """Names under which a mirror may keep what is asked for as `name`."""
        found = [f"{upstream}/{name}" for upstream in self._upstreams]
        if DOCKER_HUB in self._upstreams:
            short = name.removeprefix(f"{DOCKER_HUB}/")
            if "/" not in short:
                found.append(f"{DOCKER_HUB}/{HUB_LIBRARY}/{short}")
        return found
