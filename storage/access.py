"""Types of access control: accounts, groups, grants, API tokens, login sessions, signing keys, and lines of the audit
log.

`storage.accounts.Accounts` stores these values, and `registry.auth` decides by them which requests are allowed. The
store keeps only hashes of passwords and of the secrets of API tokens and login sessions. It keeps the secrets of
signing keys unhashed, because the server signs with them.
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
"""Largest value of `FailureCost.max_seconds`. After a failed login, the server refuses logins for at most this time."""


class AccountInvalid(RegistryError):
    """A change or query of accounts, groups, grants, API tokens or the audit log is not valid."""

    code = "ACCOUNT_INVALID"
    default = "the account is not valid"


class AccountUnknown(RegistryError):
    """An account, group, API token or grant does not exist."""

    code = "ACCOUNT_UNKNOWN"
    default = "there is no such account"


class AccountHidden(AccountUnknown):
    """The client may not see an account, API token or login session. The client gets the same response as if the
    account, token or session did not exist. The audit log records a refusal."""


class AccountExists(RegistryError):
    """A new account or group has the name of an existing one."""

    code = "ACCOUNT_EXISTS"
    default = "that name is taken"


class LastAdmin(RegistryError):
    """The change was refused, because no enabled admin would remain after it."""

    code = "LAST_ADMIN"
    default = "this is the last enabled admin; make another account an admin first"


class AccountName(str):
    """Name of an account or a group: at most 64 lower-case letters, digits, '.', '_' and '-'. An account and a group
    cannot have the same name. The constructor raises AccountInvalid if the text is not a valid name or is one of
    `RESERVED_NAMES`."""

    __slots__ = ()

    def __new__(cls, text: str) -> Self:
        if not _ACCOUNT_NAME.fullmatch(text) or text in RESERVED_NAMES:
            raise AccountInvalid(
                f"{shown(text)} is no name for an account or group; a name has up to 64 lower-case letters, digits, "
                "'.', '_' and '-', begins and ends with a letter or digit, and is none of "
                f"{', '.join(sorted(RESERVED_NAMES))}"
            )
        return super().__new__(cls, text)


class AccountKind(enum.StrEnum):
    """Kind of an account. A user is a person. A robot is a program, such as a CI job; it has no password and logs in
    with API tokens only."""

    USER = "user"
    ROBOT = "robot"


class Action(enum.IntFlag):
    """A set of actions on a repository. No action includes another: `PUSH` does not include `PULL`. `ADMIN` is the
    right to grant actions on the repository to others."""

    NONE = 0
    PULL = 1
    PUSH = 2
    DELETE = 4
    ADMIN = 8

    @classmethod
    def parse(cls, text: str) -> Action:
        """Parses a list such as `pull,push`; `*` means all actions. Raises ValueError, with a message for the user, if
        a word is not an action or there is no word."""
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
    `authenticated`. `name` is empty for `everyone` and `authenticated`. A user of an htpasswd file or of an external
    token issuer can be a grantee without an account in the store."""

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
    """An account of a person or a robot.

    - `enabled`: whether the account may log in.
    - `admin`: whether the account may do everything.
    - `version`: a number that increases with each change of the password, `enabled` or `admin`. A bearer token contains
      the version of its account, and becomes invalid when the version changes.
    - `created`: time in seconds since 1970.
    - `groups`: the groups that the account is a member of.
    - `note`: free text for people."""

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
    """Lets `subject` do the `actions` on all repositories whose names match `pattern`. For each pair of subject and
    pattern, there is at most one grant."""

    subject: Grantee
    pattern: NamePattern
    actions: Action


@dataclass(frozen=True, slots=True)
class TokenLimit:
    """One entry of `ApiToken.limits`. On repositories whose names match `pattern`, the entry allows those of the
    `actions` that the token's account may do."""

    pattern: NamePattern
    actions: Action


TokenPurpose = Literal["personal", "login"]
"""`personal` for API tokens that people create, `login` for refresh tokens that the server issues to `docker login`."""


@dataclass(frozen=True, slots=True)
class ApiToken:
    """An API token: a secret with which a client logs in to an account, in place of a password. `created`, `expires`
    and `used` are times in seconds since 1970.

    - `note`: free text for people.
    - `expires`: None if the token never expires.
    - `limits`: the actions that the token allows; None if the token has all rights of its account.
    - `used`: approximate time of the last use; None if the token was never used."""

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
    """The session of a person who logged in with a browser. `created`, `expires` and `seen` are times in seconds since
    1970.

    - `method`: `openid` if the person logged in at the OpenID provider, otherwise `password`.
    - `seen`: approximate time of the last request.
    - `address` and `user_agent`: IP address and User-Agent of the browser at the login.
    - `version`: version of the account at the login; None for an account in an htpasswd file.
    - `stamp`: hash of the account's line in the htpasswd file, or of the settings of the OpenID provider. The session
      becomes invalid when the line or the settings change. None if the password is in the store.
    - `groups`: groups that the OpenID provider named."""

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
    """A key that signs and verifies the bearer tokens of the endpoint `/token`. Only the current key signs tokens. A
    key that was replaced still verifies tokens for some time. `created`, `retired` and `until` are times in seconds
    since 1970. `retired`: when the key was replaced; None for the current key. `until`: when a replaced key stops
    verifying tokens; None for the current key."""

    id: str
    secret: bytes = field(repr=False)
    created: float
    retired: float | None = None
    until: float | None = None


class FailureCost(NamedTuple):
    """How much a failed login throttles later logins.

    A *throttling key* is a text that stands for an account, for a network of clients, or for both. The store keeps a
    time for each key. Each failed login moves the key's time further into the future
    (`storage.accounts.Accounts.add_failures`). While the key's time is too far in the future, the server refuses logins
    under the key.

    - `seconds`: how many seconds the failed login adds to the key's time.
    - `max_seconds`: the key's new time is at most this many seconds after the present time. At most
      `LONGEST_THROTTLING_SECONDS`."""

    seconds: float
    max_seconds: float

    def latest_plausible_time(self, now: float) -> float:
        """Returns the latest plausible time of a key: `max_seconds` after `now`, plus `CLOCK_MARGIN_SECONDS`. If a
        key's time is later, the clock was ahead when the time was stored. `now` (the present time) and the result are
        in seconds since 1970."""
        return now + self.max_seconds + CLOCK_MARGIN_SECONDS


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """A line of the audit log.

    - `at`: time in seconds since 1970.
    - `actor`: name of the account that acted, `anonymous`, `system`, or `cli:` followed by the name of the
      operating-system user who ran a command.
    - `action`: what was done, such as `account.add`. It is not an `Action`.
    - `target`: what was changed or asked for, such as `alice`, `group:dev`, `team/app`, `team/app:latest` or
      `team/app@sha256:…`.
    - `address`: the client's IP address.
    - `detail`: further facts about the action.
    - `count`: how many equal events the line stands for. Only logins and denied requests share a line.
    - `id`: identifies the line in `AuditQuery.before`. The store sets it."""

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
    """A filter for lines of the audit log. A line must match all fields that are not None.

    - `target`: the target of the line. The name of a repository also matches lines about its tags and manifests.
    - `since`: the line is from this time or later, in seconds since 1970.
    - `until`: the line is from before this time, in seconds since 1970.
    - `before`: the line is older than the line with this id."""

    actor: str | None = None
    action: str | None = None
    target: str | None = None
    outcome: str | None = None
    since: float | None = None
    until: float | None = None
    before: str | None = None
