"""What the management API takes and gives, and `--json` of the commands prints. Times are UTC."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, SecretStr

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
        description="Of repository names: `*` inside a segment, `**` over all below",
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
    """A body. A name that is not known is an error; input is never shown in one."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


class Listed(BaseModel, Generic[T]):
    """A part of a list. `next`: give it as `after` for the part that follows; null: that was all."""

    items: list[T]
    next: str | None = None


def listed(page: Page[S], model: Callable[[S], T], key: Callable[[S], str]) -> Listed[T]:
    """Of a page that may go on after what is not shown, `next` is for the caller to set."""
    following = key(page.items[-1]) if page.more and page.items else None
    return Listed(items=[model(item) for item in page.items], next=following)


def to_datetime(seconds: float) -> datetime:
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
    """`subject` may do `actions` to what `pattern` matches."""

    subject: SubjectText
    pattern: Pattern
    actions: list[ActionWord]

    @classmethod
    def of(cls, grant: access.Grant) -> Self:
        return cls(subject=str(grant.subject), pattern=grant.pattern, actions=action_words(grant.actions))


class ShownAccount(Account):
    """`grants`: those that count for it, its groups', every account's and everybody's included. `more_grants`: there
    are more; `/api/v1/grants?for=NAME` lists all."""

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
        Field(description="Left out: one is made and shown once", examples=["correct horse battery"]),
    ] = None
    admin: bool = False
    note: Note = ""


class AddedUser(Account):
    """`password`: the one that was made, shown this once."""

    password: Annotated[str | None, Field(examples=["8wq2-cn4r-q7mz-k3tb"])] = None


class UserChange(BodyModel):
    """What is left out stays."""

    enabled: bool | None = None
    admin: bool | None = None


class NewRobot(BodyModel):
    name: Annotated[Name, Field(examples=["ci"])]
    note: Note = ""


class RobotChange(BodyModel):
    enabled: bool


class NewPassword(BodyModel):
    """`old`: for one's own. `new`: left out, one is made and shown once."""

    old: SecretStr | None = None
    new: SecretStr | None = None


class Password(BaseModel):
    """The password that was made; null where it was given."""

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
    """In place of what the subject had for that pattern."""

    subject: SubjectText
    pattern: Pattern
    actions: Actions


class Limit(BodyModel):
    """Actions on what a pattern matches."""

    pattern: Pattern
    actions: Actions

    @classmethod
    def of(cls, limit: access.TokenLimit) -> Self:
        return cls(pattern=limit.pattern, actions=action_words(limit.actions))


class Token(BaseModel):
    """`limits`: null: all that its account may do. `purpose`: `login` ones were given to clients by `/token`."""

    id: str
    account: str
    purpose: Literal["personal", "login"]
    note: str
    created: datetime
    expires: datetime | None
    used: Annotated[datetime | None, Field(description="About when last")]
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
    """`secret`: what its holder logs in with, shown this once."""

    secret: str


class NewToken(BodyModel):
    account: Annotated[str | None, Field(description="Left out: one's own", examples=["ci"])] = None
    note: Note = ""
    expires_in: Annotated[str | None, Field(description="Left out: it never does", examples=["90d"], max_length=20)] = (
        None
    )
    limits: Annotated[list[Limit], Field(description="Left out: all that the account may do", max_length=50)] = []

    @property
    def seconds(self) -> float | None:
        """Raises AccountInvalid."""
        return None if self.expires_in is None else parse_seconds(self.expires_in)


class Rotation(BodyModel):
    """`at_once`: nothing that was signed before is taken any more; for a key that others may have."""

    at_once: bool = False


class Key(BaseModel):
    """`retired`: signs no more since then. Its secret is never shown."""

    id: str
    created: datetime
    retired: datetime | None

    @classmethod
    def of(cls, key: access.SigningKey) -> Self:
        return cls(id=key.id, created=to_datetime(key.created), retired=to_datetime_or_none(key.retired))


class Line(BaseModel):
    """A line of the audit log. `count`: how often the same came within a moment."""

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
    """Who asks, and what they may do. `account`: null for nobody, and for one that is not in the store (htpasswd, an
    issuer). `open`: there are no accounts, and everybody may do everything. `more_grants`: there are more than these;
    `/api/v1/grants?for=NAME` lists all."""

    name: str | None
    account: Account | None
    admin: bool
    open: bool
    grants: list[Grant]
    more_grants: bool = False


def action_words(actions: access.Action) -> list[ActionWord]:
    every: tuple[ActionWord, ...] = ("pull", "push", "delete", "admin")
    return [word for word in every if word in actions.words]


def parse_seconds(text: str) -> float:
    """Seconds. Raises AccountInvalid."""
    try:
        seconds = parse_duration(text)
    except ValueError as error:
        raise access.AccountInvalid(str(error)) from None
    assert isinstance(seconds, float)
    return seconds
