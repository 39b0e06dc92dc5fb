"""The composition root: what is built, and from what, when the server starts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from registry.admin import health, welcome
from registry.admin.errors import add_error_handlers
from registry.config import Settings
from registry.http import DistributionAPI, Limits
from registry.http.api import is_distribution, raw_path
from registry.http.exchange import Receive, Scope, Send
from registry.observe import Observed
from registry.restrict import Restricted
from storage.interface import Registry
from storage.opening import open_registry


class Entrepot(FastAPI):
    """A FastAPI application that hands `/v2` to the distribution API before any middleware and router."""

    registry: Registry
    distribution: DistributionAPI

    def serve(self, registry: Registry, settings: Settings) -> None:
        """From here on `registry` is what this application serves."""
        limits = Limits(manifest=settings.limits.manifest)
        restricted = Restricted(registry, read_only=settings.read_only, delete=settings.delete)
        self.registry = Observed(restricted)
        self.distribution = DistributionAPI(self.registry, limits=limits, public_url=settings.public_url)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and is_distribution(raw_path(scope)):
            await self.distribution(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def create_app(settings: Settings, registry: Registry | None = None) -> Entrepot:
    """The application over `registry`, or over the store in `settings.data`: that one is opened when the server starts
    the application (after a fork, so no process shares another's files) and closed when it stops. The data directory
    has been prepared (`storage.opening.prepare`). A read-only registry collects nothing."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        assert isinstance(app, Entrepot)
        if registry is not None:
            yield
            return
        every = None if settings.read_only else settings.gc.interval
        async with open_registry(
            settings.data, grace=settings.gc.grace, expire=settings.uploads.expire, collect_every=every
        ) as stored:
            app.serve(stored, settings)
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
