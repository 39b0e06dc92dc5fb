"""Types of access control: accounts, groups, grants, API tokens, signing keys, and lines of the audit log.

`storage.accounts.Accounts` stores them, and `registry.auth` uses them to decide about requests. The store keeps only
hashes of passwords and API tokens. It keeps signing keys in plain form, because they are needed to sign.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Self

from storage.errors import RegistryError
from storage.names import shown
from storage.patterns import NamePattern

_ACCOUNT_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
RESERVED_NAMES = frozenset({"anonymous", "everyone", "authenticated", "system"})
"""Names that no account or group may have, because grants and the audit log use them for something else."""


class AccountInvalid(RegistryError):
    """A name, a password or another part of an account is not valid."""

    code = "ACCOUNT_INVALID"
    default = "the account is not valid"


class AccountUnknown(RegistryError):
    """An account, group, API token or grant does not exist."""

    code = "ACCOUNT_UNKNOWN"
    default = "there is no such account"


class AccountExists(RegistryError):
    """A new account or group has the name of an existing one."""

    code = "ACCOUNT_EXISTS"
    default = "that name is taken"


class LastAdmin(RegistryError):
    """The change was refused, because no enabled admin would be left after it."""

    code = "LAST_ADMIN"
    default = "that is the last admin who is enabled; make somebody else one before"


class AccountName(str):
    """Name of an account or a group: at most 64 lower-case letters, digits, '.', '_' and '-'. An account and a group
    cannot have the same name. The constructor raises AccountInvalid."""

    __slots__ = ()

    def __new__(cls, text: str) -> Self:
        if not _ACCOUNT_NAME.fullmatch(text) or text in RESERVED_NAMES:
            raise AccountInvalid(
                f"{shown(text)} is no name for an account: up to 64 lower-case letters, digits, '.', '_' and '-', "
                f"beginning and ending with a letter or digit, and none of {', '.join(sorted(RESERVED_NAMES))}"
            )
        return super().__new__(cls, text)


class AccountKind(enum.StrEnum):
    """Kind of an account. A user is a person. A robot is a program, such as a CI job; it has no password and logs in
    with API tokens only."""

    USER = "user"
    ROBOT = "robot"


class Action(enum.IntFlag):
    """A set of actions on a repository. No action implies another one: `PUSH` does not include `PULL`. `ADMIN` is the
    right to grant others all actions on the repository."""

    NONE = 0
    PULL = 1
    PUSH = 2
    DELETE = 4
    ADMIN = 8

    @classmethod
    def parse(cls, text: str) -> Action:
        """Parses a list such as `pull,push`; `*` means all actions. Raises ValueError, with a text for the user."""
        found = cls.NONE
        for word in filter(None, (part.strip().lower() for part in text.split(","))):
            if word != "*" and word.upper() not in cls.__members__:
                raise ValueError(f"{word!r} is not an action; there are pull, push, delete and admin")
            found |= EVERY_ACTION if word == "*" else cls[word.upper()]
        if not found:
            raise ValueError("no action is named; there are pull, push, delete and admin")
        return found

    @property
    def words(self) -> list[str]:
        """The actions of the set as words, such as `["pull", "push"]`, always in the same order."""
        return [action.name.lower() for action in EVERY_ACTION if action in self and action.name]


EVERY_ACTION = Action.PULL | Action.PUSH | Action.DELETE | Action.ADMIN


class GranteeKind(enum.StrEnum):
    """Kind of a grantee. `everyone` means all clients, also anonymous ones; `authenticated` means all clients that have
    logged in."""

    USER = "user"
    ROBOT = "robot"
    GROUP = "group"
    EVERYONE = "everyone"
    AUTHENTICATED = "authenticated"


@dataclass(frozen=True, slots=True, order=True)
class Grantee:
    """Those who get a grant, in text form `user:alice`, `robot:ci`, `group:dev`, `everyone` or `authenticated`. `name`
    is empty for the last two. A user need not have an account in the store: users of an htpasswd file or of an external
    token issuer have none."""

    kind: GranteeKind
    name: str = ""

    @classmethod
    def parse(cls, text: str) -> Grantee:
        """Parses the text form, such as `user:alice`. Raises AccountInvalid."""
        kind, colon, name = text.partition(":")
        if kind not in set(GranteeKind) or bool(colon) == (kind in (GranteeKind.EVERYONE, GranteeKind.AUTHENTICATED)):
            raise AccountInvalid(
                f"{shown(text)} cannot get a grant: write user:NAME, robot:NAME, group:NAME, everyone or authenticated"
            )
        return cls(GranteeKind(kind), AccountName(name) if colon else "")

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}" if self.name else str(self.kind)


@dataclass(frozen=True, slots=True)
class Account:
    """An account. `enabled`: False if it may not log in. `admin`: it may do everything. `version` is incremented by
    every change that invalidates earlier logins: disabling the account, setting a password. `created`: seconds since
    1970. `groups`: the groups that it is a member of. `note`: free text for people."""

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
    """Allows `subject` the `actions` on all repositories whose names match `pattern`. For each pair of subject and
    pattern there is at most one grant."""

    subject: Grantee
    pattern: NamePattern
    actions: Action


@dataclass(frozen=True, slots=True)
class TokenLimit:
    """One permission of a limited API token: `actions` on the repositories whose names match `pattern`. It gives the
    token no action that its account does not have."""

    pattern: NamePattern
    actions: Action


@dataclass(frozen=True, slots=True)
class ApiToken:
    """An API token: a secret that an account uses in place of its password. `purpose`: `personal` for tokens that
    people make, `login` for refresh tokens that `docker login` gets. `note`: free text for people. `created`, `expires`
    and `used` are seconds since 1970. `expires`: None if the token never expires. `limits`: None if the token has all
    rights of its account. `used`: approximate time of the last use; None if it was never used."""

    id: str
    account: AccountName
    purpose: Literal["personal", "login"]
    note: str
    created: float
    expires: float | None = None
    limits: tuple[TokenLimit, ...] | None = None
    used: float | None = None


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A key that signs the bearer tokens of `/token`. All times are seconds since 1970. `retired`: when another key
    replaced it; None for the key that signs now. `until`: when a replaced key stops verifying tokens; None for the key
    that signs now."""

    id: str
    secret: bytes = field(repr=False)
    created: float
    retired: float | None = None
    until: float | None = None


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """A line of the audit log. `at`: time in seconds since 1970. `actor`: name of the account that acted, or
    `anonymous`. `target`: the object of the action, such as `alice`, `group:dev`, `team/app`, `team/app:latest` or
    `team/app@sha256:…`. `address`: the client's IP address. `count`: number of equal events that this line stands for,
    because equal logins and denials are combined into one line. `id`: position in the log, for `AuditQuery.before`; the
    store sets it."""

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
    """A filter for lines of the audit log. A line must match all fields that are not None. `target`: the name of a
    repository also matches lines about its tags and manifests. `since`: only lines from this time on, in seconds since
    1970. `before`: only lines older than the line with this id."""

    actor: str | None = None
    action: str | None = None
    target: str | None = None
    outcome: str | None = None
    since: float | None = None
    before: str | None = None
