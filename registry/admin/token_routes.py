"""Routes of `/api/v1/tokens` and `/api/v1/keys`: API tokens, and the keys that sign the bearer tokens of `/token`.

An *API token* is a secret that replaces an account's password at a login. The docstrings of the routes are the
descriptions in the OpenAPI document. "You" is the account that sends the request.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Query

from registry.admin import models
from registry.admin.caller import AdminCaller, LoggedInCaller
from registry.admin.management_route import AfterQuery, LimitQuery
from registry.admin.management_router import management_router
from storage.access import AccountName

router = management_router()


@router.get("/tokens", tags=["tokens"])
async def list_tokens(
    caller: LoggedInCaller,
    account: Annotated[str | None, Query(description="Only tokens of this account", max_length=80)] = None,
    after: AfterQuery = None,
    limit: LimitQuery = 100,
) -> models.ListPage[models.ApiTokenResponse]:
    """Lists API tokens without their secrets. An admin sees all tokens; other accounts see their own."""
    owner = None if account is None else AccountName(account)
    if owner is None and not caller.rights.admin:
        owner = AccountName(caller.rights.account_name)
    if owner is not None:
        caller.rights.check_may_see(owner)
    return models.list_page(
        caller.accounts.tokens(owner, after, limit), models.ApiTokenResponse.from_stored, lambda token: token.id
    )


@router.post("/tokens", status_code=201, tags=["tokens"])
async def add_token(caller: LoggedInCaller, body: models.NewToken) -> models.AddedToken:
    """Adds an API token for your own account. You have to be logged in with your password or at the OpenID provider,
    not with another token. An admin may add a token for any account. A token never has more rights than its account;
    `limits` restrict the token further. Only this response shows the secret."""
    # While the registry has no accounts, `rights.name` is None, and AccountName("") raises AccountInvalid.
    name = AccountName(body.account or caller.rights.name or "")
    caller.rights.check_may_change_credentials(name)
    token, secret = await caller.administration.add_token(
        name,
        note=body.note,
        expires_in=body.lifetime_seconds,
        limits=[limit.to_token_limit() for limit in body.limits],
        expected_version=caller.version_of(name),
        by=caller.actor,
    )
    return models.AddedToken(**models.ApiTokenResponse.from_stored(token).model_dump(), secret=secret)


@router.delete("/tokens/{id}", status_code=204, tags=["tokens"])
async def revoke_token(caller: LoggedInCaller, token_id: Annotated[str, Path(alias="id", max_length=40)]) -> None:
    """Revokes one of your own API tokens; an admin may revoke any token. All later requests with the token are
    refused."""
    token, _secret_hash = caller.accounts.token(token_id)
    caller.rights.check_may_revoke(token)
    await caller.administration.revoke_token(token_id, by=caller.actor)


@router.get("/keys", tags=["keys"])
async def list_keys(caller: AdminCaller) -> list[models.SigningKeyResponse]:
    """Lists the keys that sign the tokens of `/token`, without their secrets. The first key signs new tokens."""
    return [models.SigningKeyResponse.from_stored(key) for key in caller.accounts.signing_keys()]


@router.post("/keys", status_code=201, tags=["keys"])
async def rotate_key(caller: AdminCaller, body: models.KeyRotation) -> models.SigningKeyResponse:
    """Adds a signing key, which signs all new tokens. Tokens that an older key signed stay valid until they expire. If
    `at_once` is true, the registry rejects these tokens immediately."""
    return models.SigningKeyResponse.from_stored(
        await caller.administration.rotate_key(at_once=body.at_once, by=caller.actor)
    )
