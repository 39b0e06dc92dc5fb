"""Who calls the management API, and what they may do there.

While the registry is open, only this machine may manage it: whoever reaches it could else take it over by making the
first account.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Final, Protocol

from fastapi import Depends, Request
from fastapi.openapi.models import HTTPBase
from fastapi.security.base import SecurityBase

from registry.admin import cookies
from registry.auth.administration import Administration
from registry.auth.rights.management_rights import UNRESTRICTED, ManagementRights, management_rights_of
from registry.auth.rights.principal import Principal
from registry.auth.rights.sealed_cursors import SealedCursors
from registry.client_addresses import is_loopback, is_loopback_host
from registry.http.asgi import Header, unauthenticated_actor
from storage.content import Actor
from storage.errors import Denied, Unauthorized

_FORWARDED: Final = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")


class CallerAuthenticator(Protocol):
    async def authenticate(self, headers: Sequence[Header], by: Actor, session: str | None = None) -> Principal:
        """Who shows these headers (names in lower case), or this session, which counts where there is no Authorization.
        `by`: where they came from. Raises Unauthorized, TooManyRequests."""
        ...


@dataclass(frozen=True, slots=True)
class ManagementComponents:
    """What the management API works with. `denied` is told who was refused what, and where. `proxied`: a proxy stands
    before it, so no address is what it seems. `public_url`: its address as clients see it, if that is set. `cursors`
    seals places in lists."""

    administration: Administration
    authenticator: CallerAuthenticator
    denied: Callable[[Actor, str, str], None]
    cursors: SealedCursors
    proxied: bool = False
    public_url: str | None = None


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and what they may do. `open`: there are no accounts yet."""

    administration: Administration
    authenticator: CallerAuthenticator
    principal: Principal
    authority: ManagementRights
    actor: Actor
    open: bool
    cursors: SealedCursors


class _SecurityScheme(SecurityBase):
    """Says in the description how one logs in; `identify_caller` does it."""

    def __init__(self, scheme: str, description: str) -> None:
        self.model = HTTPBase(scheme=scheme, description=description)
        self.scheme_name = scheme.capitalize()

    async def __call__(self) -> None:
        return None


_BASIC: Final = _SecurityScheme("basic", "Account and password, or an API token in the password's place")
_BEARER: Final = _SecurityScheme("bearer", "An API token")


async def identify_caller(
    request: Request, _basic: Annotated[Any, Depends(_BASIC)], _bearer: Annotated[Any, Depends(_BEARER)]
) -> Caller:
    """Who asks, if anybody. Raises Unauthorized for credentials that are wrong, TooManyRequests; HTTPException for what
    a page of another site wants to change in a session."""
    management: ManagementComponents = request.app.service.access.management
    actor = unauthenticated_actor(request.scope)
    address = actor.address
    session = None if "authorization" in request.headers else cookies.read_session(request, management.public_url)
    if session is not None:
        cookies.check_same_origin(request, management.public_url)
    principal = await management.authenticator.authenticate(request.scope["headers"], actor, session)
    actor = request.state.actor = replace(actor, name=principal.name)
    here = principal.open and not management.proxied and _is_from_this_machine(request, address)
    authority = UNRESTRICTED if here else management_rights_of(principal)
    return Caller(
        *(management.administration, management.authenticator, principal, authority, actor, principal.open),
        cursors=management.cursors,
    )


AnyCaller = Annotated[Caller, Depends(identify_caller)]


async def require_login(caller: AnyCaller) -> Caller:
    """Who has logged in. Raises Unauthorized; Denied for another machine while the registry is open."""
    if caller.open and not caller.authority.admin:
        raise Denied(
            "there are no accounts yet, so only the registry's own machine may do this: run there "
            "entrepot user add NAME --admin"
        )
    if not caller.authority.admin and caller.principal.is_anonymous:
        raise Unauthorized("log in: this needs an account")
    return caller


LoggedInCaller = Annotated[Caller, Depends(require_login)]


async def require_admin(caller: LoggedInCaller) -> Caller:
    """An admin. Raises Unauthorized, Denied, whatever is asked for."""
    caller.authority.check_admin()
    return caller


AdminCaller = Annotated[Caller, Depends(require_admin)]


def _is_from_this_machine(request: Request, address: str) -> bool:
    """A client on this machine that also thinks it talks to this machine: a proxy, and a page in a browser here whose
    name was made to point here, do not count."""
    if any(name in request.headers for name in _FORWARDED):
        return False
    host = request.url.hostname or ""
    return is_loopback(address) and is_loopback_host(host)
