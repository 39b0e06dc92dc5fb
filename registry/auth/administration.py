"""Administration of accounts, groups, grants, API tokens and signing keys, for the command line and the management API.

This module does not check whether the caller may make a change. The management API does this check before it calls
this module (`registry.auth.rights.management_rights`). On the command line, every user who can write to the store may
make every change.

Passwords are passed in plain text and stored as hashes. A generated secret is returned once, and only its hash is
stored. Each method that changes something takes `by`, the actor that the audit log names. A *note* is one line of free
text about an account or a token. A *robot* is an account for a program.

The methods can raise AccountInvalid, AccountUnknown, AccountExists, LastAdmin (after the change, no enabled admin would
be left), StorageFull, StorageFailed.
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
"""The number of groups that `all_groups` reads from the store at a time."""
MAX_NOTE_CHARACTERS = 200
"""The longest note."""
MAX_API_TOKEN_SECONDS = 36525 * 86400.0
"""The longest lifetime of an API token: a hundred years. A later expiry can be a date that programs cannot
represent."""
_PASSWORD_LETTERS = "abcdefghjkmnpqrstuvwxyz123456789"
"""The letters and digits of generated passwords. i, l, o and 0 are missing, because each looks like another character.
There are 32 characters. Because 32 divides 256, a random byte modulo 32 chooses each with the same probability."""
GroupMembers = tuple[AccountName, tuple[str, ...]]
"""The name of a group, and the names of its members."""


@dataclass(frozen=True, slots=True)
class NewAccount:
    """A new account.

    - `password`: the generated password, or None if no password was generated.
    - `is_first`: whether this is the first account that the registry ever had. After the first account was added, each
      request needs a login or a grant to everyone.
    - `hints`: texts that tell the admin which rights the account has from the start, and whether it replaces an account
      of the same name in the htpasswd file.
    """

    account: Account
    password: str | None
    is_first: bool
    hints: tuple[str, ...]


class Administration:
    """The administrative operations on the store `accounts`.

    `hash_password` returns the hash of a password, and raises TooManyRequests if too many calls wait for hashing.
    `clock` returns seconds since 1970; `random(n)` returns n random bytes. `htpasswd` is the file with further
    accounts, or None if the settings name no such file.

    The *version* of an account is a number that increases when its password, its admin right or its enabled flag
    changes. Some methods take an `expected_version`. For a change that the account's owner makes, it is the version
    that the account had when the owner logged in: the method raises Unauthorized if the account has another version
    now. For a change that somebody else makes, it is None, and the method does not check the version.
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

    def find(self, name: AccountName, kind: AccountKind) -> Account:
        """Returns the account of this name. Raises AccountUnknown if there is none, or if its kind is not `kind`."""
        account = self.accounts.account(name)
        if account.kind is not kind:
            raise AccountUnknown(f"{name} is a {account.kind}, not a {kind}")
        return account

    def has_account(self, name: AccountName) -> bool:
        """Returns whether the store has an account of this name. Accounts in an htpasswd file are not in the store."""
        try:
            self.accounts.account(name)
        except AccountUnknown:
            return False
        return True

    async def add_user(
        self, name: AccountName, password: str | None, *, admin: bool = False, note: str = "", by: Actor
    ) -> NewAccount:
        """Adds a person's account, as an admin if `admin` is true. Generates a password if `password` is None."""
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
        """Adds a robot's account. A robot has no password. It logs in with API tokens, or with tokens of trusted
        issuers."""
        check_note(note)
        is_first = not self.accounts.has_had_account()
        account = await self.accounts.add_account(name, AccountKind.ROBOT, password_hash=None, note=note, by=by)
        return NewAccount(account, None, is_first, await self._hints_on(account))

    async def _hints_on(self, account: Account) -> tuple[str, ...]:
        """Returns `NewAccount.hints` for a new account."""
        name, hints = account.name, []
        if self._htpasswd is not None and (await self._htpasswd.current()).has_name(name):
            hints.append(f"the htpasswd file has an account {name}, which this account replaces from now on")
        if self.accounts.grant_page([Grantee(GranteeKind(account.kind), name)], None, 1).items:
            hints.append(f"{name} had grants already, which apply to this account")
        if account.groups:
            hints.append(f"{name} was already in the groups {', '.join(account.groups)}")
        return tuple(hints)

    async def set_password(
        self, name: AccountName, password: str | None, *, expected_version: int | None = None, by: Actor
    ) -> str | None:
        """Sets a person's password. If `password` is None, generates a password and returns it. Otherwise, returns
        None."""
        self.find(name, AccountKind.USER)
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
        """Returns a random password of four groups of five letters, such as `k7q2m-…`. It has 100 random bits."""
        letters = "".join(_PASSWORD_LETTERS[byte % len(_PASSWORD_LETTERS)] for byte in self._random(20))
        return "-".join(letters[start : start + 5] for start in range(0, 20, 5))

    async def set_enabled(
        self, name: AccountName, kind: AccountKind, enabled: bool, *, force: bool = False, by: Actor
    ) -> None:
        """Enables an account, or disables it if `enabled` is false. Raises LastAdmin if the account is the last enabled
        admin, unless `force` is true."""
        self.find(name, kind)
        await self.accounts.set_enabled(name, enabled, keep_admin=not force, by=by)

    async def set_admin(self, name: AccountName, admin: bool, *, force: bool = False, by: Actor) -> None:
        """Makes a person an admin, or an ordinary user if `admin` is false. Raises LastAdmin if the person is the last
        enabled admin, unless `force` is true."""
        self.find(name, AccountKind.USER)
        await self.accounts.set_admin(name, admin, keep_admin=not force, by=by)

    async def change_user(
        self, name: AccountName, *, admin: bool | None = None, enabled: bool | None = None, by: Actor
    ) -> None:
        """Sets a person's admin flag and enabled flag in one change: if it fails, both flags stay as they are. None
        leaves a flag as it is. Raises LastAdmin if no enabled admin would be left."""
        self.find(name, AccountKind.USER)
        if admin is not None or enabled is not None:
            await self.accounts.change_account(name, admin=admin, enabled=enabled, keep_admin=True, by=by)

    async def remove(self, name: AccountName, kind: AccountKind, *, force: bool = False, by: Actor) -> None:
        """Removes an account. Raises LastAdmin if it is the last enabled admin, unless `force` is true."""
        self.find(name, kind)
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
        accounts and to everyone. `groups` are groups that a token issuer or the OpenID provider named, in addition to
        the account's groups in the store."""
        return self.accounts.grants(self.subjects_of(name, groups))

    def subjects_of(self, name: str, groups: Iterable[str] = ()) -> list[Grantee]:
        """Returns the subjects whose grants apply to the account `name`. A subject is the receiver of a grant: an
        account, a group, all accounts, or everyone. `groups`: as for `grants_for`."""
        # The list has both kinds of account, because the kind of an account outside the store is not known here.
        subjects = [Grantee(GranteeKind.USER, name), Grantee(GranteeKind.ROBOT, name)]
        distinct_groups = dict.fromkeys((*self.accounts.groups_of(name), *groups))
        subjects += [Grantee(GranteeKind.GROUP, group) for group in distinct_groups]
        return [*subjects, Grantee(GranteeKind.AUTHENTICATED), Grantee(GranteeKind.EVERYONE)]

    async def put_grants(self, grants: Sequence[Grant], *, by: Actor) -> None:
        """Stores all grants, or none if one of them is refused. Each grant replaces an older grant to the same subject
        for the same pattern. A pattern must be *simple*: an exact name, or a prefix with `*` or `**` at its end. If any
        pattern is not simple, raises AccountInvalid."""
        _require_simple(grant.pattern for grant in grants)
        await self.accounts.put_grants(grants, by=by)

    async def remove_grant(self, subject: Grantee, pattern: NamePattern, *, by: Actor) -> None:
        """Removes the grant to `subject` for `pattern`. The pattern need not be simple (see `put_grants`), because
        earlier versions stored grants with other patterns."""
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
        """Creates an API token for an account and stores it. Returns the stored part of the token, and its full text
        with the secret, which is shown only once.

        - `expires_in`: the lifetime in seconds, or None if the token never expires.
        - `limits`: restrict the token to some of the actions that the account may do. If `limits` is empty, the token
          allows all these actions.
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
        """Revokes an API token. From the next request on, the token is refused, and so are all bearer tokens that
        clients got in exchange for it."""
        await self.accounts.revoke_token(token_id, by=by)

    # Login sessions

    def sessions(self, account: AccountName) -> list[LoginSession]:
        """Returns the browser sessions of an account, the newest first."""
        return self.accounts.login_sessions(account)

    async def end_session(self, session_id: str, *, by: Actor) -> None:
        """Ends a browser session. From the next request on, the session is refused."""
        await self.accounts.end_login_session(session_id, by=by)

    async def end_sessions(self, account: AccountName, *, except_id: str | None = None, by: Actor) -> int:
        """Ends all browser sessions of an account, except the one with the id `except_id`. Returns the number of
        ended sessions."""
        return await self.accounts.end_login_sessions(account, except_id=except_id, by=by)

    # Keys and the audit log

    async def rotate_key(self, *, at_once: bool = False, by: Actor) -> SigningKey:
        """Makes a new signing key and returns it. This key signs all later tokens. Tokens that an older key signed are
        accepted for about an hour more, until the last of them has expired. If `at_once` is true, they are refused from
        now on. Use `at_once` if somebody else may know the old key."""
        return await signing_keys.rotate(
            self.accounts, self._clock(), by, keep_seconds=0.0 if at_once else signing_keys.RETIRED_KEY_SECONDS
        )

    def audit(self, query: AuditQuery, limit: int) -> Page[AuditEntry]:
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
