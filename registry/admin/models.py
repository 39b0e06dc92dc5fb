"""Pydantic models of the management API: the bodies of its requests and responses. The account commands print the same
models if they get `--json`.

The class names, docstrings and field descriptions appear in the OpenAPI document. A method `from_stored` builds a
response from the stored object (`storage.access`). Times are in UTC.

AccountInvalid is the error for invalid changes or queries of accounts, groups, grants, API tokens and the audit log.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, Field, SecretStr

from registry.admin.body_model import BodyModel, FailFastList
from registry.auth.administration import parse_actions, parse_pattern
from registry.browse.models import utc_time
from registry.config import parse_duration
from storage import access
from storage.content import Page

ModelT = TypeVar("ModelT")
StoredT = TypeVar("StoredT")
ActionWord = Literal["pull", "push", "delete", "admin"]
NoteText = Annotated[str, Field(description="A remark for people, in one line", max_length=200, examples=["on call"])]
UtcTime = Annotated[datetime, AfterValidator(lambda moment: moment if moment.tzinfo else moment.replace(tzinfo=UTC))]
"""A time that a client sends. A time without a zone is in UTC."""
NameText = Annotated[
    str, Field(description="At most 64 lower-case letters, digits, `.`, `_` and `-`", examples=["alice"])
]
PatternText = Annotated[
    str,
    Field(
        description="An exact name, or a prefix that ends with `*` (any text without a slash) or `**` (any text)",
        max_length=255,
        examples=["team/**"],
    ),
]
ActionWords = Annotated[FailFastList[ActionWord], Field(min_length=1, max_length=20, examples=[["pull", "push"]])]
SubjectText = Annotated[
    str,
    Field(
        description="`user:NAME`, `robot:NAME`, `group:NAME`, `authenticated` (every account), `everyone`",
        max_length=80,
        examples=["group:dev"],
    ),
]


class ListPage(BaseModel, Generic[ModelT]):
    """A page of a list. To get the next page, send `next` as the query parameter `after`. `next` is null on the last
    page."""

    items: list[ModelT]
    next: str | None = None


def list_page(
    page: Page[StoredT], to_model: Callable[[StoredT], ModelT], sort_key: Callable[[StoredT], str]
) -> ListPage[ModelT]:
    """Converts a page of stored objects to a `ListPage`. `to_model` converts one object. `sort_key` returns the text by
    which the store sorts an object. The field `next` is the sort key of the last item; None on the last page."""
    next_key = sort_key(page.items[-1]) if page.more and page.items else None
    return ListPage(items=[to_model(item) for item in page.items], next=next_key)


def to_datetime(seconds: float) -> datetime:
    """Converts a time in seconds since 1970 to a datetime in UTC."""
    return utc_time(seconds)


def to_datetime_or_none(seconds: float | None) -> datetime | None:
    """Returns `to_datetime(seconds)`; None if `seconds` is None."""
    return None if seconds is None else to_datetime(seconds)


class AccountResponse(BaseModel):
    """An account of a person (`user`) or a program (`robot`)."""

    name: NameText
    kind: Literal["user", "robot"]
    enabled: bool
    admin: Annotated[bool, Field(description="May do everything")]
    groups: list[str]
    note: str
    created: datetime

    @classmethod
    def from_stored(cls, account: access.Account) -> Self:
        return cls(
            name=account.name,
            kind="user" if account.kind is access.AccountKind.USER else "robot",
            enabled=account.enabled,
            admin=account.admin,
            groups=list(account.groups),
            note=account.note,
            created=to_datetime(account.created),
        )


class GrantResponse(BaseModel):
    """`subject` may do `actions` on the repositories that `pattern` matches."""

    subject: SubjectText
    pattern: PatternText
    actions: list[ActionWord]

    @classmethod
    def from_stored(cls, grant: access.Grant) -> Self:
        return cls(subject=str(grant.subject), pattern=grant.pattern, actions=action_words(grant.actions))


class AccountWithGrants(AccountResponse):
    """An account with the grants to the account, to its groups, to `authenticated` and to `everyone`. If `more_grants`
    is true, `grants` has only the first of these grants; `/api/v1/grants?for=NAME` lists all of them."""

    grants: list[GrantResponse]
    more_grants: bool = False

    @classmethod
    def from_stored_with_grants(cls, account: access.Account, grants: Page[access.Grant]) -> Self:
        return cls(
            **AccountResponse.from_stored(account).model_dump(),
            grants=[GrantResponse.from_stored(grant) for grant in grants.items],
            more_grants=grants.more,
        )


class NewUser(BodyModel):
    """A person's account to add."""

    name: NameText
    password: Annotated[
        SecretStr | None,
        Field(description="If omitted, a password is generated and shown once", examples=["correct horse battery"]),
    ] = None
    admin: bool = False
    note: NoteText = ""


