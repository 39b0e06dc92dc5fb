"""The words of who may do what: accounts, groups, API tokens, grants, keys, and the audit log.

`storage.accounts.Accounts` keeps them; what somebody may do now, `registry.auth` puts together. Passwords and API
tokens are kept as hashes; keys that sign tokens as they are, since they are needed.
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

_ACCOUNT = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
RESERVED = frozenset({"anonymous", "everyone", "authenticated", "system"})
"""Names no account and no group may have, since they mean something else."""


class AccountInvalid(RegistryError):
    """A name, a password or another part of an account that is not valid."""

    code = "ACCOUNT_INVALID"
    default = "the account is not valid"


class AccountUnknown(RegistryError):
    """There is no such account, group, API token or grant."""

    code = "ACCOUNT_UNKNOWN"
    default = "there is no such account"


class AccountExists(RegistryError):
    code = "ACCOUNT_EXISTS"
    default = "that name is taken"


class LastAdmin(RegistryError):
    """Refused, since nobody would be left who may do everything."""

    code = "LAST_ADMIN"
    default = "that is the last admin who is enabled; make somebody else one before"


class AccountName(str):
    """What an account or a group is called: lower-case letters, digits, '.', '_' and '-', at most 64. People, robots
    and groups each have a name of their own: one that is taken is taken for all three. Raises AccountInvalid."""

    __slots__ = ()

    def __new__(cls, text: str) -> Self:
        if not _ACCOUNT.fullmatch(text) or text in RESERVED:
            raise AccountInvalid(
                f"{shown(text)} is no name for an account: up to 64 lower-case letters, digits, '.', '_' and '-', "
                f"beginning and ending with a letter or digit, and none of {', '.join(sorted(RESERVED))}"
            )
        return super().__new__(cls, text)


class AccountKind(enum.StrEnum):
    """What an account is. A robot has no password: it logs in with API tokens alone."""

    USER = "user"
    ROBOT = "robot"


class Action(enum.IntFlag):
    """What can be done to a repository. None of them implies another; `ADMIN` is the right to grant all of them."""

    NONE = 0
    PULL = 1
    PUSH = 2
    DELETE = 4
    ADMIN = 8

    @classmethod
    def parse(cls, text: str) -> Action:
        """`pull,push` as people and scopes write it; `*` is all. Raises ValueError."""
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
        """`["pull", "push"]`, always in the same order."""
        return [action.name.lower() for action in EVERY_ACTION if action in self and action.name]


EVERY_ACTION = Action.PULL | Action.PUSH | Action.DELETE | Action.ADMIN


class GranteeKind(enum.StrEnum):
    """Whom a grant is for. `everyone`: anonymous clients as well. `authenticated`: every account."""

    USER = "user"
    ROBOT = "robot"
    GROUP = "group"
    EVERYONE = "everyone"
    AUTHENTICATED = "authenticated"


@dataclass(frozen=True, slots=True, order=True)
class Grantee:
    """Whom a grant is for: `user:alice`, `group:dev`, `everyone`. The name of a user may be that of one who is not in
    the store (htpasswd, an external issuer)."""

    kind: GranteeKind
    name: str = ""

    @classmethod
    def parse(cls, text: str) -> Grantee:
        """Raises AccountInvalid."""
        kind, colon, name = text.partition(":")
        if kind not in set(GranteeKind) or bool(colon) == (kind in (GranteeKind.EVERYONE, GranteeKind.AUTHENTICATED)):
            raise AccountInvalid(
                f"{shown(text)} is nobody: write user:NAME, robot:NAME, group:NAME, everyone or authenticated"
            )
        return cls(GranteeKind(kind), AccountName(name) if colon else "")

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}" if self.name else str(self.kind)


@dataclass(frozen=True, slots=True)
class Account:
    """`version` grows with every change after which what was proved before counts no more: disabling, a new password.
    `admin`: may do everything, to every repository and account. Times are seconds since 1970."""

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
    """`subject` may do `actions` to the repositories that `pattern` matches. One row for each subject and pattern."""

    subject: Grantee
    pattern: NamePattern
    actions: Action


@dataclass(frozen=True, slots=True)
class TokenLimit:
    """What an API token is limited to, of what its account may do: `actions` on what `pattern` matches."""

    pattern: NamePattern
    actions: Action


@dataclass(frozen=True, slots=True)
class ApiToken:
    """A secret an account may log in with in place of its password. `limits`: None: all that the account may do.
    `purpose`: `personal` ones were made by somebody who was shown the secret once; `login` ones are refresh tokens that
    `docker login` was given. Times are seconds since 1970; `expires` None: never; `used` None: not yet, else about when
    last."""

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
    """Signs the tokens of `/token`. `retired`: signs no more since then, and what it signed is taken until `until`,
    whatever it says itself. Times are seconds since 1970."""

    id: str
    secret: bytes = field(repr=False)
    created: float
    retired: float | None = None
    until: float | None = None


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """A line of the audit log. `target`: whom or what: `alice`, `group:dev`, `team/app`, `team/app:latest`,
    `team/app@sha256:…`. `count`: how often the same came within a moment (logins and denials are gathered). `id`: where
    it stands in the log, for `AuditQuery.before`; the store gives it."""

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
    """Which lines: all of the fields that are given must hold. `target`: that of a repository finds what is in it as
    well. `since`: seconds since 1970. `before`: those that follow the line with this id, going back in time."""

    actor: str | None = None
    action: str | None = None
    target: str | None = None
    outcome: str | None = None
    since: float | None = None
    before: str | None = None
