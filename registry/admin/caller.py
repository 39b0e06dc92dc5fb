"""The caller of the management API, as dependencies of its routes.

While there are no accounts, only this machine may manage the registry. Otherwise whoever reaches it first could take it
over by adding the first account.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Final

from fastapi import Depends, Request
from fastapi.openapi.models import HTTPBase
from fastapi.security.base import SecurityBase

from registry.admin.cookies import BrowserCookies
from registry.asgi import unauthenticated_actor
from registry.auth.administration import Administration
from registry.auth.authenticators import ManagementAuthenticator
from registry.auth.rights.management_rights import UNRESTRICTED, ManagementRights, management_rights_of
from registry.auth.rights.principal import Principal
from registry.auth.rights.sealed_cursors import SealedCursors
from registry.client_addresses import is_loopback, is_loopback_host
from storage.accounts import Accounts
from storage.content import Actor
from storage.errors import Denied, Unauthorized

_FORWARDED: Final = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")
"""Headers that a proxy adds."""


@dataclass(frozen=True, slots=True)
class ManagementComponents:
    """What the management API works with.

    - `on_denied` is called with the actor, the operation and the target of each refused call.
    - `cursors` seals positions in lists.
    - `is_proxied` means that a proxy stands before the server, so client addresses prove nothing.
    - `public_url` is the registry's address for clients, if it is set.
    """

    administration: Administration
    authenticator: ManagementAuthenticator
    on_denied: Callable[[Actor, str, str], None]
    cursors: SealedCursors
    is_proxied: bool = False
    public_url: str | None = None


@dataclass(frozen=True, slots=True)
class Caller:
    """The caller of one request. `is_open` means that there are no accounts yet."""

    administration: Administration
    authenticator: ManagementAuthenticator
    principal: Principal
    rights: ManagementRights
    actor: Actor
    is_open: bool
    cursors: SealedCursors

    @property
    def accounts(self) -> Accounts:
        return self.administration.accounts


class _SecurityScheme(SecurityBase):
    """Describes a way to log in in the OpenAPI document. `identify_caller` does the login."""

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
    """Returns the caller, with or without an account. Raises Unauthorized for wrong credentials, TooManyRequests, and
    HTTPException where a page of another site would change something in a session."""
    management: ManagementComponents = request.app.service.access.management
    actor = unauthenticated_actor(request.scope)
    cookies = BrowserCookies(request, management.public_url)
    session = None if "authorization" in request.headers else cookies.session
    if session is not None:
        cookies.check_same_origin()
    principal = await management.authenticator.authenticate(request.scope["headers"], actor, session)
    actor = request.state.actor = replace(actor, name=principal.name)
    is_local = principal.open and not management.is_proxied and _is_from_this_machine(request, actor.address)
    return Caller(
        administration=management.administration,
        authenticator=management.authenticator,
        principal=principal,
        rights=UNRESTRICTED if is_local else management_rights_of(principal),
        actor=actor,
        is_open=principal.open,
        cursors=management.cursors,
    )


AnyCaller = Annotated[Caller, Depends(identify_caller)]


async def require_login(caller: AnyCaller) -> Caller:
    """Returns a caller with an account. Raises Unauthorized, and Denied to other machines while there are no
    accounts."""
    if caller.is_open and not caller.rights.admin:
        raise Denied(
            "there are no accounts yet, so only the registry's own machine may do this: run there "
            "entrepot user add NAME --admin"
        )
    if not caller.rights.admin and caller.principal.is_anonymous:
        raise Unauthorized("log in: this needs an account")
    return caller


LoggedInCaller = Annotated[Caller, Depends(require_login)]


async def require_admin(caller: LoggedInCaller) -> Caller:
    """Returns a caller who is an admin. Raises Unauthorized, Denied."""
    caller.rights.check_admin()
    return caller


AdminCaller = Annotated[Caller, Depends(require_admin)]


def _is_from_this_machine(request: Request, address: str) -> bool:
    """Returns whether a client on this machine addresses this machine by its loopback name. This excludes requests
    through a proxy, and those of a browser page whose host name was made to resolve to this machine."""
    if any(name in request.headers for name in _FORWARDED):
        return False
    host = request.url.hostname or ""
    return is_loopback(address) and is_loopback_host(host)
