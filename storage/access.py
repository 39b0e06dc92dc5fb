"""Types of access control: accounts, groups, grants, API tokens, login sessions, signing keys, and lines of the audit
log.

`storage.accounts.Accounts` stores them, and `registry.auth` uses them to decide which requests are allowed. Of a
password, API token or login session, only the hash is stored. A signing key is stored unhashed, because the server
signs with it.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple, Self

from storage.errors import RegistryError
from storage.future_times import CLOCK_MARGIN_SECONDS
from storage.names import shown
from storage.patterns import NamePattern

_ACCOUNT_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
RESERVED_NAMES = frozenset({"anonymous", "everyone", "authenticated", "system"})
"""Names that accounts and groups must not have. In grants, `everyone` and `authenticated` stand for many clients. In
the audit log, `anonymous` is a client that has not logged in, and `system` is the server itself."""
LONGEST_THROTTLING_SECONDS: Final = 30 * 86400.0
"""Failed logins delay later logins by at most this time. No `FailureCost.max_seconds` is larger."""


class AccountInvalid(RegistryError):
    """A change or query of accounts, groups, grants, API tokens or the audit log is not valid."""

    code = "ACCOUNT_INVALID"
    default = "the account is not valid"


class AccountUnknown(RegistryError):
    """An account, group, API token or grant does not exist."""

    code = "ACCOUNT_UNKNOWN"
    default = "there is no such account"


class AccountHidden(AccountUnknown):
    """The client may not see an account, API token or login session. The client gets the same response as for one that
    does not exist. The audit log records that the client was refused."""


class AccountExists(RegistryError):
    """A new account or group has the name of an existing one."""

    code = "ACCOUNT_EXISTS"
    default = "that name is taken"


class LastAdmin(RegistryError):
    """The change was refused, because no enabled admin would remain after it."""

    code = "LAST_ADMIN"
    default = "that is the last admin who is enabled; make another account an admin first"


class AccountName(str):
    """Name of an account or a group: at most 64 lower-case letters, digits, '.', '_' and '-'. An account and a group
    cannot have the same name. The constructor raises AccountInvalid if the text is not such a name."""

    __slots__ = ()

    def __new__(cls, text: str) -> Self:
        if not _ACCOUNT_NAME.fullmatch(text) or text in RESERVED_NAMES:
            raise AccountInvalid(
                f"{shown(text)} is no name for an account; a name has up to 64 lower-case letters, digits, '.', '_' "
                "and '-', begins and ends with a letter or digit, and is none of "
                f"{', '.join(sorted(RESERVED_NAMES))}"
            )
        return super().__new__(cls, text)


class AccountKind(enum.StrEnum):
    """Kind of an account. A user is a person. A robot is a program, such as a CI job; it has no password and logs in
    with API tokens only."""

    USER = "user"
    ROBOT = "robot"


class Action(enum.IntFlag):
    """A set of actions on a repository. No action includes another one: `PUSH` does not include `PULL`. `ADMIN` is the
    right to grant actions on the repository to others."""

    NONE = 0
    PULL = 1
    PUSH = 2
    DELETE = 4
    ADMIN = 8

    @classmethod
    def parse(cls, text: str) -> Action:
        """Parses a list such as `pull,push`; `*` means all actions. Raises ValueError, with a text for the user."""
        actions = cls.NONE
        for word in filter(None, (part.strip().lower() for part in text.split(","))):
            if word != "*" and word.upper() not in cls.__members__:
                raise ValueError(f"{word!r} is not an action; the actions are pull, push, delete and admin")
            actions |= EVERY_ACTION if word == "*" else cls[word.upper()]
        if not actions:
            raise ValueError("no action is named; the actions are pull, push, delete and admin")
        return actions

    @property
    def words(self) -> list[str]:
        """The actions of the set as words, such as `["pull", "push"]`, always in the same order."""
        return [action.name.lower() for action in EVERY_ACTION if action in self and action.name]


EVERY_ACTION = Action.PULL | Action.PUSH | Action.DELETE | Action.ADMIN
"""The set of all actions."""


class GranteeKind(enum.StrEnum):
    """Kind of a grantee. `everyone` stands for all clients, including those that have not logged in. `authenticated`
    stands for all clients that have logged in."""

    USER = "user"
    ROBOT = "robot"
    GROUP = "group"
    EVERYONE = "everyone"
    AUTHENTICATED = "authenticated"


@dataclass(frozen=True, slots=True, order=True)
class Grantee:
    """The clients to which a grant gives a right. The text form is `user:alice`, `robot:ci`, `group:dev`, `everyone` or
    `authenticated`. `name` is empty for `everyone` and `authenticated`. A user need not have an account in the store,
    because users of an htpasswd file or of an external token issuer have none."""

    kind: GranteeKind
    name: str = ""

    @classmethod
    def parse(cls, text: str) -> Grantee:
        """Parses the text form, such as `user:alice`. Raises AccountInvalid."""
        kind, colon, name = text.partition(":")
        takes_name = kind not in (GranteeKind.EVERYONE, GranteeKind.AUTHENTICATED)
        if kind not in set(GranteeKind) or bool(colon) != takes_name:
            raise AccountInvalid(
                f"{shown(text)} cannot get a grant: write user:NAME, robot:NAME, group:NAME, everyone or authenticated"
            )
        return cls(GranteeKind(kind), AccountName(name) if colon else "")

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}" if self.name else str(self.kind)


@dataclass(frozen=True, slots=True)
class Account:
    """An account of a person or a robot. `enabled`: whether the account may log in. `admin`: whether it may do
    everything. `version`: a number that increases with each change of the password, of `enabled` and of `admin`. Bearer
    tokens contain the number, so such a change invalidates the tokens that were issued before it. `created`: time in
    seconds since 1970. `groups`: the groups that the account is a member of. `note`: free text for people."""

    name: AccountName
    kind: AccountKind
    enabled: bool
    admin: bool
    version: int
    created: float
    groups: tuple[AccountName, ...] = ()
    note: str = ""
    has_password: bool = False


@dataclass(frozen=True, slots=True)
class Grant:
    """Gives `subject` the right to the `actions` on all repositories whose names match `pattern`. For each pair of
    subject and pattern, there is at most one grant."""

    subject: Grantee
    pattern: NamePattern
    actions: Action


@dataclass(frozen=True, slots=True)
class TokenLimit:
    """One entry of `ApiToken.limits`, for the repositories whose names match `pattern`. It lets the token do an action
    there if `actions` contains the action and the token's account may do it."""

    pattern: NamePattern
    actions: Action