class AddedAccount(AccountResponse):
    """A new account. `notes` tells which existing grants and groups already apply to the account, and whether the
    account replaces an account in the htpasswd file."""

    notes: Annotated[list[str], Field(examples=[["alice had grants already, which apply to this account"]])]


class AddedUser(AddedAccount):
    """A new account of a person. `password` is the generated password, which only this response shows; null if the
    request gave a password."""

    password: Annotated[str | None, Field(examples=["k7q2m-8wq2c-n4rq7-mzk3t"])] = None


class UserChange(BodyModel):
    """Changes to a person's account. A field that is omitted or null changes nothing."""

    enabled: bool | None = None
    admin: bool | None = None


class NewRobot(BodyModel):
    """A robot account to add."""

    name: Annotated[NameText, Field(examples=["ci"])]
    note: NoteText = ""


class RobotChange(BodyModel):
    """A change to a robot account."""

    enabled: bool


class NewPassword(BodyModel):
    """A password to set. `old` is the current password; it is required if you set your own password. If `new` is
    omitted, the registry generates a password and shows it once."""

    old: SecretStr | None = None
    new: SecretStr | None = None


class GeneratedPassword(BaseModel):
    """`password` is the generated password; null if the request gave a password."""

    password: str | None = None


class NewGroup(BodyModel):
    """A group to add, without members."""

    name: Annotated[NameText, Field(examples=["dev"])]


class GroupResponse(BaseModel):
    """A group and the names of its members."""

    name: str
    members: list[str]

    @classmethod
    def from_stored(cls, group: tuple[str, Sequence[str]]) -> Self:
        """Builds the response from the group's name and its members."""
        name, members = group
        return cls(name=name, members=list(members))


class NewGrant(BodyModel):
    """A grant to add. The new grant replaces an earlier grant to the same subject for the same pattern."""

    subject: SubjectText
    pattern: PatternText
    actions: ActionWords


class RepositoryLimit(BodyModel):
    """Limits an API token to `actions` on the repositories that `pattern` matches."""

    pattern: PatternText
    actions: ActionWords

    @classmethod
    def from_stored(cls, limit: access.TokenLimit) -> Self:
        return cls(pattern=limit.pattern, actions=action_words(limit.actions))

    def to_token_limit(self) -> access.TokenLimit:
        """Converts the limit to the class that the store uses. Raises AccountInvalid for an invalid pattern."""
        return access.TokenLimit(parse_pattern(self.pattern), parse_action_words(self.actions))


class ApiTokenResponse(BaseModel):
    """An API token without its secret. If `limits` is null, the token may do everything that its account may do.
    `purpose` is `personal` for a token that a person added, and `login` for a refresh token that a client got from
    `/token`."""

    id: str
    account: str
    purpose: Literal["personal", "login"]
    note: str
    created: datetime
    expires: datetime | None
    used: Annotated[datetime | None, Field(description="Time of the last use, recorded at most once an hour")]
    limits: list[RepositoryLimit] | None

    @classmethod
    def from_stored(cls, token: access.ApiToken) -> Self:
        return cls(
            id=token.id,
            account=token.account,
            purpose=token.purpose,
            note=token.note,
            created=to_datetime(token.created),
            expires=to_datetime_or_none(token.expires),
            used=to_datetime_or_none(token.used),
            limits=None if token.limits is None else [RepositoryLimit.from_stored(limit) for limit in token.limits],
        )


