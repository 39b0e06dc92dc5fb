"""The composition root: what is built, and from what, when the server starts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final

from fastapi import FastAPI

from registry import __version__
from registry.admin import documentation, health, login_routes, management_api
from registry.admin.caller import ManagementComponents
from registry.admin.middleware import SecurityHeaders, add_error_handlers
from registry.auth.assembly import AuthComponents, open_auth_components
from registry.auth.authenticators import HeaderAuthenticator, OpenAuthenticator
from registry.auth.rights.guard import Guarded, OnDenied, RepositoryResolver, ignore_denial, keep_principal, may_pull
from registry.auth.rights.policy import Policy
from registry.auth.rights.principal import Principal
from registry.auth.rights.sealed_cursors import SealedCursors
from registry.auth.token_service.routes import token_router
from registry.auth.token_service.service import TokenService
from registry.backend import open_router
from registry.config import Settings
from registry.config.auth_settings import has_external_logins, token_service_name
from registry.http import Authenticator, DistributionAPI, Namespaces, RequestLimits
from registry.http.answer_cache import AnswerCache, CachedAnswer
from registry.http.api import is_distribution, raw_path
from registry.http.body_memory import ANSWER_BYTES, REQUEST_BODY_BYTES, SLOW_CLIENT_SECONDS, BodyMemory
from registry.http.cross_site import CrossSiteCheck
from registry.http.exchange import ACTING, Receive, Scope, Send
from registry.http.namespaces import hosts_of
from registry.http.rate_limit import HEALTH_KEY, RateLimitedApp
from registry.memory_budget import MemoryBudget
from registry.observe import Observed
from registry.restrict import Restricted
from registry.router import Router
from registry.server.shared_counters import SharedRateLimiter
from storage.access import Action, AuditEntry
from storage.content import Actor
from storage.errors import StorageFull
from storage.interface import Registry
from storage.store.stored_registry import StoredRegistry

HEALTH_PER_SECOND: Final = 20.0
"""Requests for the registry's health from one address, at the least that are let through where there is a limit."""
REOPEN_SECONDS = 1.0
log = logging.getLogger("registry")


