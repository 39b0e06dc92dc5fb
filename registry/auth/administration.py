"""Administration of accounts, groups, grants, API tokens and signing keys, for the command line and the management API.

This module does not check whether the caller may make a change. The management API does so first
(`registry.auth.rights.management_rights`).

Passwords are passed in plain text and stored as hashes. A generated secret is returned once and not stored. Every
change takes `by`, the actor that the audit log names. A *note* is one line of free text about an account or a token. A
*robot* is an account for a program. All methods may raise AccountInvalid, AccountUnknown, AccountExists, LastAdmin (the
change would leave no enabled admin), StorageFull, StorageFailed.
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
"""The number of groups that are read from the store at once."""
MAX_NOTE_CHARACTERS = 200
"""The longest note."""
MAX_API_TOKEN_SECONDS = 36525 * 86400.0
"""The longest lifetime of an API token, a hundred years. A later end may be a date that programs cannot represent."""
_PASSWORD_LETTERS = "abcdefghjkmnpqrstuvwxyz123456789"
"""The letters and digits of a generated password, without those that look alike. There are 32, a divisor of 256, so
that a random byte modulo 32 chooses each with the same probability."""
GroupMembers = tuple[AccountName, tuple[str, ...]]
"""The name of a group, and the names of its members."""


@dataclass(frozen=True, slots=True)
class AddedAccount:
    """A new account. `password` is the generated password; None: none was generated. `is_first` means that the registry
    had no account before: from now on, requests need a login or a grant to everyone."""

    account: Account
    password: str | None
    is_first: bool


class Administration:
    """The administrative operations on a store of accounts.

    `hash_password` returns the hash to store, and raises TooManyRequests if too many calls wait. `clock` returns
    seconds since 1970; `random(n)` returns n random bytes.
    """

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
        """Returns the account of this name and kind. Raises AccountUnknown if there is none, even if the name belongs
        to an account of the other kind."""
        account = self.accounts.account(name)
        if account.kind is not kind:
            raise AccountUnknown(f"{name} is a {account.kind}, not a {kind}")
        return account

    async def add_user(
        self, name: AccountName, password: str | None, *, admin: bool = False, note: str = "", by: Actor
    ) -> AddedAccount:
        """Adds a person's account. Generates a password if `password` is None."""
        check_note(note)
        chosen = self._make_password() if password is None else password
        hashed = await self._hashed(name, chosen)
        is_first = not self.accounts.has_had_account()
        account = await self.accounts.add_account(
            name, AccountKind.USER, password_hash=hashed, admin=admin, note=note, by=by
        )
        return AddedAccount(account, chosen if password is None else None, is_first)

    async def add_robot(self, name: AccountName, *, note: str = "", by: Actor) -> AddedAccount:
        """Adds a robot's account. A robot has no password and logs in with API tokens."""
        check_note(note)
        is_first = not self.accounts.has_had_account()
        account = await self.accounts.add_account(name, AccountKind.ROBOT, password_hash=None, note=note, by=by)
        return AddedAccount(account, None, is_first)

    async def set_password(self, name: AccountName, password: str | None, *, by: Actor) -> str | None:
        """Sets a person's password. If `password` is None, generates one and returns it; returns None otherwise."""
        self.find(name, AccountKind.USER)
        chosen = self._make_password() if password is None else password
        await self.accounts.set_password(name, await self._hashed(name, chosen), by=by)
        return chosen if password is None else None

    async def _hashed(self, name: AccountName, password: str) -> str:
        """Returns the hash of a password for the account `name`. Raises AccountInvalid if it is not acceptable."""
        check_password(password)
        if password.lower() == name:
            raise AccountInvalid("the password is the account's name")
        return await self._hash_password(password)

    def _make_password(self) -> str:
        """Returns a random password of four groups of five letters, such as `k7q2m-…`. It has 100 random bits."""
        letters = "".join(_PASSWORD_LETTERS[byte % len(_PASSWORD_LETTERS)] for byte in self._random(20))
        return "-".join(letters[start : start + 5] for start in range(0, 20, 5))

    async def set_enabled(
        self, name: AccountName, kind: AccountKind, enabled: bool, *, force: bool = False, by: Actor
    ) -> None:
        """Enables or disables an account. Raises LastAdmin instead of disabling the last enabled admin, unless `force`
        is true."""
        self.find(name, kind)
        await self.accounts.set_enabled(name, enabled, keep_admin=not force, by=by)

    async def set_admin(self, name: AccountName, admin: bool, *, force: bool = False, by: Actor) -> None:
        """Makes a person an admin, or takes this away. Raises LastAdmin instead of taking it away from the last enabled
        admin, unless `force` is true."""
        self.find(name, AccountKind.USER)
        await self.accounts.set_admin(name, admin, keep_admin=not force, by=by)

    async def remove(self, name: AccountName, kind: AccountKind, *, force: bool = False, by: Actor) -> None:
        """Removes an account. Raises LastAdmin instead of removing the last enabled admin, unless `force` is true."""
        self.find(name, kind)
        await self.accounts.remove_account(name, keep_admin=not force, by=by)

    # Groups

    def group(self, name: AccountName) -> GroupMembers:
        """Returns a group's name and members. Raises AccountUnknown if there is no such group."""
        return self.accounts.group(name)

    def all_groups(self) -> Iterator[GroupMembers]:
        """Yields every group with its members, in the order of the groups' names."""
        after = None
        while True:
            page = self.accounts.groups(after, PAGE_ENTRIES)
            yield from page.items
            if not page.more:
                return
            after = page.items[-1][0]

    def is_known(self, name: AccountName) -> bool:
        """Returns whether the store has an account of this name. Accounts of an htpasswd file are not in the store."""
        try:
            self.accounts.account(name)
        except AccountUnknown:
            return False
        return True

    # Grants

    def grants_for(self, name: str, groups: Iterable[str] = ()) -> list[Grant]:
        """Returns every grant that applies to the account `name`: grants to itself, its groups, all accounts and
        everyone. `groups` are groups that a token issuer named, in addition to the groups in the store."""
        return self.accounts.grants(self.subjects_of(name, groups))

    def subjects_of(self, name: str, groups: Iterable[str] = ()) -> list[Grantee]:
        """Returns the subjects whose grants apply to the account `name`. A subject is what a grant is made to: an
        account, a group, all accounts, or everyone."""
        subjects = [Grantee(GranteeKind.USER, name), Grantee(GranteeKind.ROBOT, name)]
        members = dict.fromkeys((*self.accounts.groups_of(name), *groups))
        subjects += [Grantee(GranteeKind.GROUP, group) for group in members]
        return [*subjects, Grantee(GranteeKind.AUTHENTICATED), Grantee(GranteeKind.EVERYONE)]

    async def put_grants(self, grants: Sequence[Grant], *, by: Actor) -> None:
        """Stores grants. Each replaces an older grant to the same subject for the same pattern. Stores none and raises
        AccountInvalid if a pattern is not simple: an exact name, or a prefix with `*` or `**` at its end."""
        _require_simple(grant.pattern for grant in grants)
        for grant in grants:
            await self.accounts.put_grant(grant, by=by)

    async def remove_grant(self, subject: Grantee, pattern: NamePattern, *, by: Actor) -> None:
        """Removes the grant to `subject` for a pattern. The pattern need not be simple, because old grants are not."""
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
        """Makes an API token for an account. Returns its stored part, and its full text, which is shown once.
        `expires_in` is in seconds; None: the token never expires. Without `limits`, it has all rights of the
        account."""
        check_note(note)
        if expires_in is not None and expires_in <= 0:
            raise AccountInvalid("a token that has expired already is of no use; give a time like 90d")
        if expires_in is not None and expires_in > MAX_API_TOKEN_SECONDS:
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
        """Revokes an API token. From the next request on, the token and all bearer tokens made with it are refused."""
        await self.accounts.revoke_token(token_id, by=by)

    # Keys and the audit log

    async def rotate_key(self, *, at_once: bool = False, by: Actor) -> SigningKey:
        """Makes a new signing key and returns it. Tokens that an older key signed are accepted until they expire. With
        `at_once`, they are refused from now on: use this if somebody else may know the old key."""
        return await signing_keys.rotate(
            self.accounts, self._clock(), by, keep=0.0 if at_once else signing_keys.RETIRED_KEY_SECONDS
        )

    def audit(self, query: AuditQuery, limit: int) -> Page[AuditEntry]:
        """Returns a page of at most `limit` lines of the audit log that match `query`, newest first."""
        return self.accounts.audit(query, limit)


