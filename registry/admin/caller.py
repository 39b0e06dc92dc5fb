"""FastAPI dependencies that give a route of the management API its caller: the account that sent the request.

A registry is *open* until its first account is added: clients push and pull without a login. A registry is never open
if its settings name a source of accounts, such as an htpasswd file. While the registry is open, the management API
reads and changes accounts only for requests from the registry's own machine. This prevents that anyone on the network
adds the first account and takes the registry over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Final

from fastapi import Depends, Request

from registry.admin.archive_response import RunningDownloads
from registry.admin.browser_login import BrowserLogin
from registry.admin.content_searches import ContentSearches, Searcher
from registry.admin.cookies import BrowserCookies
from registry.asgi import unauthenticated_actor
from registry.auth.administration import Administration
from registry.auth.authenticators import ManagementAuthenticator
from registry.auth.rights.management_rights import ALL_MANAGEMENT_RIGHTS, ManagementRights, management_rights_of
from registry.auth.rights.principal import Principal
from registry.auth.rights.sealed_cursors import SealedCursors
from registry.browse.repository_browser import RepositoryBrowser
from registry.client_addresses import is_loopback_address, is_loopback_host
from registry.http.cross_site import CrossSiteCheck
from registry.request import RequestContext
from registry.upkeep.components import UpkeepComponents
from storage.access import AccountName
from storage.accounts import Accounts
from storage.content import Actor
from storage.errors import Denied, Unauthorized
from storage.names import RepositoryName

_PROXY_HEADERS: Final = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")
"""Headers that proxies add to the requests that they forward."""
_CALLER_KEY: Final = "entrepot.caller"
"""The key of the identified caller in the ASGI scope of a request."""


@dataclass(frozen=True, slots=True)
class ManagementComponents:
    """The objects that the management API uses. Each process has one `ManagementComponents`.

    - `administration` reads and changes accounts, groups, grants and tokens.
    - `authenticator` checks the credentials or the login session of a request.
    - `browser_login` starts and ends login sessions.
    - `on_denied` writes a denied call to the audit log. Its arguments are the actor, the operation and the target.
    - `cursors` encrypts the cursors of lists. A *cursor* is the position where the next page of a list begins. A cursor
      is encrypted if it may contain the name of an entry that the caller may not see.
    - `is_proxied` is true if the settings have `public_url` or `trusted_proxies`. A reverse proxy may then be in front
      of the server, so a loopback client address does not prove that a request comes from the registry's own machine.
    - `public_url` is the registry's URL for clients; None if the settings do not give it.
    - `upkeep` has the store, the router, the settings, and the objects that run upkeep jobs.
    - `repository_browser` reads the content of repositories to show it to people. `downloads` limits how many images
      are downloaded at the same time.
    - `content_searches` searches the content for callers.
    - `cross_site` refuses requests that a browser sends on behalf of a web page of another site.
    """

    administration: Administration
    authenticator: ManagementAuthenticator
    browser_login: BrowserLogin
    on_denied: Callable[[Actor, str, str], None]
    cursors: SealedCursors
    upkeep: UpkeepComponents
    repository_browser: RepositoryBrowser
    downloads: RunningDownloads
    content_searches: ContentSearches
    cross_site: CrossSiteCheck
    is_proxied: bool = False
    public_url: str | None = None


@dataclass(frozen=True, slots=True)
class Caller:
    """The caller of one request, and the objects that routes use on the caller's behalf.

    - `principal` is the account that the credentials of the request belong to, or the anonymous principal.
    - `rights` are the caller's rights in the management API.
    - `actor` is what the audit log records about the caller: the account's name, the client's address, the request's id
      and the User-Agent.
    - `is_registry_open` is true if the registry is open: it has no accounts yet.
    - `administration`, `authenticator`, `cursors`, `upkeep`, `repository_browser`, `downloads` and `content_searches`
      are the objects with the same names in `ManagementComponents`."""

    administration: Administration
    authenticator: ManagementAuthenticator
    principal: Principal
    rights: ManagementRights
    actor: Actor
    is_registry_open: bool
    cursors: SealedCursors
    upkeep: UpkeepComponents
    repository_browser: RepositoryBrowser
    downloads: RunningDownloads
    content_searches: ContentSearches

    @property
    def accounts(self) -> Accounts:
        """The store of accounts, groups, grants and tokens."""
        return self.administration.accounts

    def version_of(self, account: AccountName) -> int | None:
        """Returns the version that `account` had when the caller logged in to it: the argument `expected_version` for
        methods of `accounts`. Returns None if the caller is not logged in to `account`, or if `account` is not in the
        store."""
        identity = self.principal.identity
        return identity.version if identity.name == account else None

    @property
    def visitor_key(self) -> str:
        """The key of the caller for limits that apply to each visitor. A visitor is an account or, for anonymous
        clients, the network of the client's address."""
        return self.principal.visitor_key_at(self.actor.address)

    @property
    def searcher(self) -> Searcher:
        """The caller as an argument for the methods of `content_searches`."""
        return Searcher(self.principal, self.actor.address)

    def context_for(self, repo: RepositoryName) -> RequestContext:
        """Returns the context for calls on `repo` on behalf of the caller. Functions that receive the context check the
        caller's rights."""
        return RequestContext(self.principal, repo, self.actor.address, self.actor.request_id)


