"""Administration of accounts, groups, grants, API tokens and signing keys. The command line and the management API use
this module.

This module does not check whether the caller may make a change. The management API checks this before it calls this
module (`registry.auth.rights.management_rights`). On the command line, every user who can write to the store may make
every change.

Callers pass passwords in plain text. The store keeps only hashes of passwords and of generated secrets. Each method
that changes something takes `by`, the actor that the audit log names. A *note* is one line of free text about an
account or a token. A *robot* is an account for a program.

The methods can raise AccountInvalid, AccountUnknown, AccountExists, LastAdmin (the change would leave no enabled
admin), StorageFull, StorageFailed.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from registry.auth.password.hashing import check_password
from registry.auth.password.htpasswd import HtpasswdFile
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
    LoginSession,
    SigningKey,
    TokenLimit,
)
from storage.accounts import Accounts
from storage.content import Actor, Page
from storage.names import shown
from storage.patterns import NamePattern, require_simple

_GROUPS_PER_PAGE = 1000
"""The number of groups that `all_groups` reads from the store in one call."""
MAX_NOTE_CHARACTERS = 200
"""The largest number of characters in a note."""
MAX_API_TOKEN_SECONDS = 36525 * 86400.0
"""The longest lifetime of an API token: a hundred years. A later expiry can be a date that programs cannot
represent."""
_PASSWORD_LETTERS = "abcdefghjkmnpqrstuvwxyz123456789"
"""The letters and digits of generated passwords. i, l, o and 0 are missing, because each looks like another character.
The number of characters must divide 256: a random byte then selects each character with the same probability."""
GroupMembers = tuple[AccountName, tuple[str, ...]]
"""The name of a group, and the names of its members."""


@dataclass(frozen=True, slots=True)
class NewAccount:
    """A new account.

    - `password`: the generated password, or None if no password was generated.
    - `is_first`: whether this is the first account that the registry ever had. From now on, each request needs a login
      or a grant to everyone.
    - `hints`: texts that tell the admin which existing grants and groups apply to the account, and whether the account
      replaces an account of the same name in the htpasswd file.
    """

    account: Account
    password: str | None
    is_first: bool
    hints: tuple[str, ...]


class Administration:
    """The administrative operations.

    - `accounts`: the store of the accounts. With `keep_admin=True`, its methods raise LastAdmin instead of removing or
      disabling the only enabled admin, or making this admin an ordinary account.
    - `hash_password`: returns the hash of a password. Raises TooManyRequests if too many calls wait for hashing.
    - `clock`: returns seconds since 1970.
    - `random`: `random(n)` returns n random bytes.
    - `htpasswd`: the file with further accounts; None if the settings name no such file.

    The *version* of an account is a number that increases when its password, its admin right or its enabled flag
    changes. A method with the argument `expected_version` raises Unauthorized if the account has another version. If
    the account's owner makes the change, pass the version that the account had when the owner logged in. If somebody
    else makes the change, pass None: the method then accepts every version.
    """

    def __init__(
        self,
        accounts: Accounts,
        hash_password: Callable[[str], Awaitable[str]],
        *,
        clock: Callable[[], float],
        random: Callable[[int], bytes] = os.urandom,
        htpasswd: HtpasswdFile | None = None,
    ) -> None:
        self.accounts = accounts
        self._htpasswd = htpasswd
        self._hash_password = hash_password
        self._clock = clock
        self._random = random

    # Users and robots

    def find_account(self, name: AccountName, kind: AccountKind) -> Account:
        """Returns the account `name`. Raises AccountUnknown if there is no account `name` of the kind `kind`."""
        account = self.accounts.account(name)
        if account.kind is not kind:
            raise AccountUnknown(f"{name} is a {account.kind}, not a {kind}")
        return account

    def has_account(self, name: AccountName) -> bool:
        """Returns whether the store has an account `name`. Accounts in an htpasswd file are not in the store."""
        try:
            self.accounts.account(name)
        except AccountUnknown:
            return False
        return True

    async def add_user(
        self, name: AccountName, password: str | None, *, admin: bool = False, note: str = "", by: Actor
    ) -> NewAccount:
        """Adds a person's account. Generates a password if `password` is None. `admin`: whether to make the person an
        admin."""
        check_note(note)
        new_password = self._make_password() if password is None else password
        hashed = await self._hashed(name, new_password)
        is_first = not self.accounts.has_had_account()
        account = await self.accounts.add_account(
            name, AccountKind.USER, password_hash=hashed, admin=admin, note=note, by=by
        )
        shown_password = new_password if password is None else None
        return NewAccount(account, shown_password, is_first, await self._hints_on(account))

    async def add_robot(self, name: AccountName, *, note: str = "", by: Actor) -> NewAccount:
        """Adds a robot. A robot has no password: it logs in with API tokens, or with tokens of trusted issuers."""
        check_note(note)
        is_first = not self.accounts.has_had_account()
        account = await self.accounts.add_account(name, AccountKind.ROBOT, password_hash=None, note=note, by=by)
        return NewAccount(account, None, is_first, await self._hints_on(account))

    async def _hints_on(self, account: Account) -> tuple[str, ...]:
        """Returns `NewAccount.hints` for a new account."""
        name, hints = account.name, []
        if self._htpasswd is not None and (await self._htpasswd.read_current()).has_name(name):
            hints.append(f"the htpasswd file has an account {name}, which this account replaces from now on")
        if self.accounts.grant_page([Grantee(GranteeKind(account.kind), name)], None, 1).items:
            hints.append(f"{name} had grants already, which apply to this account")
        if account.groups:
            hints.append(f"{name} was already in the groups {', '.join(account.groups)}")
        return tuple(hints)

    async def set_password(
        self, name: AccountName, password: str | None, *, expected_version: int | None = None, by: Actor
    ) -> str | None:
        """Sets a person's password. If `password` is None, generates a password and returns the generated password.
        Otherwise returns None."""
        self.find_account(name, AccountKind.USER)
        new_password = self._make_password() if password is None else password
        hashed = await self._hashed(name, new_password)
        await self.accounts.set_password(name, hashed, expected_version=expected_version, by=by)
        return new_password if password is None else None

    async def _hashed(self, name: AccountName, password: str) -> str:
        """Returns the hash of a password for the account `name`. Raises AccountInvalid if the password is not
        acceptable."""
        check_password(password)
        if password.lower() == name:
            raise AccountInvalid("the password must not be the account's name")
        return await self._hash_password(password)

    def _make_password(self) -> str:
        """Returns a random password of four groups of five characters, such as `k7q2m-…`. It has 100 random bits."""
        letters = "".join(_PASSWORD_LETTERS[byte % len(_PASSWORD_LETTERS)] for byte in self._random(20))
        return "-".join(letters[start : start + 5] for start in range(0, 20, 5))

    async def set_enabled(
        self, name: AccountName, kind: AccountKind, enabled: bool, *, force: bool = False, by: Actor
    ) -> None:
        """Enables an account, or disables it if `enabled` is false. Raises LastAdmin if the account is the last enabled
        admin and `force` is false."""
        self.find_account(name, kind)
        await self.accounts.set_enabled(name, enabled, keep_admin=not force, by=by)

    async def set_admin(self, name: AccountName, admin: bool, *, force: bool = False, by: Actor) -> None:
        """Makes a person an admin, or an ordinary user if `admin` is false. Raises LastAdmin if the person is the last
        enabled admin and `force` is false."""
        self.find_account(name, AccountKind.USER)
        await self.accounts.set_admin(name, admin, keep_admin=not force, by=by)

    async def change_user(
        self, name: AccountName, *, admin: bool | None = None, enabled: bool | None = None, by: Actor
    ) -> None:
        """Sets a person's admin flag and enabled flag. None leaves a flag unchanged. If the call fails, both flags stay
        unchanged. Raises LastAdmin if no enabled admin would be left."""
        self.find_account(name, AccountKind.USER)
        if admin is not None or enabled is not None:
            await self.accounts.change_account(name, admin=admin, enabled=enabled, keep_admin=True, by=by)

    async def remove(self, name: AccountName, kind: AccountKind, *, force: bool = False, by: Actor) -> None:
        """Removes an account. Raises LastAdmin if the account is the last enabled admin and `force` is false."""
        self.find_account(name, kind)
        await self.accounts.remove_account(name, keep_admin=not force, by=by)

    # Groups

    def group(self, name: AccountName) -> GroupMembers:
        """Returns the group `name` with its members. Raises AccountUnknown if there is no such group."""
        return self.accounts.group(name)

    def all_groups(self) -> Iterator[GroupMembers]:
        """Yields every group with its members, in the order of the groups' names."""
        after = None
        while True:
            page = self.accounts.groups(after, _GROUPS_PER_PAGE)
            yield from page.items
            if not page.more:
                return
            after = page.items[-1][0]

    # Grants

    def grants_for(self, name: str, groups: Iterable[str] = ()) -> list[Grant]:
        """Returns every grant that applies to the account `name`: grants to the account itself, to its groups, to all
        accounts and to everyone. `groups`: further groups of the account, which a token issuer or the OpenID provider
        has named."""
        return self.accounts.grants(self.subjects_of(name, groups))

    def subjects_of(self, name: str, groups: Iterable[str] = ()) -> list[Grantee]:
        """Returns the subjects whose grants apply to the account `name`. A subject is the receiver of a grant: an
        account, a group, all accounts, or everyone. `groups`: as for `grants_for`."""
        # The store may not have the account `name`, and the name alone does not tell its kind. So the subjects
        # contain both a user and a robot of this name.
        subjects = [Grantee(GranteeKind.USER, name), Grantee(GranteeKind.ROBOT, name)]
        distinct_groups = dict.fromkeys((*self.accounts.groups_of(name), *groups))
        subjects += [Grantee(GranteeKind.GROUP, group) for group in distinct_groups]
        return [*subjects, Grantee(GranteeKind.AUTHENTICATED), Grantee(GranteeKind.EVERYONE)]

    async def put_grants(self, grants: Sequence[Grant], *, by: Actor) -> None:
        """Stores all grants; if it raises an error, stores none. Each grant replaces an older grant to the same subject
        for the same pattern. Each pattern must be *simple*: an exact name, or a prefix with `*` or `**` at its end.
        Raises AccountInvalid if a pattern is not simple."""
        _require_simple(grant.pattern for grant in grants)
        await self.accounts.put_grants(grants, by=by)

    async def remove_grant(self, subject: Grantee, pattern: NamePattern, *, by: Actor) -> None:
        """Removes the grant to `subject` for `pattern`. The pattern need not be simple (see `put_grants`), because the
        store can contain grants that an earlier version of the program stored."""
        await self.accounts.remove_grant(subject, pattern, by=by)

    # API tokens

    async def add_token(
        self,
        account: AccountName,
        *,
        note: str = "",
        expires_in: float | None = None,
        limits: Sequence[TokenLimit] = (),
        expected_version: int | None = None,
        by: Actor,
    ) -> tuple[ApiToken, str]:
        """Adds an API token to an account. Returns the stored part of the token, and the full text of the token with
        its secret. The store does not keep the full text.

        - `expires_in`: the lifetime in seconds; None if the token never expires.
        - `limits`: the token allows an action only if the account may do the action and one of the limits allows it.
          If `limits` is empty, the token allows all actions that the account may do.
        """
        check_note(note)
        if expires_in is not None and expires_in <= 0:
            raise AccountInvalid("the token would have expired already; give a lifetime like 90d")
        if expires_in is not None and expires_in > MAX_API_TOKEN_SECONDS:
            raise AccountInvalid(
                "a token's lifetime is at most a hundred years; give no lifetime for a token that never expires"
            )
        _require_simple(limit.pattern for limit in limits)
        self.accounts.account(account)  # raises AccountUnknown if there is no such account
        now = self._clock()
        new_token = api_tokens.make(
            account,
            now=now,
            note=note,
            expires=None if expires_in is None else now + expires_in,
            limits=tuple(limits) or None,
            random=self._random,
        )
        await self.accounts.add_token(new_token.token, new_token.secret_hash, expected_version=expected_version, by=by)
        return new_token.token, new_token.text

    async def revoke_token(self, token_id: str, *, by: Actor) -> None:
        """Revokes an API token. From the next request on, the registry refuses the token and all bearer tokens that
        clients got with it."""
        await self.accounts.revoke_token(token_id, by=by)

    # Login sessions

    def sessions(self, account: AccountName) -> list[LoginSession]:
        """Returns the browser sessions of an account, the newest first."""
        return self.accounts.login_sessions(account)

    async def end_session(self, session_id: str, *, by: Actor) -> None:
        """Ends a browser session. The registry refuses the session from the next request on."""
        await self.accounts.end_login_session(session_id, by=by)

    async def end_sessions(self, account: AccountName, *, except_id: str | None = None, by: Actor) -> int:
        """Ends all browser sessions of an account, except the one with the id `except_id`. Returns the number of
        ended sessions."""
        return await self.accounts.end_login_sessions(account, except_id=except_id, by=by)

    # Keys and the audit log

    async def rotate_key(self, *, at_once: bool = False, by: Actor) -> SigningKey:
        """Makes a new signing key and returns it. This key signs all later tokens. The tokens that an older key has
        signed expire within about an hour. If `at_once` is false, the registry accepts these tokens until they expire.
        If `at_once` is true, it refuses these tokens from now on: use this if somebody else may know an older key."""
        return await signing_keys.rotate(
            self.accounts, self._clock(), by, keep_seconds=0.0 if at_once else signing_keys.RETIRED_KEY_SECONDS
        )

    def audit_entries(self, query: AuditQuery, limit: int) -> Page[AuditEntry]:
        """Returns a page of at most `limit` entries of the audit log that match `query`, newest first."""
        return self.accounts.audit(query, limit)


