"""Administration of accounts, groups, grants, API tokens and signing keys, for the command line and the API.

Callers check rights before they call (`registry.auth.rights.management_rights`). Passwords come in plain text and are
stored as hashes; a generated secret is returned once and not stored. Every change takes `by`, the actor for the audit
log. All functions may raise AccountInvalid, AccountUnknown, AccountExists, LastAdmin, StorageFull, StorageFailed.
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
from storage.patterns import NamePattern, require_simple

PAGE_ENTRIES = 1000
LONGEST_NOTE = 200
"""Characters of a note."""
LONGEST_API_TOKEN_SECONDS = 36525 * 86400.0
"""The longest lifetime of an API token: its end must be a date that calendars can express."""
_LETTERS = "abcdefghjkmnpqrstuvwxyz123456789"
"""32 letters, so that the remainders of random bytes are distributed evenly."""
GroupMembers = tuple[AccountName, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class AddedAccount:
    """A new account. `password` is the generated one, if one was generated. `first` means that this account closed the
    registry."""

    account: Account
    password: str | None
    first: bool


class Administration:
    """The operations on `accounts`. `hash_password` raises TooManyRequests when too many calls wait."""

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
        """Returns the account. Raises AccountUnknown, also for an account of the other kind."""
        account = self.accounts.account(name)
        if account.kind is not kind:
            raise AccountUnknown(f"{name} is a {account.kind}, not a {kind}")
        return account

    async def add_user(
        self, name: AccountName, password: str | None, *, admin: bool = False, note: str = "", by: Actor
    ) -> AddedAccount:
        """Adds a person. Without a password, generates one."""
        check_note(note)
        chosen = self._make_password() if password is None else password
        hashed = await self._hashed(name, chosen)
        first = not self.accounts.has_had_account()
        account = await self.accounts.add_account(
            name, AccountKind.USER, password_hash=hashed, admin=admin, note=note, by=by
        )
        return AddedAccount(account, chosen if password is None else None, first)

    async def add_robot(self, name: AccountName, *, note: str = "", by: Actor) -> AddedAccount:
        """Adds a robot."""
        check_note(note)
        first = not self.accounts.has_had_account()
        account = await self.accounts.add_account(name, AccountKind.ROBOT, password_hash=None, note=note, by=by)
        return AddedAccount(account, None, first)

    async def set_password(self, name: AccountName, password: str | None, *, by: Actor) -> str | None:
        """Sets a person's password. Without one, generates and returns it."""
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
        """Returns a password like `k7q2m-…`: 100 random bits, in letters that are hard to confuse."""
        letters = "".join(_LETTERS[byte % len(_LETTERS)] for byte in self._random(20))
        return "-".join(letters[at : at + 5] for at in range(0, 20, 5))

    async def set_enabled(
        self, name: AccountName, kind: AccountKind, enabled: bool, *, force: bool = False, by: Actor
    ) -> None:
        """Enables or disables an account. Raises LastAdmin, unless forced."""
        self.find(name, kind)
        await self.accounts.set_enabled(name, enabled, keep_admin=not force, by=by)

    async def set_admin(self, name: AccountName, admin: bool, *, force: bool = False, by: Actor) -> None:
        """Makes a person an admin, or no longer one. Raises LastAdmin, unless forced."""
        self.find(name, AccountKind.USER)
        await self.accounts.set_admin(name, admin, keep_admin=not force, by=by)

    async def remove(self, name: AccountName, kind: AccountKind, *, force: bool = False, by: Actor) -> None:
        """Removes an account. Raises LastAdmin, unless forced."""
        self.find(name, kind)
        await self.accounts.remove_account(name, keep_admin=not force, by=by)

    # Groups

    def group(self, name: AccountName) -> GroupMembers:
        """Returns a group and its members. Raises AccountUnknown."""
        return self.accounts.group(name)

    def all_groups(self) -> Iterator[GroupMembers]:
        """Yields every group, in the order of the names."""
        after = None
        while True:
            page = self.accounts.groups(after, PAGE_ENTRIES)
            yield from page.items
            if not page.more:
                return
            after = page.items[-1][0]

    def is_known(self, name: AccountName) -> bool:
        """Returns whether the store has an account of that name. Accounts of an htpasswd file or an issuer are not in
        the store."""
        try:
            self.accounts.account(name)
        except AccountUnknown:
            return False
        return True

    # Grants

    def grants_for(self, name: str, groups: Iterable[str] = ()) -> list[Grant]:
        """Returns every grant that counts for `name`: its own, those of its groups, of all accounts and of everyone.
        `groups` are further groups that an issuer named."""
        return self.accounts.grants(self.subjects_of(name, groups))

    def subjects_of(self, name: str, groups: Iterable[str] = ()) -> list[Grantee]:
        """Returns the subjects whose grants count for `name`."""
        subjects = [Grantee(GranteeKind.USER, name), Grantee(GranteeKind.ROBOT, name)]
        members = dict.fromkeys((*self.accounts.groups_of(name), *groups))
        subjects += [Grantee(GranteeKind.GROUP, group) for group in members]
        return [*subjects, Grantee(GranteeKind.AUTHENTICATED), Grantee(GranteeKind.EVERYONE)]

    async def put_grants(self, grants: Sequence[Grant], *, by: Actor) -> None:
        """Stores grants, each in place of what its subject had for that pattern. Raises AccountInvalid, and stores
        nothing, if a pattern is not simple."""
        _require_simple(grant.pattern for grant in grants)
        for grant in grants:
            await self.accounts.put_grant(grant, by=by)

    async def remove_grant(self, subject: Grantee, pattern: NamePattern, *, by: Actor) -> None:
        """Removes what `subject` had for a pattern, which may be of any form."""
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
        """Makes an API token. Returns it with its secret, which is shown once. `expires_in` is in seconds; None means
        never."""
        check_note(note)
        if expires_in is not None and expires_in <= 0:
            raise AccountInvalid("a token that has expired already is of no use; give a time like 90d")
        if expires_in is not None and expires_in > LONGEST_API_TOKEN_SECONDS:
            raise AccountInvalid("a token expires within a hundred years; give no time for one that never does")
        _require_simple(limit.pattern for limit in limits)
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
        """Ends an API token, and everything that was made with it, at the next request."""
        await self.accounts.revoke_token(token_id, by=by)

    # Keys and the audit log

    async def rotate_key(self, *, at_once: bool = False, by: Actor) -> SigningKey:
        """Makes a new signing key. With `at_once`, nothing that an older key signed is accepted any more: use this when
        others may know the key."""
        return await signing_keys.rotate(
            self.accounts, self._clock(), by, keep=0.0 if at_once else signing_keys.RETIRED_KEY_SECONDS
        )

    def audit(self, query: AuditQuery, limit: int) -> Page[AuditEntry]:
        """Returns lines of the audit log, newest first."""
        return self.accounts.audit(query, limit)