def _require_simple(patterns: Iterable[NamePattern]) -> None:
    """Raises AccountInvalid if one of the patterns has a star elsewhere than at its end."""
    for pattern in patterns:
        try:
            require_simple(pattern)
        except ValueError as error:
            raise AccountInvalid(str(error)) from None


def parse_pattern(text: str) -> NamePattern:
    """Parses a pattern of repository names, such as `team/**` or `*/app`. Raises AccountInvalid."""
    try:
        return NamePattern(text)
    except ValueError as error:
        raise AccountInvalid(str(error)) from None


def parse_actions(text: str) -> Action:
    """Parses a list of actions, such as `pull,push`; `*` means all. Raises AccountInvalid."""
    try:
        return Action.parse(text)
    except ValueError as error:
        raise AccountInvalid(str(error)) from None


def parse_limit(text: str) -> TokenLimit:
    """Parses a limit of an API token, such as `team/**:pull,push`. Raises AccountInvalid."""
    pattern, colon, actions = text.partition(":")
    if not colon:
        raise AccountInvalid(f"{shown(text)} does not say what is allowed; write it like team/**:pull,push")
    return TokenLimit(parse_pattern(pattern), parse_actions(actions))


def check_note(note: str) -> None:
    """Checks that a note is one line of at most `MAX_NOTE_CHARACTERS`. Raises AccountInvalid if not."""
    if len(note) > MAX_NOTE_CHARACTERS or not (note.isprintable() or not note):
        raise AccountInvalid(f"a note is one line of at most {MAX_NOTE_CHARACTERS} characters")