class Entrepot(FastAPI):
    """A FastAPI application that hands `/v2` to the distribution API before any middleware and router.

    `registry` is what everybody gets, behind the guard; `unguarded` is what stands behind it, for the application's own
    health. `access`, `policy`, `tokens` and `management` are there where there are accounts."""

    registry: Registry
    unguarded: Registry
    distribution: DistributionAPI
    pace: Callable[[str], float] | None = None
    """Takes a request of a principal or an address; how many seconds it has to wait. None: nobody has to."""

    storage_problem: Callable[[], str | None] = staticmethod(lambda: None)
    """Why nothing can be stored at present, in a sentence; None where nothing is known."""

    def secure(self, settings: Settings) -> None:
        """From here on, all that is not the distribution API counts against the limit of requests, and answers with the
        headers that browsers want."""
        public = settings.public_url or ""
        https = settings.tls.certificate is not None or public.startswith("https:")
        self._rest = SecurityHeaders(RateLimitedApp(super().__call__, lambda: self.pace), https=https)

    def build_routes(self) -> None:
        """Makes FastAPI build all that it needs for its routes. It would do so at the first request to each, which held
        the event loop for 60 ms; this may run in a thread."""
        scope = {"type": "http", "method": "GET", "path": "/", "root_path": "", "headers": []}
        for route in self.routes:
            route.matches(dict(scope))

    body_memory: BodyMemory
    """For bodies that this worker holds in memory."""
    access: AuthComponents
    policy: Policy
    tokens: TokenService
    management: ManagementComponents

    def serve(self, registry: Registry, settings: Settings) -> None:
        """From here on `registry` is what this application serves, to everybody: it has no accounts."""
        guard = self._guard(registry, settings)
        self._answer(guard, settings, OpenAuthenticator(guard, guarded_upstreams(settings)))

    def serve_accounts(
        self, router: Router, access: AuthComponents, settings: Settings, version: Callable[[], object]
    ) -> None:
        """From here on what `router` leads to is what this application serves, to those who may have it. `version` is a
        mark of all that the store holds, accounts included, which every change changes."""
        upstreams = [upstream.name for upstream in settings.upstream]
        self.access = access
        self.policy = Policy(
            access.accounts,
            access.revocation_check,
            upstreams=upstreams,
            guarded=guarded_upstreams(settings),
            closed=has_external_logins(settings.auth, settings.issuer, settings.oidc.issuer),
        )
        self.tokens = access.token_service(self.policy)
        self.management = management_api.management_components(
            access, self.policy, proxied=is_behind_proxy(settings), public_url=settings.public_url
        )
        registry, places = (router, router) if router.mirrors else (router.hosted, None)
        guard = self._guard(registry, settings, places, denial_recorder(access), self.policy.reevaluate, access.cursors)
        authenticator = HeaderAuthenticator(guard, self.policy, access.credential_verifier, clock=access.clock)
        hosts = any(upstream.hosts for upstream in settings.upstream)
        answers = AnswerCache(version, router.settled, by_host=hosts)
        self._answer(guard, settings, authenticator, answers, lambda: not self.policy.closed)

    def _guard(
        self,
        registry: Registry,
        settings: Settings,
        places: RepositoryResolver | None = None,
        denied: OnDenied = ignore_denial,
        renew: Callable[[Principal], Awaitable[Principal]] = keep_principal,
        positions: SealedCursors | None = None,
    ) -> Guarded:
        restricted = Restricted(registry, read_only=settings.read_only, delete=settings.delete)
        self.unguarded = restricted
        return Guarded(restricted, places, denied, renew, positions)

    def _answer(
        self,
        guard: Guarded,
        settings: Settings,
        authenticator: Authenticator,
        answers: AnswerCache | None = None,
        is_open: Callable[[], bool] = lambda: True,
    ) -> None:
        self.registry = Observed(guard)
        self.distribution = DistributionAPI(
            self.registry,
            limits=RequestLimits(manifest=settings.limits.manifest),
            public_url=settings.public_url,
            namespaces=namespaces_of(settings),
            pace=self.pace,
            authenticator=authenticator,
            service=token_service_name(settings.auth, settings.public_url),
            answers=answers,
            pages=CrossSiteCheck(settings.public_url, own_hosts(settings), is_open),
            intake=self.body_memory,
        )

    def answer_at_once(self, scope: Scope) -> tuple[CachedAnswer, str] | None:
        """See `DistributionAPI.answer_at_once`."""
        return self.distribution.answer_at_once(scope)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and is_distribution(raw_path(scope)):
            await self.distribution(scope, receive, send)
        elif scope["type"] == "http":
            async with self.body_memory.metered(receive, send) as (counted, answered):
                await self._rest(scope, counted, answered)
        else:
            await self._rest(scope, receive, send)


def own_hosts(settings: Settings) -> set[str]:
    """Names of this server that the settings tell."""
    return {host for upstream in settings.upstream for host in upstream.hosts}


def body_memory_of(settings: Settings) -> BodyMemory:
    """With room for a manifest of the largest size beside others."""
    most = 2 * settings.limits.manifest
    return BodyMemory(
        bodies=MemoryBudget(max(REQUEST_BODY_BYTES, most), "request bodies"),
        answers=MemoryBudget(max(ANSWER_BYTES, most), "answers", slow=SLOW_CLIENT_SECONDS),
    )


def guarded_upstreams(settings: Settings) -> list[str]:
    """The names of the upstreams that want a grant of their own."""
    return [upstream.name for upstream in settings.upstream if upstream.guarded]


def is_behind_proxy(settings: Settings) -> bool:
    """Whether the settings say that a proxy stands before the server."""
    return settings.public_url is not None or bool(settings.trusted_proxies)


def denial_recorder(access: AuthComponents) -> OnDenied:
    """Writes denials to the audit log, with the request they came in."""

    def note(principal: Principal, action: Action, name: str) -> None:
        exchange = ACTING.get()
        by = exchange.actor if exchange is not None else Actor(principal.name)
        what, at = ",".join(action.words), access.clock()
        access.audit_buffer.add(
            AuditEntry(at, principal.name, what, name, "denied", by.address, by.request_id, by.user_agent)
        )

    return note


def namespaces_of(settings: Settings) -> Namespaces | None:
    """The upstreams that requests may name; None where nothing is mirrored."""
    if not settings.upstream:
        return None
    return Namespaces(
        frozenset(upstream.name for upstream in settings.upstream),
        {host: upstream.name for upstream in settings.upstream for host in upstream.hosts},
        hosts_of(settings.public_url),
        {alias: upstream.name for upstream in settings.upstream for alias in upstream.aliases},
    )