def _require_simple(patterns: Iterable[NamePattern]) -> None:
    """Raises AccountInvalid if one of the patterns has a star before its end."""
    for pattern in patterns:
        try:
            require_simple(pattern)
        except ValueError as error:
            raise AccountInvalid(str(error)) from None


def parse_pattern(text: str) -> NamePattern:
    """Parses a pattern of any form. Raises AccountInvalid."""
    try:
        return NamePattern(text)
    except ValueError as error:
        raise AccountInvalid(str(error)) from None


def parse_actions(text: str) -> Action:
    """Parses actions like `pull,push`; `*` stands for all. Raises AccountInvalid."""
    try:
        return Action.parse(text)
    except ValueError as error:
        raise AccountInvalid(str(error)) from None


def parse_limit(text: str) -> TokenLimit:
    """Parses a token limit like `team/**:pull,push`. Raises AccountInvalid."""
    pattern, colon, actions = text.partition(":")
    if not colon:
        raise AccountInvalid(f"{shown(text)} does not say what is allowed; write it like team/**:pull,push")
    return TokenLimit(parse_pattern(pattern), parse_actions(actions))


def check_note(note: str) -> None:
    """Raises AccountInvalid unless `note` is one short line."""
    if len(note) > LONGEST_NOTE or not (note.isprintable() or not note):
        raise AccountInvalid(f"a note is one line of at most {LONGEST_NOTE} characters")
