"""The management API, `/api/v1`: collects its routes, and builds the objects that the routes use.

The API offers the operations of many commands of the command line, such as `entrepot user add`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Final

from starlette.routing import BaseRoute

from registry.admin import (
    account_routes,
    audit_routes,
    backup_routes,
    cache_routes,
    collection_routes,
    event_routes,
    frozen_tag_routes,
    grant_routes,
    import_routes,
    job_routes,
    mirror_routes,
    repository_routes,
    retention_routes,
    rights_routes,
    scrub_routes,
    search_routes,
    session_routes,
    status_routes,
    tag_routes,
    token_routes,
)
from registry.admin.archive_response import RunningDownloads
from registry.admin.browser_login import BrowserLogin
from registry.admin.caller import ManagementComponents
from registry.admin.content_searches import ContentSearches
from registry.auth.administration import Administration
from registry.auth.assembly import AuthComponents
from registry.auth.authenticators import ManagementAuthenticator
from registry.auth.password.hashing import hash_password
from registry.auth.rights.policy import Policy
from registry.browse.repository_browser import RepositoryBrowser
from registry.http.cross_site import CrossSiteCheck
from registry.upkeep.components import UpkeepComponents
from storage.content import Actor

OPENAPI_TAGS: Final[list[dict[str, Any]]] = [
    {"name": "me", "description": "Your account, and what you may do."},
    {"name": "users", "description": "People's accounts."},
    {"name": "robots", "description": "Accounts of programs, such as CI jobs. They have no password."},
    {"name": "groups", "description": "A grant to a group applies to all of its members."},
    {"name": "grants", "description": "Who may do what to which repositories. Grants only add rights."},
    {"name": "tokens", "description": "API tokens: long-lived secrets that replace a password at a login."},
    {"name": "sessions", "description": "Browsers in which somebody is logged in."},
    {"name": "keys", "description": "The keys that sign the bearer tokens of `/token`."},
    {"name": "audit", "description": "Who changed what, who logged in, and which requests were denied."},
    {"name": "repositories", "description": "The content of a repository: its tags, and images in detail."},
    {"name": "tags", "description": "The history of tags, and changes of tags."},
    {"name": "jobs", "description": "Long work that runs in the background, such as a garbage collection."},
    {"name": "mirror", "description": "Upstream registries, their cached content, and frozen tags."},
    {"name": "cache", "description": "The cache of mirrored content."},
    {"name": "quotas", "description": "Limits on the content of the repositories below a prefix."},
    {
        "name": "retention",
        "description": "The tags that the rules in the settings keep, and the deletion of all other tags.",
    },
    {"name": "upkeep", "description": "Work on the whole store. Each request starts a job."},
    {"name": "scrub", "description": "Checks of all stored content, and the damage that the checks have found."},
    {"name": "backups", "description": "Copies of the registry in the directory that the settings name."},
    {"name": "events", "description": "Pushes and other changes of the content, and their deliveries to webhooks."},
    {"name": "status", "description": "The state of the server and its work in progress."},
    {"name": "search", "description": "Finds repositories, tags, labels and digests."},
    {"name": "token", "description": "Bearer tokens: short-lived, for clients such as `docker pull`."},
    {"name": "health", "description": "For load balancers and orchestrators."},
]
"""The tags of the OpenAPI document, which group the routes."""
_ROUTE_MODULES: Final = (
    account_routes,
    grant_routes,
    rights_routes,
    token_routes,
    session_routes,
    audit_routes,
    job_routes,
    repository_routes,
    tag_routes,
    mirror_routes,
    frozen_tag_routes,
    cache_routes,
    retention_routes,
    collection_routes,
    scrub_routes,
    backup_routes,
    import_routes,
    event_routes,
    status_routes,
    search_routes,
)
"""The modules with the routes below `/api/v1`. `collection_routes` has the routes that start a garbage collection or a
check of the store."""


def management_routes() -> list[BaseRoute]:
    """Returns the routes of the management API."""
    return [route for module in _ROUTE_MODULES for route in module.router.routes]


def management_components(
    auth: AuthComponents,
    policy: Policy,
    upkeep: UpkeepComponents,
    repository_browser: RepositoryBrowser,
    searches: ContentSearches,
    cross_site: CrossSiteCheck,
    *,
    is_proxied: bool,
    public_url: str | None = None,
) -> ManagementComponents:
    """Builds the objects that the routes of the management API use. Each process calls this function once.

    - `auth` holds the stores and verifiers of accounts and credentials.
    - `policy` computes an account's rights.
    - `upkeep` has the objects for upkeep, such as the store, the settings and the jobs.
    - `repository_browser` reads the content of repositories to show it to people.
    - `searches` searches the content for callers.
    - `cross_site` refuses requests that pages of other sites cause.
    - `is_proxied`: whether a reverse proxy may be in front of the server. If True, only the command line can add the
      first account, because a request from a loopback address may come from another machine.
    - `public_url` is the registry's URL for clients; None if the settings do not give it.
    """

    async def hash_in_pool(password: str) -> str:
        return await auth.hashing_pool.run(partial(hash_password, password))

    def record_denial(actor: Actor, operation: str, target: str) -> None:
        auth.audit_buffer.record(actor, operation, target, outcome="denied")

    administration = Administration(auth.accounts, hash_in_pool, clock=auth.clock, htpasswd=auth.htpasswd)
    authenticator = ManagementAuthenticator(policy, auth.credential_verifier, auth.login_sessions)
    return ManagementComponents(
        administration=administration,
        authenticator=authenticator,
        browser_login=BrowserLogin(auth, is_registry_open=lambda: not policy.is_closed),
        on_denied=record_denial,
        cursors=auth.cursors,
        upkeep=upkeep,
        repository_browser=repository_browser,
        downloads=RunningDownloads(upkeep.settings.downloads.at_once),
        content_searches=searches,
        cross_site=cross_site,
        is_proxied=is_proxied,
        public_url=public_url,
    )
