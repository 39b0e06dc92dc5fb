"""Types of access control: accounts, groups, API tokens, grants, keys, and the audit log.

`storage.accounts.Accounts` stores them; `registry.auth` decides by them. Passwords and API tokens are stored as hashes,
keys that sign tokens in plain form.
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
"""Names with another meaning, which no account or group may have."""


class AccountInvalid(RegistryError):
    """A name, a password or another part of an account is not valid."""

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
    """Refused: no enabled admin would be left."""

    code = "LAST_ADMIN"
    default = "that is the last admin who is enabled; make somebody else one before"


class AccountName(str):
    """Name of an account or a group: at most 64 lower-case letters, digits, '.', '_' and '-'. People, robots and
    groups share one set of names. The constructor raises AccountInvalid."""

    __slots__ = ()

    def __new__(cls, text: str) -> Self:
        if not _ACCOUNT.fullmatch(text) or text in RESERVED:
            raise AccountInvalid(
                f"{shown(text)} is no name for an account: up to 64 lower-case letters, digits, '.', '_' and '-', "
                f"beginning and ending with a letter or digit, and none of {', '.join(sorted(RESERVED))}"
            )
        return super().__new__(cls, text)


class AccountKind(enum.StrEnum):
    """Kind of an account. A robot has no password and logs in with API tokens only."""

    USER = "user"
    ROBOT = "robot"


class Action(enum.IntFlag):
    """Actions on a repository. None implies another; `ADMIN` is the right to grant all of them."""

    NONE = 0
    PULL = 1
    PUSH = 2
    DELETE = 4
    ADMIN = 8

    @classmethod
    def parse(cls, text: str) -> Action:
        """Parses a list such as `pull,push`; `*` means all. Raises ValueError."""
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
        """Returns the actions as words, such as `["pull", "push"]`, in a fixed order."""
        return [action.name.lower() for action in EVERY_ACTION if action in self and action.name]


EVERY_ACTION = Action.PULL | Action.PUSH | Action.DELETE | Action.ADMIN


class GranteeKind(enum.StrEnum):
    """Kind of a grantee. `everyone` includes anonymous clients; `authenticated` means every account."""

    USER = "user"
    ROBOT = "robot"
    GROUP = "group"
    EVERYONE = "everyone"
    AUTHENTICATED = "authenticated"


@dataclass(frozen=True, slots=True, order=True)
class Grantee:
    """Who gets a grant: `user:alice`, `group:dev`, `everyone`. A user need not have an account here (htpasswd, external
    issuers)."""

    kind: GranteeKind
    name: str = ""

    @classmethod
    def parse(cls, text: str) -> Grantee:
        """Parses the text form. Raises AccountInvalid."""
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
    """An account. `version` grows with every change that invalidates earlier logins: disabling, a new password. An
    `admin` may do everything. Times are seconds since 1970."""

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
    """Allows `subject` the `actions` on the repositories that `pattern` matches. There is one per subject and
    pattern."""

    subject: Grantee
    pattern: NamePattern
    actions: Action


@dataclass(frozen=True, slots=True)
class TokenLimit:
    """Limits an API token to `actions` on the repositories that `pattern` matches, as far as its account has them."""

    pattern: NamePattern
    actions: Action


@dataclass(frozen=True, slots=True)
class ApiToken:
    """A secret that replaces the password of an account. `limits` None: all rights of the account. `purpose`:
    `personal` for tokens that people make, `login` for refresh tokens that `docker login` gets. Times are seconds since
    1970. `expires` None: never. `used`: about when it was last used; None: never."""

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
    """A key that signs the tokens of `/token`. `retired`: since when it does not sign any more; tokens that it signed
    are valid until `until` at most. Times are seconds since 1970."""

    id: str
    secret: bytes = field(repr=False)
    created: float
    retired: float | None = None
    until: float | None = None


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """A line of the audit log. `target`: what was acted on: `alice`, `group:dev`, `team/app`, `team/app:latest`,
    `team/app@sha256:…`. `count`: number of equal events that this line stands for (logins and denials are combined).
    `id`: position in the log, for `AuditQuery.before`; the store sets it."""

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
    """A filter for lines; all fields that are given must match. `target`: a repository also matches its tags and
    manifests. `since`: seconds since 1970. `before`: only lines older than the one with this id."""

    actor: str | None = None
    action: str | None = None
    target: str | None = None
    outcome: str | None = None
    since: float | None = None
    before: str | None = None
