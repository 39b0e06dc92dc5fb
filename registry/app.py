"""The composition root: what is built, and from what, when the server starts."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from registry import __version__
from registry.admin import documentation, health, login, management, welcome
from registry.admin.calling import Management
from registry.admin.errors import add_error_handlers
from registry.admin.headers import SecurityHeaders
from registry.auth.assembly import Access, open_access
from registry.auth.authenticate import HeaderAuthenticator, OpenAuthenticator
from registry.auth.guard import Denial, Guarded, Places, readable, unchanged, unheard
from registry.auth.policy import Policy
from registry.auth.principal import Principal
from registry.auth.routes import token_router
from registry.auth.service import TokenService
from registry.config import Settings
from registry.config.auth import closes, service_of
from registry.http import Authenticator, DistributionAPI, Limits, Namespaces
from registry.http.api import is_distribution, raw_path
from registry.http.exchange import ACTING, Receive, Scope, Send
from registry.http.intake import Intake
from registry.http.namespaces import hosts_of
from registry.http.ready import Ready, ReadyAnswers
from registry.observe import Observed
from registry.opening import open_service
from registry.restrict import Restricted
from registry.router import Router
from registry.server.shared import Pace
from storage.access import Action, AuditEntry
from storage.content import Actor
from storage.interface import Registry
from storage.stored import StoredRegistry


class Entrepot(FastAPI):
    """A FastAPI application that hands `/v2` to the distribution API before any middleware and router.

    `registry` is what everybody gets, behind the guard; `unguarded` is what stands behind it, for the application's own
    health. `access`, `policy`, `tokens` and `management` are there where there are accounts."""

    registry: Registry
    unguarded: Registry
    distribution: DistributionAPI
    pace: Callable[[str], float] | None = None
    """Takes a request of a principal or an address; how many seconds it has to wait. None: nobody has to."""

    def secure(self, settings: Settings) -> None:
        """From here on, all that is not the distribution API answers with the headers that browsers want."""
        public = settings.public_url or ""
        https = settings.tls.certificate is not None or public.startswith("https:")
        self._rest = SecurityHeaders(super().__call__, https=https)

    intake: Intake
    """For bodies that this worker holds in memory."""
    access: Access
    policy: Policy
    tokens: TokenService
    management: Management

    def serve(self, registry: Registry, settings: Settings) -> None:
        """From here on `registry` is what this application serves, to everybody: it has no accounts."""
        guard = self._guard(registry, settings)
        self._answer(guard, settings, OpenAuthenticator(guard, guarded_of(settings)))

    def serve_accounts(self, router: Router, access: Access, settings: Settings, version: Callable[[], object]) -> None:
        """From here on what `router` leads to is what this application serves, to those who may have it. `version` is a
        mark of all that the store holds, accounts included, which every change changes."""
        upstreams = [upstream.name for upstream in settings.upstream]
        self.access = access
        self.policy = Policy(
            access.accounts,
            access.standing,
            upstreams=upstreams,
            guarded=guarded_of(settings),
            closed=closes(settings.auth, settings.issuer, settings.oidc.issuer),
        )
        self.tokens = access.token_service(self.policy)
        self.management = management.management_of(
            access, self.policy, proxied=proxied_of(settings), public_url=settings.public_url
        )
        registry, places = (router, router) if router.mirrors else (router.hosted, None)
        guard = self._guard(registry, settings, places, noting(access), self.policy.renewed)
        authenticator = HeaderAuthenticator(
            guard, self.policy, access.credentials, clock=access.clock, key=os.urandom(32)
        )
        hosts = any(upstream.hosts for upstream in settings.upstream)
        self._answer(guard, settings, authenticator, ReadyAnswers(version, router.settled, by_host=hosts))

    def _guard(
        self,
        registry: Registry,
        settings: Settings,
        places: Places | None = None,
        denied: Denial = unheard,
        renew: Callable[[Principal], Principal] = unchanged,
    ) -> Guarded:
        restricted = Restricted(registry, read_only=settings.read_only, delete=settings.delete)
        self.unguarded = restricted
        return Guarded(restricted, places, denied, renew)

    def _answer(
        self,
        guard: Guarded,
        settings: Settings,
        authenticator: Authenticator,
        answers: ReadyAnswers | None = None,
    ) -> None:
        self.registry = Observed(guard)
        self.distribution = DistributionAPI(
            self.registry,
            limits=Limits(manifest=settings.limits.manifest),
            public_url=settings.public_url,
            namespaces=namespaces_of(settings),
            pace=self.pace,
            authenticator=authenticator,
            service=service_of(settings.auth, settings.public_url),
            answers=answers,
            intake=self.intake,
        )

    def answer_at_once(self, scope: Scope) -> tuple[Ready, str] | None:
        """See `DistributionAPI.answer_at_once`."""
        return self.distribution.answer_at_once(scope)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and is_distribution(raw_path(scope)):
            await self.distribution(scope, receive, send)
        elif scope["type"] == "http":
            async with self.intake.metered(receive) as counted:
                await self._rest(scope, counted, send)
        else:
            await self._rest(scope, receive, send)


def guarded_of(settings: Settings) -> list[str]:
    """The names of the upstreams that want a grant of their own."""
    return [upstream.name for upstream in settings.upstream if upstream.guarded]


def proxied_of(settings: Settings) -> bool:
    """Whether the settings say that a proxy stands before the server."""
    return settings.public_url is not None or bool(settings.trusted_proxies)


def noting(access: Access) -> Denial:
    """Writes denials to the audit log, with the request they came in."""

    def note(principal: Principal, action: Action, name: str) -> None:
        exchange = ACTING.get()
        by = exchange.actor if exchange is not None else Actor(principal.name)
        what, at = ",".join(action.words), access.clock()
        access.notes.add(AuditEntry(at, principal.name, what, name, "denied", by.address, by.request_id, by.user_agent))

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


def pace_of(settings: Settings) -> Callable[[str], float] | None:
    """The limit of requests, if there is one. Made before the fork, it holds for all workers together."""
    per_second = settings.limits.requests_per_second
    if not per_second:
        return None
    return Pace(per_second, settings.limits.burst or max(1, round(10 * per_second))).take


def create_app(
    settings: Settings, registry: Registry | None = None, *, pace: Callable[[str], float] | None = None
) -> Entrepot:
    """The application over `registry`, or over the store in `settings.data` and the mirrors of `settings.upstream`:
    those are opened when the server starts the application (after a fork, so no process shares another's files) and
    closed when it stops. The data directory has been prepared (`storage.opening.prepare`). A read-only registry
    collects nothing; its mirrors go on filling, since only what clients push or delete is refused. `pace`: what
    `pace_of` gave before the fork."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        assert isinstance(app, Entrepot)
        if registry is not None:
            yield
            return
        every = None if settings.read_only else settings.gc.interval
        async with open_service(settings, collect_every=every, scheduled=True, readable=readable) as router:
            stored = router.hosted
            assert isinstance(stored, StoredRegistry)
            async with open_access(settings, stored.accounts, stored.turns) as access:
                app.serve_accounts(router, access, settings, stored.metadata.version)
                yield

    # FastAPI's own documentation pages load their scripts from the internet.
    paths: dict[str, Any] = {"openapi_url": documentation.OPENAPI, "docs_url": None, "redoc_url": None}
    about: dict[str, Any] = {"version": __version__, "openapi_tags": management.TAGS}
    app = Entrepot(title="Entrepot", lifespan=lifespan, redirect_slashes=False, **about, **paths)
    app.pace = pace
    app.intake = Intake()
    app.secure(settings)
    if registry is not None:
        app.serve(registry, settings)
    else:
        app.include_router(token_router(lambda request: request.app.tokens))
        app.include_router(management.router)
        if settings.oidc.issuer:
            app.include_router(login.router)
    add_error_handlers(app)
    app.include_router(welcome.router)
    app.include_router(health.router)
    app.include_router(documentation.router)
    return app
