"""Bodies and answers of the management API, which `--json` of the commands prints as well. Times are UTC."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from registry.auth.administration import parse_actions, parse_pattern
from registry.config import parse_duration
from storage import access
from storage.content import Page

T = TypeVar("T")
S = TypeVar("S")
ActionWord = Literal["pull", "push", "delete", "admin"]
Note = Annotated[str, Field(description="One line for people", max_length=200, examples=["on call"])]
Name = Annotated[str, Field(description="Lower-case letters, digits, `.`, `_`, `-`; at most 64", examples=["alice"])]
Pattern = Annotated[
    str,
    Field(
        description="An exact name, or a prefix that ends with `*` (any text without a slash) or `**` (any text)",
        max_length=255,
        examples=["team/**"],
    ),
]
Actions = Annotated[list[ActionWord], Field(min_length=1, examples=[["pull", "push"]])]
SubjectText = Annotated[
    str,
    Field(
        description="`user:NAME`, `robot:NAME`, `group:NAME`, `authenticated` (every account), `everyone`",
        max_length=80,
        examples=["group:dev"],
    ),
]


class BodyModel(BaseModel):
    """A request body. Unknown fields are errors; error texts never show the input."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


class Listed(BaseModel, Generic[T]):
    """A page of a list. Send `next` as `after` for the following page; null means that this page is the last."""

    items: list[T]
    next: str | None = None


def listed(page: Page[S], model: Callable[[S], T], key: Callable[[S], str]) -> Listed[T]:
    """Returns a page as a model. `next` is the key of its last item; a caller whose page ends elsewhere sets it."""
    following = key(page.items[-1]) if page.more and page.items else None
    return Listed(items=[model(item) for item in page.items], next=following)


def to_datetime(seconds: float) -> datetime:
    """Converts seconds since 1970 to a UTC time, rounded to milliseconds."""
    return datetime.fromtimestamp(round(seconds, 3), UTC)


def to_datetime_or_none(seconds: float | None) -> datetime | None:
    return None if seconds is None else to_datetime(seconds)


class Account(BaseModel):
    name: Name
    kind: Literal["user", "robot"]
    enabled: bool
    admin: Annotated[bool, Field(description="May do everything")]
    groups: list[str]
    note: str
    created: datetime

    @classmethod
    def of(cls, account: access.Account) -> Self:
        return cls(
            name=account.name,
            kind="user" if account.kind is access.AccountKind.USER else "robot",
            enabled=account.enabled,
            admin=account.admin,
            groups=list(account.groups),
            note=account.note,
            created=to_datetime(account.created),
        )


class Grant(BaseModel):
    """`subject` may do `actions` on the repositories that `pattern` matches."""

    subject: SubjectText
    pattern: Pattern
    actions: list[ActionWord]

    @classmethod
    def of(cls, grant: access.Grant) -> Self:
        return cls(subject=str(grant.subject), pattern=grant.pattern, actions=action_words(grant.actions))


class ShownAccount(Account):
    """`grants` are all that count for the account, including those of its groups, of all accounts and of everyone.
    `more_grants` means that there are more; `/api/v1/grants?for=NAME` lists all."""

    grants: list[Grant]
    more_grants: bool = False

    @classmethod
    def of_both(cls, account: access.Account, grants: Page[access.Grant]) -> Self:
        shown = [Grant.of(grant) for grant in grants.items]
        return cls(**Account.of(account).model_dump(), grants=shown, more_grants=grants.more)


class NewUser(BodyModel):
    name: Name
    password: Annotated[
        SecretStr | None,
        Field(description="If omitted, one is generated and shown once", examples=["correct horse battery"]),
    ] = None
    admin: bool = False
    note: Note = ""


class AddedUser(Account):
    """`password` is the generated one; this answer alone shows it."""

    password: Annotated[str | None, Field(examples=["8wq2-cn4r-q7mz-k3tb"])] = None


class UserChange(BodyModel):
    """Omitted fields stay as they are."""

    enabled: bool | None = None
    admin: bool | None = None


class NewRobot(BodyModel):
    name: Annotated[Name, Field(examples=["ci"])]
    note: Note = ""


class RobotChange(BodyModel):
    enabled: bool


class NewPassword(BodyModel):
    """`old` is needed for your own password. If `new` is omitted, a password is generated and shown once."""

    old: SecretStr | None = None
    new: SecretStr | None = None


class Password(BaseModel):
    """The generated password; null if the request gave one."""

    password: str | None = None


class NewGroup(BodyModel):
    name: Annotated[Name, Field(examples=["dev"])]


