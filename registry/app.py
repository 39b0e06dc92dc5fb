"""The composition root: what is built, and from what, when the server starts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from registry.admin import health, welcome
from registry.admin.errors import add_error_handlers
from registry.config import Settings
from registry.http import DistributionAPI, Limits, Namespaces
from registry.http.api import is_distribution, raw_path
from registry.http.exchange import Receive, Scope, Send
from registry.http.namespaces import hosts_of
from registry.observe import Observed
from registry.opening import open_service
from registry.restrict import Restricted
from storage.interface import Registry


class Entrepot(FastAPI):
    """A FastAPI application that hands `/v2` to the distribution API before any middleware and router."""

    registry: Registry
    distribution: DistributionAPI

    def serve(self, registry: Registry, settings: Settings) -> None:
        """From here on `registry` is what this application serves."""
        restricted = Restricted(registry, read_only=settings.read_only, delete=settings.delete)
        self.registry = Observed(restricted)
        self.distribution = DistributionAPI(
            self.registry,
            limits=Limits(manifest=settings.limits.manifest),
            public_url=settings.public_url,
            namespaces=namespaces_of(settings),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and is_distribution(raw_path(scope)):
            await self.distribution(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


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


def create_app(settings: Settings, registry: Registry | None = None) -> Entrepot:
    """The application over `registry`, or over the store in `settings.data` and the mirrors of `settings.upstream`:
    those are opened when the server starts the application (after a fork, so no process shares another's files) and
    closed when it stops. The data directory has been prepared (`storage.opening.prepare`). A read-only registry
    collects nothing; its mirrors go on filling, since only what clients push or delete is refused."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        assert isinstance(app, Entrepot)
        if registry is not None:
            yield
            return
        every = None if settings.read_only else settings.gc.interval
        async with open_service(settings, collect_every=every, scheduled=True) as router:
            app.serve(router if router.mirrors else router.hosted, settings)
            yield

    # The documentation pages load their scripts from the internet, so only the description itself is served.
    paths: dict[str, Any] = {"openapi_url": "/api/openapi.json", "docs_url": None, "redoc_url": None}
    app = Entrepot(title="Entrepot", lifespan=lifespan, redirect_slashes=False, **paths)
    if registry is not None:
        app.serve(registry, settings)
    add_error_handlers(app)
    app.include_router(welcome.router)
    app.include_router(health.router)
    return app
