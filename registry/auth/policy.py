"""What the store's grants come to: from a proof to the principal it makes at this moment.

Grants only add up. A proof counts while the account is enabled and has not changed since, and while the API token it
came from is there. What is remembered of all this is good under one `epoch` of the accounts alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import reduce
from operator import or_
from typing import Final, Protocol

from registry.auth.authorization import REFUSED
from registry.auth.principal import Principal, Rights, open_principal
from registry.auth.proof import NOBODY, Proof
from registry.config import HUB, LIBRARY
from storage.access import EVERY_ACTION, AccountInvalid, AccountName, AccountUnknown, Action, Subject
from storage.access import SubjectKind as To
from storage.accounts import Accounts
from storage.errors import Unauthorized
from storage.patterns import NamePattern, Names

_ALONG: Final = (Action.PULL, Action.DELETE)
"""Actions that are asked for by one name and may mean content stored under another: a mirror's."""


class Standing(Protocol):
    """Whether what made a proof still stands (`registry.auth.standing`)."""

    def check(self, proof: Proof) -> Proof:
        """The proof, with what its API token is limited to now. Raises Unauthorized."""
        ...

    def stamped(self, proof: Proof) -> bool:
        """Whether what it rests on beside the store, of which no epoch tells, is still the same."""
        ...


class Policy:
    """The rights of everybody. `upstreams`: the names of those that are mirrored; `guarded`: of those that want a grant
    of their own. `closed`: accounts come from elsewhere as well, so there is no time without."""

    def __init__(
        self,
        accounts: Accounts,
        standing: Standing,
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

    @property
    def closed(self) -> bool:
        """Whether it takes an account, or a grant to everyone, to do anything. Once so, always."""
        self._closed = self._closed or self.accounts.closed()
        return self._closed

    def nobody(self) -> Principal:
        """Who acts without credentials."""
        return self.principal(NOBODY)

    def principal(self, proof: Proof) -> Principal:
        """Raises Unauthorized: what the proof was made of has changed or is gone. While the registry is open, whoever
        asks may do what everybody may."""
        if not self.closed:
            return self._open
        epoch = self.accounts.epoch()  # before the rights: what changes meanwhile is seen the next time
        held = self.standing.check(proof)
        rights = Rights.everything(admin=True) if self._is_admin(held) else self._rights(held)
        return Principal(held, rights, epoch=epoch)

    def renewed(self, principal: Principal) -> Principal:
        """What it is by now, if anything has changed since it was made. How long the credential counts is not looked
        at: what was begun in time may end. Raises Unauthorized."""
        proof = principal.proof
        if principal.epoch == self.accounts.epoch() and proof.stamp is None:
            return principal
        try:
            return self.principal(proof)
        except Unauthorized:
            raise Unauthorized(REFUSED) from None

    def allowed(self, proof: Proof, names: Iterable[str]) -> dict[str, Action]:
        """What a token for each of `names` can be granted. It is asked for by the name the client uses, of which a
        mirror's content is stored under another: so what is allowed on one of those counts, and each request is checked
        against the one it comes to. NONE where the proof counts no more."""
        try:
            principal = self.principal(proof)
        except Unauthorized:
            return dict.fromkeys(names, Action.NONE)
        return {name: self._allowed(principal, name) for name in names}

    def _allowed(self, principal: Principal, name: str) -> Action:
        found = reduce(or_, (action for action in EVERY_ACTION if principal.may(action, name)), Action.NONE)
        for action in _ALONG:
            if any(principal.may(action, stored, name) for stored in self._stored_names(name)):
                found |= action
        return found

    def _is_admin(self, proof: Proof) -> bool:
        """Only an account of the store can be one."""
        if proof.name is None or proof.version is None:
            return False
        try:
            return self.accounts.account(AccountName(proof.name)).admin
        except (AccountInvalid, AccountUnknown):
            return False

    def _rights(self, proof: Proof) -> Rights:
        patterns: dict[Action, set[NamePattern]] = defaultdict(set)
        for grant in self.accounts.grants(self._subjects(proof)):
            for action in EVERY_ACTION:
                if action in grant.actions:
                    patterns[action].add(grant.pattern)
        return Rights({action: Names(frozenset(found), self._guarded) for action, found in patterns.items()})

    def _subjects(self, proof: Proof) -> Sequence[Subject]:
        """Whose grants count."""
        subjects = [Subject(To.EVERYONE)]
        if proof.name is not None:
            groups = dict.fromkeys((*self.accounts.groups_of(proof.name), *proof.groups))
            subjects += [Subject(To.AUTHENTICATED), Subject(To.ROBOT if proof.robot else To.USER, proof.name)]
            subjects += [Subject(To.GROUP, group) for group in groups]
        return subjects

    def _stored_names(self, name: str) -> list[str]:
        """Names under which a mirror may keep what is asked for as `name`."""
        found = [f"{upstream}/{name}" for upstream in self._upstreams]
        if HUB in self._upstreams:
            short = name.removeprefix(f"{HUB}/")
            if "/" not in short:
                found.append(f"{HUB}/{LIBRARY}/{short}")
        return found