TokenPurpose = Literal["personal", "login"]
"""`personal` for API tokens that people create, `login` for refresh tokens that the server issues to `docker login`."""


@dataclass(frozen=True, slots=True)
class ApiToken:
    """An API token: a secret with which a client logs in to an account in place of the password. `note`: free text for
    people. `created`, `expires` and `used` are seconds since 1970. `expires`: None if the token never expires.
    `limits`: None if the token has all rights of its account. `used`: approximate time of the last use; None if the
    token was never used."""

    id: str
    account: AccountName
    purpose: TokenPurpose
    note: str
    created: float
    expires: float | None = None
    limits: tuple[TokenLimit, ...] | None = None
    used: float | None = None


@dataclass(frozen=True, slots=True)
class LoginSession:
    """The session of a person who logged in with a browser. `method`: how the person logged in: `password`, or `openid`
    for the OpenID provider. `created`, `expires` and `seen` are seconds since 1970. `seen`: approximate time of the
    last request. `address` and `user_agent`: IP address and User-Agent of the browser at the login. `version`: the
    version of the account at the login; None for an account in an htpasswd file. `stamp`: a hash of the account's line
    in the htpasswd file, or of the settings of the OpenID provider; None if a password in the store proved the login.
    When the line or the settings change, the session becomes invalid. `groups`: groups that the OpenID provider
    named."""

    id: str
    account: AccountName
    method: Literal["password", "openid"]
    created: float
    expires: float
    seen: float
    address: str
    user_agent: str
    version: int | None = None
    stamp: str | None = None
    groups: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A key for the bearer tokens that the endpoint `/token` issues. One key signs new tokens; keys that it replaced
    still verify the tokens that they signed. All times are seconds since 1970. `retired`: when the key was replaced;
    None for the key that signs. `until`: when a replaced key stops verifying tokens; None for the key that signs."""

    id: str
    secret: bytes = field(repr=False)
    created: float
    retired: float | None = None
    until: float | None = None


class FailureCost(NamedTuple):
    """The cost of a failed login under one throttling key. A *throttling key* is a text that stands for an account, for
    a network of clients, or for both.

    For each key, the store keeps a moment, the *time of the key*. Each failed login moves the time of the key further
    into the future (`storage.accounts.Accounts.add_failures`). So after many failed logins, it is far in the future.
    While it is too far in the future, logins under the key are refused.

    - `seconds`: the failure moves the time of the key by this many seconds.
    - `max_seconds`: the failure moves the time of the key to at most this many seconds after the present time. This
      field is at most `LONGEST_THROTTLING_SECONDS`."""

    seconds: float
    max_seconds: float

    def latest_plausible_time(self, now: float) -> float:
        """Returns the latest time of the key that failures of this cost can have stored by now, if the clock was right.
        Adds a margin of `CLOCK_MARGIN_SECONDS`. A stored time after the result is wrong: it was stored while the clock
        was ahead. `now`, the present time, and the result are in seconds since 1970."""
        return now + self.max_seconds + CLOCK_MARGIN_SECONDS


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """A line of the audit log. `at`: time in seconds since 1970. `actor`: name of the account that acted, `anonymous`,
    `system`, or `cli:` with the name of the operating system's user who ran a command. `action`: what was done, such as
    `account.add` (not an `Action`). `target`: what was changed or asked for, such as `alice`, `group:dev`, `team/app`,
    `team/app:latest` or `team/app@sha256:…`. `address`: the client's IP address. `detail`: further facts about the
    action. `count`: number of events that this line stands for; logins and denied requests that do not differ are
    combined into one line. `id`: identifies the line in `AuditQuery.before`; the store sets it."""

    at: float
    actor: str
    action: str
    target: str = ""
    outcome: Literal["ok", "denied", "failed"] = "ok"
    address: str = ""
    request_id: str = ""
    user_agent: str = ""
    detail: Mapping[str, object] | None = None
    count: int = 1
    id: str = ""


@dataclass(frozen=True, slots=True)
class AuditQuery:
    """A filter for lines of the audit log. A line must match all fields that are not None. `target`: the target of the
    line; the name of a repository also matches lines about its tags and manifests. `since`: the line is from this time
    or later, in seconds since 1970. `until`: the line is from before this time. `before`: the line is older than the
    line with this id."""

    actor: str | None = None
    action: str | None = None
    target: str | None = None
    outcome: str | None = None
    since: float | None = None
    until: float | None = None
    before: str | None = None
