"""`/api/v1/tokens` and `/api/v1/keys`: what is logged in with, and what signs."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query

from registry.admin import models
from registry.admin.account_routes import AfterQuery, LimitQuery
from registry.admin.caller import AdminCaller, LoggedInCaller
from registry.admin.management_route import ManagementRoute
from registry.auth.administration import parse_actions, parse_pattern
from storage import access
from storage.access import AccountName

router = APIRouter(route_class=ManagementRoute)


@router.get("/tokens", tags=["tokens"])
async def list_tokens(
    caller: LoggedInCaller,
    account: Annotated[str | None, Query(description="Only of this account", max_length=80)] = None,
    after: AfterQuery = None,
    limit: LimitQuery = 100,
) -> models.Listed[models.Token]:
    """API tokens without their secrets: an admin sees all, others their own."""
    name = None if account is None else AccountName(account)
    if name is None and not caller.authority.admin:
        name = AccountName(caller.authority.somebody)
    if name is not None:
        caller.authority.check_may_see(name)
    page = caller.administration.accounts.tokens(name, after, limit)
    return models.listed(page, models.Token.of, lambda token: token.id)


@router.post("/tokens", status_code=201, tags=["tokens"])
async def add_token(caller: LoggedInCaller, body: models.NewToken) -> models.AddedToken:
    """Makes an API token: for oneself, logged in with the password; for anybody as an admin. `limits` only take away:
    what the account may not do, none of its tokens may. The secret is shown this once."""
    name = AccountName(body.account or caller.authority.name or "")
    caller.authority.check_may_add_credential(name)
    limits = [
        access.TokenLimit(parse_pattern(one.pattern), parse_actions(",".join(one.actions))) for one in body.limits
    ]
    token, secret = await caller.administration.add_token(
        name, note=body.note, expires_in=body.seconds, limits=limits, by=caller.actor
    )
    return models.AddedToken(**models.Token.of(token).model_dump(), secret=secret)


@router.delete("/tokens/{id}", status_code=204, tags=["tokens"])
async def revoke_token(caller: LoggedInCaller, token_id: Annotated[str, Path(alias="id", max_length=40)]) -> None:
    """Revokes an API token: one's own, or anybody's as an admin. It counts no more at the next request."""
    token, _ = caller.administration.accounts.token(token_id)
    caller.authority.check_token(token)
    await caller.administration.revoke_token(token_id, by=caller.actor)


@router.get("/keys", tags=["keys"])
async def list_keys(caller: AdminCaller) -> list[models.Key]:
    """The keys that sign the tokens of `/token`, the one that signs first. Never their secrets."""
    return [models.Key.of(key) for key in caller.administration.accounts.signing_keys()]


@router.post("/keys", status_code=201, tags=["keys"])
async def rotate_key(caller: AdminCaller, body: models.Rotation) -> models.Key:
    """A new key signs from now on. Tokens of the one before are taken until they expire, or no more at once."""
    return models.Key.of(await caller.administration.rotate_key(at_once=body.at_once, by=caller.actor))
