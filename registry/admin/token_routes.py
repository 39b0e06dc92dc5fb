"""`/api/v1/tokens` and `/api/v1/keys`: API tokens and signing keys."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query

from registry.admin import models
from registry.admin.caller import AdminCaller, LoggedInCaller
from registry.admin.management_route import AfterQuery, LimitQuery, ManagementRoute
from storage.access import AccountName

router = APIRouter(route_class=ManagementRoute)


@router.get("/tokens", tags=["tokens"])
async def list_tokens(
    caller: LoggedInCaller,
    account: Annotated[str | None, Query(description="Only of this account", max_length=80)] = None,
    after: AfterQuery = None,
    limit: LimitQuery = 100,
) -> models.Listed[models.Token]:
    """Lists API tokens without their secrets: all for an admin, your own otherwise."""
    name = None if account is None else AccountName(account)
    if name is None and not caller.rights.admin:
        name = AccountName(caller.rights.account_name)
    if name is not None:
        caller.rights.check_may_see(name)
    return models.listed(caller.accounts.tokens(name, after, limit), models.Token.of, lambda token: token.id)


@router.post("/tokens", status_code=201, tags=["tokens"])
async def add_token(caller: LoggedInCaller, body: models.NewToken) -> models.AddedToken:
    """Makes an API token: for yourself, after a login with your password, or for any account as an admin. `limits` only
    take rights away: a token may do at most what its account may do. This answer alone shows the secret."""
    name = AccountName(body.account or caller.rights.name or "")
    caller.rights.check_may_add_credential(name)
    token, secret = await caller.administration.add_token(
        name,
        note=body.note,
        expires_in=body.seconds,
        limits=[limit.parse() for limit in body.limits],
        by=caller.actor,
    )
    return models.AddedToken(**models.Token.of(token).model_dump(), secret=secret)


@router.delete("/tokens/{id}", status_code=204, tags=["tokens"])
async def revoke_token(caller: LoggedInCaller, token_id: Annotated[str, Path(alias="id", max_length=40)]) -> None:
    """Revokes an API token: your own, or any as an admin. It is refused from the next request on."""
    token, _ = caller.accounts.token(token_id)
    caller.rights.check_token(token)
    await caller.administration.revoke_token(token_id, by=caller.actor)


@router.get("/keys", tags=["keys"])
async def list_keys(caller: AdminCaller) -> list[models.Key]:
    """Lists the keys that sign the tokens of `/token`, the current one first. Never shows their secrets."""
    return [models.Key.of(key) for key in caller.accounts.signing_keys()]


@router.post("/keys", status_code=201, tags=["keys"])
async def rotate_key(caller: AdminCaller, body: models.Rotation) -> models.Key:
    """Makes a new signing key. Tokens signed by the old key are accepted until they expire, or with `at_once` no
    more."""
    return models.Key.of(await caller.administration.rotate_key(at_once=body.at_once, by=caller.actor))