class Group(BaseModel):
    name: str
    members: list[str]

    @classmethod
    def of(cls, group: tuple[str, Sequence[str]]) -> Self:
        return cls(name=group[0], members=list(group[1]))


class NewGrant(BodyModel):
    """Replaces what the subject had for that pattern."""

    subject: SubjectText
    pattern: Pattern
    actions: Actions


class Limit(BodyModel):
    """`actions` on the repositories that `pattern` matches."""

    pattern: Pattern
    actions: Actions

    @classmethod
    def of(cls, limit: access.TokenLimit) -> Self:
        return cls(pattern=limit.pattern, actions=action_words(limit.actions))

    def parse(self) -> access.TokenLimit:
        """Returns the limit. Raises AccountInvalid."""
        return access.TokenLimit(parse_pattern(self.pattern), parse_action_words(self.actions))


class Token(BaseModel):
    """`limits` null means that the token may do all that its account may. Tokens of the purpose `login` were given to
    clients by `/token`."""

    id: str
    account: str
    purpose: Literal["personal", "login"]
    note: str
    created: datetime
    expires: datetime | None
    used: Annotated[datetime | None, Field(description="The last use, to the hour")]
    limits: list[Limit] | None

    @classmethod
    def of(cls, token: access.ApiToken) -> Self:
        return cls(
            id=token.id,
            account=token.account,
            purpose=token.purpose,
            note=token.note,
            created=to_datetime(token.created),
            expires=to_datetime_or_none(token.expires),
            used=to_datetime_or_none(token.used),
            limits=None if token.limits is None else [Limit.of(limit) for limit in token.limits],
        )


class AddedToken(Token):
    """`secret` is what the holder logs in with; this answer alone shows it."""

    secret: str


class NewToken(BodyModel):
    account: Annotated[str | None, Field(description="If omitted, your own", examples=["ci"])] = None
    note: Note = ""
    expires_in: Annotated[
        str | None, Field(description="If omitted, it never expires", examples=["90d"], max_length=20)
    ] = None
    limits: Annotated[list[Limit], Field(description="If omitted, all that the account may do", max_length=50)] = []

    @property
    def seconds(self) -> float | None:
        """The lifetime in seconds, if any. Raises AccountInvalid."""
        return None if self.expires_in is None else parse_seconds(self.expires_in)


class Rotation(BodyModel):
    """With `at_once`, nothing that an older key signed is accepted any more: use it when others may know the key."""

    at_once: bool = False


class Key(BaseModel):
    """A signing key. Since `retired` it signs no more. Its secret is never shown."""

    id: str
    created: datetime
    retired: datetime | None

    @classmethod
    def of(cls, key: access.SigningKey) -> Self:
        return cls(id=key.id, created=to_datetime(key.created), retired=to_datetime_or_none(key.retired))


class Line(BaseModel):
    """A line of the audit log. `count` is how often the same happened within about a second."""

    id: str
    at: datetime
    actor: str
    action: str
    target: str
    outcome: Literal["ok", "denied", "failed"]
    address: str
    request_id: str
    user_agent: str
    detail: dict[str, Any] | None
    count: int

    @classmethod
    def of(cls, entry: access.AuditEntry) -> Self:
        return cls(
            id=entry.id,
            at=to_datetime(entry.at),
            actor=entry.actor,
            action=entry.action,
            target=entry.target,
            outcome=entry.outcome,
            address=entry.address,
            request_id=entry.request_id,
            user_agent=entry.user_agent,
            detail=None if entry.detail is None else dict(entry.detail),
            count=entry.count,
        )


class Me(BaseModel):
    """The caller. `account` is null without a login, and for accounts that are not in the store (htpasswd, an issuer).
    `open` means that there are no accounts yet, and everyone may do everything. `more_grants` means that there are more
    grants; `/api/v1/grants?for=NAME` lists all."""

    name: str | None
    account: Account | None
    admin: bool
    open: bool
    grants: list[Grant]
    more_grants: bool = False


def action_words(actions: access.Action) -> list[ActionWord]:
    """Returns the words for a set of actions, always in the same order."""
    every: tuple[ActionWord, ...] = ("pull", "push", "delete", "admin")
    return [word for word in every if word in actions.words]


def parse_action_words(words: Sequence[ActionWord]) -> access.Action:
    """Returns the actions that `words` name. Raises AccountInvalid."""
    return parse_actions(",".join(words))


def parse_seconds(text: str) -> float:
    """Parses a duration such as `90d` to seconds. Raises AccountInvalid."""
    try:
        seconds = parse_duration(text)
    except ValueError as error:
        raise access.AccountInvalid(str(error)) from None
    assert isinstance(seconds, float)
    return seconds
