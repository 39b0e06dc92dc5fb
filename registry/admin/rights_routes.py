"""The route of `/api/v1/rights`, which shows what an account may do on a repository, and which grants allow it. The
docstring of the route is the description in the OpenAPI document."""

from __future__ import annotations

from typing import Annotated, Final

from fastapi import Query, Request

from registry.admin.caller import Caller, LoggedInCaller
from registry.admin.management_router import management_router
from registry.admin.rights_models import RightsResponse
from registry.auth.rights.explanation import explain_rights
from storage.access import AccountName
from storage.content import Actor
from storage.names import RepositoryName

ANONYMOUS_NAME: Final = Actor().name
"""The name that stands for a client without a login."""

router = management_router()


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
