"""The ASGI application: `/v2` for the distribution API, FastAPI for everything beside it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

from fastapi import FastAPI

from registry import __version__
from registry.admin import documentation, health, login_routes, management_api, token_endpoint
from registry.admin.middleware import SecurityHeaders, add_error_handlers
from registry.config import Settings
from registry.http.answer_cache import CachedAnswer
from registry.http.asgi import Receive, Scope, Send, is_distribution, raw_path
from registry.http.rate_limit import RateLimit, RateLimitedApp
from registry.service_factory import Service, ServiceFactory
from storage.errors import StorageFull
from storage.interface import Registry

REOPEN_SECONDS: Final = 1.0
"""Seconds between two attempts to open a store that had no room."""
log = logging.getLogger("registry")


class Entrepot(FastAPI):
    """A FastAPI application that passes requests for `/v2` to the distribution API before any middleware and routing.

    `service`: what it serves. It is opened when the server starts the application, after the fork, so that no two
    processes share its files; and closed when the application stops."""

    def __init__(self, factory: ServiceFactory, service: Service | None = None) -> None:
        """`service`: one that is opened already, and closed by the caller."""
        # FastAPI's own documentation pages load scripts from the internet, and making the description blocks the event
        # loop: `registry.admin.documentation` serves both.
        super().__init__(
            title="Entrepot",
            version=__version__,
            openapi_tags=management_api.TAGS,
            redirect_slashes=False,
            openapi_url=None,
            docs_url=None,
            redoc_url=None,
            lifespan=lambda _: self._run(),
        )
        self.factory = factory
        self.body_memory = factory.body_memory
        self._service = service
        public, tls = factory.settings.public_url or "", factory.settings.tls
        self._beside_v2 = SecurityHeaders(
            RateLimitedApp(super().__call__, factory.rate_limit),
            https=tls.certificate is not None or public.startswith("https:"),
        )

    @property
    def service(self) -> Service:
        """Raises RuntimeError before the application is started."""
        if self._service is None:
            raise RuntimeError("the application has not been started")
        return self._service

    def serve(self, service: Service) -> None:
        """Serves `service` from now on."""
        self._service = service

    def answer_at_once(self, scope: Scope) -> tuple[CachedAnswer, str] | None:
        """See `DistributionAPI.answer_at_once`."""
        return self.service.distribution.answer_at_once(scope)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and is_distribution(raw_path(scope)):
            await self.service.distribution(scope, receive, send)
        elif scope["type"] == "http":
            async with self.body_memory.metered(receive, send) as (metered_receive, metered_send):
                await self._beside_v2(scope, metered_receive, metered_send)
        else:
            await self._beside_v2(scope, receive, send)

    def build_routes(self) -> None:
        """Makes FastAPI build what it needs for its routes. It would do so at the first request to each, and block the
        event loop for 60 ms; this may run in a thread."""
        scope = {"type": "http", "method": "GET", "path": "/", "root_path": "", "headers": []}
        for route in self.routes:
            route.matches(dict(scope))

    @asynccontextmanager
    async def _run(self) -> AsyncIterator[None]:
        if self._service is not None:
            yield
            return
        async with AsyncExitStack() as stack:
            service = await stack.enter_async_context(self.factory.open(may_freeze=True))
            self.serve(service)
            reopening = None
            if service.is_frozen:
                reopening = asyncio.create_task(reopen_store(self, stack, service.retire))
            routes = asyncio.create_task(asyncio.to_thread(self.build_routes))
            try:
                yield
            finally:
                await routes
                if reopening is not None:
                    reopening.cancel()
                    await asyncio.wait([reopening])


async def reopen_store(app: Entrepot, stack: AsyncExitStack, retire: Callable[[], None]) -> None:
    """Replaces a store that was opened read-only because the disk was full: opens it again as soon as there is room,
    makes `app` serve it, and calls `retire`, which ends the read-only one. `stack` closes both
    (`storage.metadata.sqlite.immutable_database`)."""
    logged = ""
    while True:
        await asyncio.sleep(REOPEN_SECONDS)
        try:
            service = await stack.enter_async_context(app.factory.open(may_freeze=False))
        except StorageFull:
            continue
        except Exception as error:  # retried: while this worker reads the file as it stands, no other one can write
            if logged != (logged := repr(error)):
                log.exception("the store cannot be opened again; the next try is in a second")
            continue
        app.serve(service)
        retire()
        log.warning("there was room to open the database: deletes work again")
        return


def create_app(
    settings: Settings,
    registry: Registry | None = None,
    *,
    rate_limit: RateLimit | None = None,
    clock: Callable[[], float] = time.time,
) -> Entrepot:
    """Returns the application over `registry`, without accounts, or over the store in `settings.data` and the mirrors
    of `settings.upstream`. The data directory has been prepared (`storage.composition.prepare_data_dir`). `rate_limit`:
    see `registry.service_factory.shared_rate_limit`. `clock`: seconds since 1970."""
    factory = ServiceFactory(settings, rate_limit=rate_limit, clock=clock)
    app = Entrepot(factory, None if registry is None else factory.without_accounts(registry))
    if registry is None:
        app.include_router(token_endpoint.token_router(lambda request: request.app.service.access.tokens))
        app.include_router(management_api.router)
        if settings.oidc.issuer:
            app.include_router(login_routes.router)
    add_error_handlers(app)
    app.include_router(documentation.welcome_router)
    app.include_router(health.router)
    app.include_router(documentation.docs_router)
    app.include_router(documentation.openapi_router(documentation.OpenAPIDocument(app.openapi)))
    return app
