"""The route of `/api/v1/rights`, which shows what an account may do on a repository, and which grants allow it. The
docstring of the route is the description in the OpenAPI document."""

from __future__ import annotations

from typing import Annotated, Final, Self

from fastapi import Query, Request
from pydantic import BaseModel, Field

from registry.admin import models
from registry.admin.caller import Caller, LoggedInCaller
from registry.admin.management_router import management_router
from registry.auth.rights.explanation import RepositoryRights, RightsExplanation, explain_rights
from storage.access import AccountName
from storage.content import Actor
from storage.names import RepositoryName

ANONYMOUS_NAME: Final = Actor().name
"""The name that stands for a client without a login."""

router = management_router()


class RepositoryRightsResponse(BaseModel):
    """What is allowed on the repository that is stored under `name`. `upstream`: from which it is mirrored; null: it is
    hosted. `grants`: those that apply to it; the first 100 of them."""

    name: str
    upstream: str | None
    actions: list[models.ActionWord]
    grants: list[models.GrantResponse]

    @classmethod
    def from_rights(cls, rights: RepositoryRights) -> Self:
        return cls(
            name=rights.name,
            upstream=rights.upstream,
            actions=models.action_words(rights.actions),
            grants=[models.GrantResponse.from_stored(grant) for grant in rights.grants],
        )


class RightsResponse(BaseModel):
    """What an account may do. `account`: null for a client without a login. `stored`: whether the store has the
    account; false for a client without a login. If an account is not stored, its rights are those that it would have if
    the htpasswd file had an account of that name. An account that is not `enabled` may do nothing. Grants have no
    effect if `admin` or `open` is true. `repositories`: the repositories that the name in the request can mean. A name
    without a host, such as `team/app`, can mean two: a hosted repository, and one of the default upstream."""

    account: str | None
    stored: bool
    enabled: bool
    admin: Annotated[bool, Field(description="May do everything")]
    open: Annotated[bool, Field(description="There are no accounts yet")]
    repositories: list[RepositoryRightsResponse]

    @classmethod
    def from_explanation(cls, explanation: RightsExplanation) -> Self:
        return cls(
            account=explanation.account,
            stored=explanation.is_stored,
            enabled=explanation.is_enabled,
            admin=explanation.is_admin,
            open=explanation.is_registry_open,
            repositories=[RepositoryRightsResponse.from_rights(rights) for rights in explanation.repositories],
        )


@router.get("/rights", tags=["grants"])
async def explain_rights_on(
    request: Request,
    caller: LoggedInCaller,
    repository: Annotated[
        str, Query(description="The repository's name in image references", max_length=255, examples=["team/app"])
    ],
    account: Annotated[
        str | None,
        Query(alias="for", description="If omitted, your own account; `anonymous`: without a login", max_length=80),
    ] = None,
) -> RightsResponse:
    """Shows what an account may do on a repository, and by which grants. You may ask about your own account and about
    clients without a login, an admin about every account. Groups that an OpenID provider names at a login, and limits
    of API tokens, are not taken into account."""
    name = visible_account(caller, account)
    policy = request.app.service.access.policy
    return RightsResponse.from_explanation(await explain_rights(policy, name, RepositoryName(repository)))


def visible_account(caller: Caller, text: str | None) -> AccountName | None:
    """Returns the account whose rights the caller wants to see; None means a client without a login. If `text` is None,
    this is the caller's own account. Raises AccountInvalid, and AccountUnknown if the caller may not see the
    account."""
    if text == ANONYMOUS_NAME or (text is None and caller.rights.name is None):
        return None
    name = AccountName(text or caller.rights.account_name)
    caller.rights.check_may_see(name)
    return name
