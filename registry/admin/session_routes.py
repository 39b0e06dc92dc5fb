"""Routes of `/api/v1/sessions`: the login sessions of people in their browsers.

The docstrings of the routes are the descriptions in the OpenAPI document; "you" is the caller, the account that sends
the request.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Query
from pydantic import BaseModel

from registry.admin import models
from registry.admin.caller import Caller, LoggedInCaller
from registry.admin.management_router import management_router
from storage.access import AccountName

AccountQuery = Annotated[str | None, Query(description="The account; if omitted, your own", max_length=80)]

router = management_router()


class LoginSessionList(BaseModel):
    """The sessions of an account, the newest first. `current` is the id of the session that you used for this
    request; null if you used no session."""

    current: str | None
    items: list[models.LoginSessionResponse]


class EndedLoginSessions(BaseModel):
    """The number of sessions that were ended."""

    ended: int


@router.get("/sessions", tags=["sessions"])
async def list_sessions(caller: LoggedInCaller, account: AccountQuery = None) -> LoginSessionList:
    """Lists your sessions, one for each login with a browser: when and from where you logged in, and when the last
    request came. An admin may list the sessions of every account. An account has at most 20 sessions. A login beyond
    this limit ends the least recently used session."""
    name = _requested_account(caller, account)
    caller.rights.check_may_see(name)
    items = [models.LoginSessionResponse.from_stored(session) for session in caller.administration.sessions(name)]
    return LoginSessionList(current=caller.rights.session_id, items=items)


@router.delete("/sessions/{id}", status_code=204, tags=["sessions"])
async def end_session(caller: LoggedInCaller, session_id: Annotated[str, Path(alias="id", max_length=40)]) -> None:
    """Ends one of your sessions. You may also end the current session. An admin may end every session. All later
    requests with the ended session are refused. Answers 404 for a session that has ended or that you may not see."""
    session, _secret_hash = caller.accounts.login_session(session_id)
    caller.rights.check_may_end(session)
    await caller.administration.end_session(session_id, by=caller.actor)


@router.delete("/sessions", tags=["sessions"])
async def end_other_sessions(caller: LoggedInCaller, account: AccountQuery = None) -> EndedLoginSessions:
    """Ends all of your sessions except the current session. An admin may end all sessions of another account."""
    name = _requested_account(caller, account)
    caller.rights.check_may_end_sessions(name)
    return EndedLoginSessions(
        ended=await caller.administration.end_sessions(name, except_id=caller.rights.session_id, by=caller.actor)
    )


def _requested_account(caller: Caller, name: str | None) -> AccountName:
    """Returns the account that the request names. If the request names no account, returns the caller's account."""
    return AccountName(caller.rights.account_name if name is None else name)