def rate_limit_of(settings: Settings) -> Callable[[str], float] | None:
    """The limit of requests, if there is one. Made before the fork, it holds for all workers together. Those for the
    registry's health have a limit of their own, which is never so low that several programs may not ask each second."""
    per_second = settings.limits.requests_per_second
    if not per_second:
        return None
    requests = SharedRateLimiter(per_second, settings.limits.burst or max(1, round(10 * per_second)))
    watching = max(per_second, HEALTH_PER_SECOND)
    health = SharedRateLimiter(watching, round(10 * watching))

    def take(key: str) -> float:
        return (health if key.startswith(HEALTH_KEY) else requests).take(key)

    return take


async def _open(app: Entrepot, settings: Settings, stack: AsyncExitStack, *, may_freeze: bool) -> StoredRegistry:
    """Opens the store and the mirrors, and has the application serve them. Raises StorageFull: there is no room."""
    every = None if settings.read_only else settings.gc.interval
    async with AsyncExitStack() as opened:
        router = await opened.enter_async_context(
            open_router(settings, collect_every=every, serving=True, may_freeze=may_freeze, readable=may_pull)
        )
        stored = router.hosted
        assert isinstance(stored, StoredRegistry)
        access = await opened.enter_async_context(open_auth_components(settings, stored.accounts, stored.leases))
        app.serve_accounts(router, access, settings, stored.metadata.version)
        app.storage_problem = stored.storage_problem
        stack.push_async_exit(opened.pop_all())
    return stored


async def reopen_store(app: Entrepot, settings: Settings, stack: AsyncExitStack, thaw: Callable[[], None]) -> None:
    """Opens the store once more as soon as there is room, and serves that from then on; then calls `retire`. What was
    opened first is closed last (`storage.metadata.sqlite.immutable_database`)."""
    said = ""
    while True:
        await asyncio.sleep(REOPEN_SECONDS)
        try:
            await _open(app, settings, stack, may_freeze=False)
        except StorageFull:
            continue
        except Exception as error:  # until it succeeds, no other worker can write
            if said != (said := repr(error)):
                log.exception("the store cannot be opened again; the next try is in a second")
            continue
        thaw()
        log.warning("there was room to open the database: deletes work again")
        return


def create_app(
    settings: Settings, registry: Registry | None = None, *, pace: Callable[[str], float] | None = None
) -> Entrepot:
    """The application over `registry`, or over the store in `settings.data` and the mirrors of `settings.upstream`:
    those are opened when the server starts the application (after a fork, so no process shares another's files) and
    closed when it stops. The data directory has been prepared (`storage.composition.prepare_data_dir`). A read-only
    registry collects nothing; its mirrors go on filling, since only what clients push or delete is refused. `pace`:
    what `rate_limit_of` gave before the fork."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        assert isinstance(app, Entrepot)
        if registry is not None:
            yield
            return
        async with AsyncExitStack() as stack:
            stored = await _open(app, settings, stack, may_freeze=True)
            thawing = (
                asyncio.create_task(reopen_store(app, settings, stack, stored.retire)) if stored.is_read_only else None
            )
            routes = asyncio.create_task(asyncio.to_thread(app.build_routes))
            try:
                yield
            finally:
                await routes
                if thawing is not None:
                    thawing.cancel()
                    await asyncio.wait([thawing])

    # FastAPI's own documentation pages load their scripts from the internet, and its description holds the event loop.
    paths: dict[str, Any] = {"openapi_url": None, "docs_url": None, "redoc_url": None}
    about: dict[str, Any] = {"version": __version__, "openapi_tags": management_api.TAGS}
    app = Entrepot(title="Entrepot", lifespan=lifespan, redirect_slashes=False, **about, **paths)
    app.pace = pace
    app.body_memory = body_memory_of(settings)
    app.secure(settings)
    if registry is not None:
        app.serve(registry, settings)
    else:
        app.include_router(token_router(lambda request: request.app.tokens))
        app.include_router(management_api.router)
        if settings.oidc.issuer:
            app.include_router(login_routes.router)
    add_error_handlers(app)
    app.include_router(documentation.welcome_router)
    app.include_router(health.router)
    app.include_router(documentation.docs_router)
    app.include_router(documentation.openapi_router(documentation.OpenAPIDocument(app.openapi)))
    return app