async def identify_caller(request: Request) -> Caller:
    """Returns the caller, who may be anonymous. Stores the actor in `request.state.actor`, for the logs. Further calls
    for the same request return the same caller without checking the credentials, until `forget_caller` is called.

    Ignores the session cookie if the request has an Authorization header. Raises:

    - Unauthorized for wrong credentials, TooManyRequests after too many failed logins.
    - Denied for a request that a page of another site may have caused (`registry.http.cross_site`).
    - HTTPException (403) if the session cookie is used for a request that may change something, and the request does
      not come from a page of this registry."""
    known_caller: Caller | None = request.scope.get(_CALLER_KEY)
    if known_caller is not None:
        return known_caller
    management: ManagementComponents = request.app.service.access.management
    management.cross_site.check(request.scope)
    actor = unauthenticated_actor(request.scope)
    cookies = BrowserCookies(request, management.public_url)
    session_cookie = None if "authorization" in request.headers else cookies.session
    if session_cookie is not None:
        cookies.check_same_origin()
    principal = await management.authenticator.authenticate(request.scope["headers"], actor, session_cookie)
    caller = request.scope[_CALLER_KEY] = make_caller(request, principal)
    return caller


def forget_caller(request: Request) -> None:
    """Makes the next call of `identify_caller` for this request check the credentials again. Call this before a wait
    during which the caller's rights may change, such as the wait for the request's body."""
    request.scope.pop(_CALLER_KEY, None)


async def identify_again(request: Request) -> Caller:
    """Returns the caller with the current rights: checks the credentials of the request even if `identify_caller` has
    checked them before. Raises the errors of `identify_caller`."""
    scope = {key: value for key, value in request.scope.items() if key != _CALLER_KEY}
    return await identify_caller(Request(scope))


def make_caller(request: Request, principal: Principal) -> Caller:
    """Returns the caller of `request`, which was authenticated as `principal`. Stores the actor in
    `request.state.actor`."""
    management: ManagementComponents = request.app.service.access.management
    actor = request.state.actor = replace(unauthenticated_actor(request.scope), name=principal.name)
    may_add_first_account = (
        principal.is_registry_open and not management.is_proxied and _is_from_this_machine(request, actor.address)
    )
    return Caller(
        administration=management.administration,
        authenticator=management.authenticator,
        principal=principal,
        rights=ALL_MANAGEMENT_RIGHTS if may_add_first_account else management_rights_of(principal),
        actor=actor,
        is_registry_open=principal.is_registry_open,
        cursors=management.cursors,
        upkeep=management.upkeep,
        repository_browser=management.repository_browser,
        downloads=management.downloads,
        content_searches=management.content_searches,
    )


AnyCaller = Annotated[Caller, Depends(identify_caller)]


async def require_login(caller: AnyCaller) -> Caller:
    """Returns the caller if the caller has an account. Raises Unauthorized for an anonymous caller.

    While the registry is open, nobody has an account. Returns the caller if the request comes from the registry's own
    machine, and otherwise raises Denied."""
    # While the registry is open, only a caller on the registry's own machine is an admin (ALL_MANAGEMENT_RIGHTS).
    if caller.is_registry_open and not caller.rights.admin:
        raise Denied(
            "there are no accounts yet: add the first one on the registry's own machine, with "
            "entrepot user add NAME --admin"
        )
    if not caller.rights.admin and caller.principal.is_anonymous:
        raise Unauthorized("log in: this needs an account")
    return caller


LoggedInCaller = Annotated[Caller, Depends(require_login)]


async def require_admin(caller: LoggedInCaller) -> Caller:
    """Returns the caller if the caller is an admin. Raises Unauthorized for an anonymous caller, and Denied for any
    other caller who is not an admin."""
    caller.rights.check_admin()
    return caller


AdminCaller = Annotated[Caller, Depends(require_admin)]


def _is_from_this_machine(request: Request, address: str) -> bool:
    """Returns whether the request comes from this machine: the client's `address` and the host in the request's URL are
    loopback, and no proxy forwarded the request.

    The check of the host prevents DNS rebinding. Without it, a web page whose host name resolves to 127.0.0.1 could
    call the API through a browser on this machine."""
    if any(name in request.headers for name in _PROXY_HEADERS):
        return False
    host = request.url.hostname or ""
    return is_loopback_address(address) and is_loopback_host(host)
