"""The route `/api/v1/rights`: shows what an account may do on a repository, and which grants allow it. The docstring of
the route is the description in the OpenAPI document."""

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
"""The name for a client without a login."""

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
        Query(
            alias="for",
            description="An account, or `anonymous` for clients without a login. Default: your own account",
            max_length=80,
        ),
    ] = None,
) -> RightsResponse:
    """Shows what an account may do on a repository, and by which grants. You may ask about your own account and about
    clients without a login. An admin may ask about every account. The answer ignores the groups that an OpenID provider
    names at a login, and the limits of API tokens."""
    name = require_visible_account(caller, account)
    policy = request.app.service.access.policy
    return RightsResponse.from_explanation(await explain_rights(policy, name, RepositoryName(repository)))


def require_visible_account(caller: Caller, text: str | None) -> AccountName | None:
    """Returns the account that `text` names; None: a client without a login. If `text` is None, returns the account of
    the caller. Raises AccountInvalid if `text` is no name of an account, and AccountUnknown if the caller may not see
    the account."""
    if text == ANONYMOUS_NAME or (text is None and caller.rights.name is None):
        return None
    name = AccountName(text or caller.rights.account_name)
    caller.rights.check_may_see(name)
    return name
