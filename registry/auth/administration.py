"""What is done to accounts, groups, grants, API tokens and keys: the same for the commands and for the API.

Who may do it is not asked here (`registry.auth.authority`). Passwords come in the clear and go on as hashes; a secret
that is made here is given back once and kept nowhere. Every change takes `by`, for the audit log. All raise
AccountInvalid, AccountUnknown, AccountExists, LastAdmin, StorageFull, StorageFailed.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from registry.auth import api_tokens, signing
from registry.auth.passwords import check_password
from registry.auth.reading import check_note
from storage.access import (
    Account,
    AccountInvalid,
    AccountName,
    AccountUnknown,
    ApiToken,
    AuditEntry,
    AuditQuery,
    Grant,
    Kind,
    Limit,
    SigningKey,
    Subject,
    SubjectKind,
)
from storage.accounts import Accounts
from storage.content import Actor, Page
from storage.patterns import NamePattern

PAGE = 1000
LONGEST_LIFE = 36525 * 86400.0
"""Seconds until a token expires, the most: no calendar has a date for all that can be written."""
_LETTERS = "abcdefghjkmnpqrstuvwxyz123456789"
"""32 of them, so that a byte's remainder prefers none."""
Group = tuple[AccountName, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Added:
    """`password`: the one that was made, if one was. `first`: this account closed the registry."""

    account: Account
    password: str | None
    first: bool


class Administration:
    """The operations over `accounts`. `hash_password` raises TooManyRequests where too many wait for it."""

    def __init__(
        self,
        accounts: Accounts,
        hash_password: Callable[[str], Awaitable[str]],
        *,
        clock: Callable[[], float],
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self.accounts = accounts
        self._hash_password = hash_password
        self._clock = clock
        self._random = random

    # Users and robots

    def find(self, name: AccountName, kind: Kind) -> Account:
        """Raises AccountUnknown, also where the name is one of the other kind."""
        account = self.accounts.account(name)
        if account.kind is not kind:
            raise AccountUnknown(f"{name} is a {account.kind}, not a {kind}")
        return account

    async def add_user(
        self, name: AccountName, password: str | None, *, admin: bool = False, note: str = "", by: Actor
    ) -> Added:
        """`password` None: one is made."""
        check_note(note)
        chosen = self._make_password() if password is None else password
        hashed = await self._hashed(name, chosen)
        first = not self.accounts.closed()
        account = await self.accounts.add_account(name, Kind.USER, password_hash=hashed, admin=admin, note=note, by=by)
        return Added(account, chosen if password is None else None, first)

    async def add_robot(self, name: AccountName, *, note: str = "", by: Actor) -> Added:
        check_note(note)
        first = not self.accounts.closed()
        account = await self.accounts.add_account(name, Kind.ROBOT, password_hash=None, note=note, by=by)
        return Added(account, None, first)

    async def set_password(self, name: AccountName, password: str | None, *, by: Actor) -> str | None:
        """`password` None: one is made, and given back."""
        self.find(name, Kind.USER)
        chosen = self._make_password() if password is None else password
        await self.accounts.set_password(name, await self._hashed(name, chosen), by=by)
        return chosen if password is None else None

    async def _hashed(self, name: AccountName, password: str) -> str:
        check_password(password)
        if password.lower() == name:
            raise AccountInvalid("the password is the account's name")
        return await self._hash_password(password)

    def _make_password(self) -> str:
        """`k7q2m-…`: 100 random bits, in letters that are not mistaken for each other."""
        letters = "".join(_LETTERS[byte % len(_LETTERS)] for byte in self._random(20))
        return "-".join(letters[at : at + 5] for at in range(0, 20, 5))

    async def set_enabled(
        self, name: AccountName, kind: Kind, enabled: bool, *, force: bool = False, by: Actor
    ) -> None:
        """Raises LastAdmin, unless forced."""
        self.find(name, kind)
        await self.accounts.set_enabled(name, enabled, keep_admin=not force, by=by)

    async def set_admin(self, name: AccountName, admin: bool, *, force: bool = False, by: Actor) -> None:
        """Raises LastAdmin, unless forced."""
        self.find(name, Kind.USER)
        await self.accounts.set_admin(name, admin, keep_admin=not force, by=by)

    async def remove(self, name: AccountName, kind: Kind, *, force: bool = False, by: Actor) -> None:
        """Raises LastAdmin, unless forced."""
        self.find(name, kind)
        await self.accounts.remove_account(name, keep_admin=not force, by=by)

    # Groups

    def group(self, name: AccountName) -> Group:
        """Raises AccountUnknown."""
        return self.accounts.group(name)

    def all_groups(self) -> Iterator[Group]:
        after = None
        while True:
            page = self.accounts.groups(after, PAGE)
            yield from page.items
            if not page.more:
                return
            after = page.items[-1][0]

    def is_known(self, name: AccountName) -> bool:
        """Whether an account has that name; one from htpasswd or an issuer has none here."""
        try:
            self.accounts.account(name)
        except AccountUnknown:
            return False
        return True

    # Grants

    def grants_for(self, name: str, groups: Iterable[str] = ()) -> list[Grant]:
        """All that `name` has: its own, its groups', every account's, everybody's. `groups`: more that it is in, as an
        issuer says."""
        return self.accounts.grants(self.subjects_of(name, groups))

    def subjects_of(self, name: str, groups: Iterable[str] = ()) -> list[Subject]:
        """Whose grants count for `name`."""
        subjects = [Subject(SubjectKind.USER, name), Subject(SubjectKind.ROBOT, name)]
        members = dict.fromkeys((*self.accounts.groups_of(name), *groups))
        subjects += [Subject(SubjectKind.GROUP, group) for group in members]
        return [*subjects, Subject(SubjectKind.AUTHENTICATED), Subject(SubjectKind.EVERYONE)]

    async def put_grants(self, grants: Sequence[Grant], *, by: Actor) -> None:
        for grant in grants:
            await self.accounts.put_grant(grant, by=by)

    async def remove_grant(self, subject: Subject, pattern: NamePattern, *, by: Actor) -> None:
        await self.accounts.remove_grant(subject, pattern, by=by)

    # API tokens

    async def add_token(
        self,
        account: AccountName,
        *,
        note: str = "",
        expires_in: float | None = None,
        limits: Sequence[Limit] = (),
        by: Actor,
    ) -> tuple[ApiToken, str]:
        """The token, and what its holder is told once. `expires_in`: seconds from now; None: it never does."""
        check_note(note)
        if expires_in is not None and expires_in <= 0:
            raise AccountInvalid("a token that has expired already is of no use; give a time like 90d")
        if expires_in is not None and expires_in > LONGEST_LIFE:
            raise AccountInvalid("a token expires within a hundred years; give no time for one that never does")
        self.accounts.account(account)
        now = self._clock()
        made = api_tokens.make(
            account,
            now=now,
            note=note,
            expires=None if expires_in is None else now + expires_in,
            limits=tuple(limits) or None,
            random=self._random,
        )
        await self.accounts.add_token(made.token, made.secret_hash, by=by)
        return made.token, made.text

    async def revoke_token(self, token_id: str, *, by: Actor) -> None:
        await self.accounts.revoke_token(token_id, by=by)

    # Keys and the audit log

    async def rotate_key(self, *, at_once: bool = False, by: Actor) -> SigningKey:
        """`at_once`: nothing that was signed before is taken any more, as others may have the key."""
        return await signing.rotate(self.accounts, self._clock(), by, keep=0.0 if at_once else signing.KEEP)

    def audit(self, query: AuditQuery, limit: int) -> Page[AuditEntry]:
        return self.accounts.audit(query, limit)
