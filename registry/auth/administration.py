"""What is done to accounts, groups, grants, API tokens and keys: the same for the commands and for the API.

Who may do it is not asked here (`registry.auth.rights.management_rights`). Passwords come in the clear and go on as
hashes; a secret that is made here is given back once and kept nowhere. Every change takes `by`, for the audit log. All
raise AccountInvalid, AccountUnknown, AccountExists, LastAdmin, StorageFull, StorageFailed.

Rights as people write them, on the command line and to the API. All raise AccountInvalid, in words for a person.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from registry.auth.password.hashing import check_password
from registry.auth.token import api_tokens, signing_keys
from storage.access import (
    Account,
    AccountInvalid,
    AccountKind,
    AccountName,
    AccountUnknown,
    Action,
    ApiToken,
    AuditEntry,
    AuditQuery,
    Grant,
    Grantee,
    GranteeKind,
    SigningKey,
    TokenLimit,
)
from storage.accounts import Accounts
from storage.content import Actor, Page
from storage.names import shown
from storage.patterns import NamePattern

PAGE_ENTRIES = 1000
LONGEST_API_TOKEN_SECONDS = 36525 * 86400.0
"""Seconds until a token expires, the most: no calendar has a date for all that can be written."""
_LETTERS = "abcdefghjkmnpqrstuvwxyz123456789"
"""32 of them, so that a byte's remainder prefers none."""
GroupMembers = tuple[AccountName, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class AddedAccount:
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

    def find(self, name: AccountName, kind: AccountKind) -> Account:
        """Raises AccountUnknown, also where the name is one of the other kind."""
        account = self.accounts.account(name)
        if account.kind is not kind:
            raise AccountUnknown(f"{name} is a {account.kind}, not a {kind}")
        return account

    async def add_user(
        self, name: AccountName, password: str | None, *, admin: bool = False, note: str = "", by: Actor
    ) -> AddedAccount:
        """`password` None: one is made."""
        check_note(note)
        chosen = self._make_password() if password is None else password
        hashed = await self._hashed(name, chosen)
        first = not self.accounts.closed()
        account = await self.accounts.add_account(
            name, AccountKind.USER, password_hash=hashed, admin=admin, note=note, by=by
        )
        return AddedAccount(account, chosen if password is None else None, first)

    async def add_robot(self, name: AccountName, *, note: str = "", by: Actor) -> AddedAccount:
        check_note(note)
        first = not self.accounts.closed()
        account = await self.accounts.add_account(name, AccountKind.ROBOT, password_hash=None, note=note, by=by)
        return AddedAccount(account, None, first)

    async def set_password(self, name: AccountName, password: str | None, *, by: Actor) -> str | None:
        """`password` None: one is made, and given back."""
        self.find(name, AccountKind.USER)
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
        self, name: AccountName, kind: AccountKind, enabled: bool, *, force: bool = False, by: Actor
    ) -> None:
        """Raises LastAdmin, unless forced."""
        self.find(name, kind)
        await self.accounts.set_enabled(name, enabled, keep_admin=not force, by=by)

    async def set_admin(self, name: AccountName, admin: bool, *, force: bool = False, by: Actor) -> None:
        """Raises LastAdmin, unless forced."""
        self.find(name, AccountKind.USER)
        await self.accounts.set_admin(name, admin, keep_admin=not force, by=by)

    async def remove(self, name: AccountName, kind: AccountKind, *, force: bool = False, by: Actor) -> None:
        """Raises LastAdmin, unless forced."""
        self.find(name, kind)
        await self.accounts.remove_account(name, keep_admin=not force, by=by)

    # Groups

    def group(self, name: AccountName) -> GroupMembers:
        """Raises AccountUnknown."""
        return self.accounts.group(name)

    def all_groups(self) -> Iterator[GroupMembers]:
        after = None
        while True:
            page = self.accounts.groups(after, PAGE_ENTRIES)
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

    def subjects_of(self, name: str, groups: Iterable[str] = ()) -> list[Grantee]:
        """Whose grants count for `name`."""
        subjects = [Grantee(GranteeKind.USER, name), Grantee(GranteeKind.ROBOT, name)]
        members = dict.fromkeys((*self.accounts.groups_of(name), *groups))
        subjects += [Grantee(GranteeKind.GROUP, group) for group in members]
        return [*subjects, Grantee(GranteeKind.AUTHENTICATED), Grantee(GranteeKind.EVERYONE)]

    async def put_grants(self, grants: Sequence[Grant], *, by: Actor) -> None:
        for grant in grants:
            await self.accounts.put_grant(grant, by=by)

    async def remove_grant(self, subject: Grantee, pattern: NamePattern, *, by: Actor) -> None:
        await self.accounts.remove_grant(subject, pattern, by=by)

    # API tokens

    async def add_token(
        self,
        account: AccountName,
        *,
        note: str = "",
        expires_in: float | None = None,
        limits: Sequence[TokenLimit] = (),
        by: Actor,
    ) -> tuple[ApiToken, str]:
        """The token, and what its holder is told once. `expires_in`: seconds from now; None: it never does."""
        check_note(note)
        if expires_in is not None and expires_in <= 0:
            raise AccountInvalid("a token that has expired already is of no use; give a time like 90d")
        if expires_in is not None and expires_in > LONGEST_API_TOKEN_SECONDS:
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
        return await signing_keys.rotate(
            self.accounts, self._clock(), by, keep=0.0 if at_once else signing_keys.RETIRED_KEY_SECONDS
        )

    def audit(self, query: AuditQuery, limit: int) -> Page[AuditEntry]:
        return self.accounts.audit(query, limit)


LONGEST_NOTE = 200


def parse_pattern(text: str) -> NamePattern:
    try:
        return NamePattern(text)
    except ValueError as error:
        raise AccountInvalid(str(error)) from None


def parse_actions(text: str) -> Action:
    """`pull,push`; `*` is all of them."""
    try:
        return Action.parse(text)
    except ValueError as error:
        raise AccountInvalid(str(error)) from None


def parse_limit(text: str) -> TokenLimit:
    """`team/**:pull,push`."""
    pattern, colon, actions = text.partition(":")
    if not colon:
        raise AccountInvalid(f"{shown(text)} does not say what is allowed; write it like team/**:pull,push")
    return TokenLimit(parse_pattern(pattern), parse_actions(actions))


def check_note(note: str) -> None:
    if len(note) > LONGEST_NOTE or not (note.isprintable() or not note):
        raise AccountInvalid(f"a note is one line of at most {LONGEST_NOTE} characters")