def _require_simple(patterns: Iterable[NamePattern]) -> None:
    """Checks that all patterns are simple: exact names, or prefixes with `*` or `**` at their end. Raises
    AccountInvalid if not."""
    for pattern in patterns:
        try:
            require_simple(pattern)
        except ValueError as error:
            raise AccountInvalid(str(error)) from None


def parse_pattern(text: str) -> NamePattern:
    """Parses a pattern of repository names, such as `team/**` or `*/app`. Raises AccountInvalid if it is malformed."""
    try:
        return NamePattern(text)
    except ValueError as error:
        raise AccountInvalid(str(error)) from None


def parse_actions(text: str) -> Action:
    """Parses a list of actions, such as `pull,push`; `*` means all actions. Raises AccountInvalid if an action is not
    known."""
    try:
        return Action.parse(text)
    except ValueError as error:
        raise AccountInvalid(str(error)) from None


def parse_limit(text: str) -> TokenLimit:
    """Parses a limit of an API token: a pattern and the actions that it allows, such as `team/**:pull,push`. Raises
    AccountInvalid if it is malformed."""
    pattern, colon, actions = text.partition(":")
    if not colon:
        raise AccountInvalid(f"{shown(text)} does not say what is allowed; write it like team/**:pull,push")
    return TokenLimit(parse_pattern(pattern), parse_actions(actions))


def check_note(note: str) -> None:
    """Checks that a note is one line of at most `MAX_NOTE_CHARACTERS`. Raises AccountInvalid if not."""
    if len(note) > MAX_NOTE_CHARACTERS or not note.isprintable():
        raise AccountInvalid(f"a note is one line of at most {MAX_NOTE_CHARACTERS} characters")
