"""The management API, `/api/v1`: everything that the account commands do."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

from fastapi import APIRouter
from pydantic import BaseModel

from registry.admin import account_routes, audit_routes, grant_routes, token_routes
from registry.admin.caller import ManagementComponents
from registry.auth.administration import Administration
from registry.auth.assembly import AuthComponents
from registry.auth.authenticators import ManagementAuthenticator
from registry.auth.password.hashing import hash_password
from registry.auth.rights.policy import Policy
from storage.content import Actor


class Error(BaseModel):
    """`code` is for programs, `message` for people."""

    code: str
    message: str
    detail: Any | None = None


class Errors(BaseModel):
    """An error in the format of the OCI distribution spec."""

    errors: list[Error]


TAGS: Final[list[dict[str, Any]]] = [
    {"name": "me", "description": "Your account, and what you may do."},
    {"name": "users", "description": "People's accounts."},
    {"name": "robots", "description": "Accounts of programs, such as CI jobs. They log in with API tokens only."},
    {"name": "groups", "description": "A grant to a group counts for all of its members."},
    {"name": "grants", "description": "Who may do what to which repositories. Rights only add up."},
    {"name": "tokens", "description": "API tokens: secrets to log in with in place of a password."},
    {"name": "keys", "description": "The keys that sign the tokens of `/token`."},
    {"name": "audit", "description": "Who changed what, logins, and denials."},
    {"name": "token", "description": "Tokens for clients: what `docker login` and `docker pull` ask for."},
    {"name": "health", "description": "For load balancers and orchestrators."},
]
_ERRORS: Final[dict[int, str]] = {
    400: "A name, a pattern or another value is not valid",
    401: "Log in first, or with other credentials",
    403: "This account may not do this",
    404: "There is no such thing, or none that this account may see",
    409: "The name is taken, or no admin would be left",
    413: "The body is too long",
    415: "The body is not JSON",
    422: "The body or the query is not as described",
    429: "Too many attempts; Retry-After says when to go on",
}

router = APIRouter(
    prefix="/api/v1",
    responses={status: {"model": Errors, "description": text} for status, text in _ERRORS.items()},
)
for part in (account_routes, grant_routes, token_routes, audit_routes):
    router.include_router(part.router)


def management_components(
    access: AuthComponents, policy: Policy, *, proxied: bool, public_url: str | None = None
) -> ManagementComponents:
    """Builds what the API works with in this process.

    `proxied` means that a proxy stands before the server: then client addresses prove nothing, and only the command
    line can add the first account. `public_url` is the registry's address for clients, if it is set.
    """

    async def hashed(password: str) -> str:
        return await access.hashing_pool.run(partial(hash_password, password))

    def on_denied(by: Actor, action: str, target: str) -> None:
        access.audit_buffer.record(by, action, target, "denied")

    administration = Administration(access.accounts, hashed, clock=access.clock)
    authenticator = ManagementAuthenticator(policy, access.credential_verifier, access.login_sessions)
    return ManagementComponents(administration, authenticator, on_denied, access.cursors, proxied, public_url)