class AddedToken(ApiTokenResponse):
    """A new API token. A client sends `secret` instead of a password. Only this response shows `secret`."""

    secret: str


class LoginSessionResponse(BaseModel):
    """The session of a person who logged in with a browser. `method` is how the person logged in: with a `password`, or
    at the OpenID provider (`openid`). `address` and `user_agent` are those of the browser at the login."""

    id: str
    account: str
    method: Literal["password", "openid"]
    created: datetime
    expires: datetime
    seen: Annotated[datetime, Field(description="Time of the last request, recorded at most once in ten minutes")]
    address: str
    user_agent: str

    @classmethod
    def from_stored(cls, session: access.LoginSession) -> Self:
        return cls(
            id=session.id,
            account=session.account,
            method=session.method,
            created=to_datetime(session.created),
            expires=to_datetime(session.expires),
            seen=to_datetime(session.seen),
            address=session.address,
            user_agent=session.user_agent,
        )


class NewToken(BodyModel):
    """An API token to add."""

    account: Annotated[str | None, Field(description="If omitted, your own account", examples=["ci"])] = None
    note: NoteText = ""
    expires_in: Annotated[
        str | None, Field(description="Lifetime; if omitted, the token never expires", examples=["90d"], max_length=20)
    ] = None
    limits: FailFastList[RepositoryLimit] = Field(
        default=[], description="If omitted, the token may do all that its account may do", max_length=50
    )

    @property
    def lifetime_seconds(self) -> float | None:
        """The lifetime in seconds; None if the token never expires. Raises AccountInvalid if `expires_in` is not a
        duration."""
        return None if self.expires_in is None else parse_seconds(self.expires_in)


class KeyRotation(BodyModel):
    """How to replace the signing key. If `at_once` is false, tokens that an older key signed stay valid until they
    expire. If `at_once` is true, these tokens are rejected immediately: use this if an older key may have leaked."""

    at_once: bool = False


class SigningKeyResponse(BaseModel):
    """A key that signs the tokens of `/token`, without its secret. `retired` is the time at which the key stopped
    signing new tokens; null for the current key."""

    id: str
    created: datetime
    retired: datetime | None

    @classmethod
    def from_stored(cls, key: access.SigningKey) -> Self:
        return cls(id=key.id, created=to_datetime(key.created), retired=to_datetime_or_none(key.retired))


class AuditEntryResponse(BaseModel):
    """An entry of the audit log. Equal events within about a second share one entry. `count` is the number of these
    events."""

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
    def from_stored(cls, entry: access.AuditEntry) -> Self:
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


class CallerResponse(BaseModel):
    """The account that sent the request. Without a login, `name` and `account` are null. For an account that exists
    only in an htpasswd file, `account` is null. If `open` is true, there are no accounts yet, and everyone may pull,
    push and delete. If `more_grants` is true, `grants` has only the first grants that apply to the account;
    `/api/v1/grants?for=NAME` lists all of them."""

    name: str | None
    account: AccountResponse | None
    admin: bool
    open: bool
    grants: list[GrantResponse]
    more_grants: bool = False


def action_words(actions: access.Action) -> list[ActionWord]:
    """Returns the words for a set of actions, always in the same order."""
    all_words: tuple[ActionWord, ...] = ("pull", "push", "delete", "admin")
    return [word for word in all_words if word in actions.words]


def parse_action_words(words: Sequence[ActionWord]) -> access.Action:
    """Returns the set of actions that `words` name. Raises AccountInvalid if there are no words."""
    return parse_actions(",".join(words))


def parse_seconds(text: str) -> float:
    """Parses a duration such as `90d` and returns seconds. Raises AccountInvalid if `text` is not a duration."""
    try:
        seconds = parse_duration(text)
    except ValueError as error:
        raise access.AccountInvalid(str(error)) from None
    assert isinstance(seconds, float)
    return seconds
