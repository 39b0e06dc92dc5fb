"""`Entrepot`, the ASGI application: `DistributionAPI` answers requests for `/v2`, and FastAPI all others."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from starlette.routing import BaseRoute

from registry import __version__
from registry.admin import (
    docker_v1_routes,
    documentation,
    health,
    login_routes,
    management_api,
    management_router,
    metrics_route,
    token_endpoint,
)
from registry.admin.cookies import separate_cookies
from registry.admin.middleware import HeadRequests, SecurityHeaders, add_error_handlers
from registry.admin.store_metrics import StoreMetrics
from registry.asgi import COUNTS_STATE, AsgiApp, Receive, Scope, Send, ServerCounts, is_distribution_path, raw_path
from registry.background_work import BackgroundWork
from registry.client_addresses import network_of
from registry.config import Settings
from registry.http.answer_cache import CachedAnswer
from registry.http.rate_limit import RateLimit, RateLimitedApp, refuse_with_json
from registry.service_factory import Service, ServiceFactory
from registry.status.worker_report import ServerRun, WorkerReporter, new_server_run
from registry.telemetry.telemetry import Telemetry
from registry.ui import site
from registry.ui.page_route import send_too_many_page
from registry.ui.pages import Pages
from storage.errors import StorageFull, TooManyRequests
from storage.interface import Registry

REOPEN_SECONDS: Final = 1.0
"""Seconds between two attempts to open the store for writing, if it was opened read-only because the disk was full."""
log = logging.getLogger("registry")
_TOKEN_ROUTER: Final = token_endpoint.token_router(lambda request: request.app.service.access.tokens)
_ROUTES: Final[list[BaseRoute]] = [
    *_TOKEN_ROUTER.routes,
    *login_routes.router.routes,
    *docker_v1_routes.router.routes,
    *management_api.management_routes(),
]
"""The routes that only an application with accounts has. When the settings change, the process makes a new application
(`registry.live_app`), which shares these routes. `include_router` would build each route again, which takes a
millisecond and memory for each route."""
_COMMON_ROUTES: Final[list[BaseRoute]] = [*documentation.welcome_router.routes, *health.router.routes]
"""Routes of every application, with or without accounts."""
_DOCUMENTATION_ROUTES: Final[list[BaseRoute]] = [
    *documentation.docs_router.routes,
    *documentation.openapi_router.routes,
]


class Entrepot(FastAPI):
    """A FastAPI application that passes requests for `/v2` directly to the distribution API, without FastAPI's
    middleware and routing.

    The application opens its `service` when the server starts the application (ASGI lifespan), and closes the service
    when the server stops the application. The server starts the application in each worker, after the fork, so that no
    two processes share open files."""

    def __init__(
        self,
        factory: ServiceFactory,
        telemetry: Telemetry,
        service: Service | None = None,
        server_run: ServerRun | None = None,
        *,
        starts_background_work: bool = True,
    ) -> None:
        """Creates the application without starting it.

        - `telemetry` records each request.
        - `service`: an open service, which the caller closes. None: the application opens a service with `factory` when
          the server starts the application.
        - `server_run`: the id and start time of the server. The workers of a server share it; None: a new one.
        - `starts_background_work`: whether a service that the application opens starts its background work (jobs,
          garbage collection, events, eviction and other work besides requests). If False, the caller starts this work
          with `Service.work`."""
        # FastAPI's own documentation pages are switched off: they load scripts from the internet, and generating the
        # OpenAPI document blocks the event loop. `registry.admin.documentation` serves pages without these problems.
        super().__init__(
            title="Entrepot",
            version=__version__,
            openapi_tags=management_api.OPENAPI_TAGS,
            redirect_slashes=False,
            openapi_url=None,
            docs_url=None,
            redoc_url=None,
            lifespan=lambda _: self._lifespan(),
        )
        self.factory = factory
        self.body_memory = factory.body_memory
        """Limits the memory of this worker for the bodies of requests and for large responses."""
        self.openapi_document = documentation.OpenAPIDocument(self.openapi)
        self.telemetry = telemetry
        self.request_recorder = telemetry.requests
        """The server reports each request to this object (`registry.server.connection.request_reports`)."""
        self._in_flight_cell = telemetry.metrics.in_flight.first_cell
        """A *cell* holds one number that a worker counts, in memory that all workers can read
        (`registry.telemetry.shared_cells`). `cells.own` has the cells of this worker. This is the index, in
        `cells.own`, of the cell that counts the requests in progress."""
        self.running_requests = 0
        """Number of requests in progress, except those that the response cache answers."""
        self.on_idle: Callable[[], None] | None = None
        """A function to call when the number of requests in progress falls to zero; None: no function is called."""
        self.closes_telemetry = False
        """True if the application closes `telemetry` when the application ends. Set this to False if another
        application uses the same `telemetry`."""
        self.server_run = server_run or new_server_run(factory.clock)
        self._service = service
        self._read_counts: Callable[[], ServerCounts] = ServerCounts  # all zero until the server passes a function
        self.starts_background_work = starts_background_work
        """Whether a service that the application opens from now on starts its background work."""
        self.is_retiring = False
        """Whether another application or process has taken over from this application. If True, responses
        without an end, such as streams of events, must end."""
        self.event_streams = Counter[str]()
        """The number of open streams of events by visitor (`registry.admin.event_stream`)."""
        self.pages: Pages | None = None
        """The objects that make the web pages; None: this registry has no web pages."""
        self._app_outside_v2: AsgiApp = HeadRequests(
            SecurityHeaders(  # around FastAPI's own `__call__`
                RateLimitedApp(super().__call__, factory.rate_limit, self._refuse),
                public_url=factory.settings.public_url,
            )
        )

    def openapi(self) -> dict[str, Any]:
        """Returns the OpenAPI document of all routes outside `/v2`. The first call builds it."""
        is_built = self.openapi_schema is not None
        document = super().openapi()
        if not is_built:
            management_router.complete_document(document)
        return document

    @property
    def service(self) -> Service:
        """The service that answers requests now. Raises RuntimeError if the server has not started the application, or
        if `release` was called."""
        if self._service is None:
            raise RuntimeError("the application has not been started")
        return self._service

    @property
    def work(self) -> BackgroundWork | None:
        """The background work of the service; None if there is no service, or if the service has no such work."""
        return None if self._service is None else self._service.work

    def release(self) -> None:
        """Drops the service of an application that has ended, so that the service's caches are freed. The application
        itself may stay in memory for ever, because the worker excludes all objects that exist at its start from
        Python's garbage collection (`gc.freeze`)."""
        self._service = None
        self._app_outside_v2 = _refuse_after_end

    def use_service(self, service: Service) -> None:
        """Makes the application answer new requests with `service`. Does not close the earlier service."""
        self._service = service

    def answer_at_once(self, scope: Scope) -> tuple[CachedAnswer, str] | None:
        """Returns the cached response to a request without a body, with a new request id. Returns None if the server
        has to call the application instead (see `DistributionAPI.answer_at_once`)."""
        if self.telemetry.metrics_port is not None and self._is_at_metrics_port(scope):
            return None
        return self.service.distribution.answer_at_once(scope)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                self._read_counts = scope.get("state", {}).get(COUNTS_STATE, ServerCounts)
            await self._app_outside_v2(scope, receive, send)
            return
        telemetry, cells, in_flight = self.telemetry, self.telemetry.metrics.cells, self._in_flight_cell
        self.running_requests += 1
        cells.own[in_flight] += 1
        try:
            if telemetry.tracing is not None:
                with telemetry.tracing.start_request(scope):
                    await self._answer(scope, receive, send)
            elif telemetry.metrics_port is None and is_distribution_path(raw_path(scope)):
                await self.service.distribution(scope, receive, send)  # `_answer` would cost another coroutine
            else:
                await self._answer(scope, receive, send)
        finally:
            cells.own[in_flight] -= 1
            self.running_requests -= 1
            if self.on_idle is not None and not self.running_requests:
                self.on_idle()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request to the distribution API or to FastAPI. At the metrics port, answers every path except
        `/metrics` with 404."""
        if self._is_at_metrics_port(scope) and scope["path"] != metrics_route.METRICS_PATH:
            await PlainTextResponse("this port serves /metrics only\n", 404)(scope, receive, send)
        elif is_distribution_path(raw_path(scope)):
            await self.service.distribution(scope, receive, send)
        else:
            separate_cookies(scope)
            client = network_of(scope["client"][0]) if scope["client"] else None
            async with self.body_memory.limit_body(receive, send, client) as (metered_receive, metered_send):
                await self._app_outside_v2(scope, metered_receive, metered_send)

    async def _refuse(self, scope: Scope, send: Send, error: TooManyRequests) -> None:
        """Answers a request outside `/v2` that the rate limit refuses: with an HTML page if the path is that of a page,
        and with JSON otherwise."""
        if self.pages is not None and site.is_page_path(scope["path"]):
            await send_too_many_page(self.pages, scope, send, error)
        else:
            await refuse_with_json(scope, send, error)

    def _is_at_metrics_port(self, scope: Scope) -> bool:
        """Returns whether a request came to the port that serves only the metrics."""
        port = self.telemetry.metrics_port
        return port is not None and scope["server"] is not None and scope["server"][1] == port

    @asynccontextmanager
    async def _lifespan(self) -> AsyncIterator[None]:
        """The ASGI lifespan: opens the service at the start of the application, and closes it at the end. Leaves alone
        a service that was passed to the constructor."""
        self.telemetry.start_worker()
        if self._service is not None:
            yield
            return
        async with AsyncExitStack() as stack:
            if self.closes_telemetry:
                stack.push_async_callback(self.telemetry.aclose)
            opening = self.factory.open(may_open_read_only=True, starts_background_work=self.starts_background_work)
            service = await stack.enter_async_context(opening)
            self.use_service(service)
            reopening = None
            if service.is_store_read_only:
                reopening = asyncio.create_task(reopen_store(self, stack, service.retire_read_only_store))
            # The lambdas look up `_read_counts` and `service` at each report, because both may be replaced.
            reporter = WorkerReporter(
                self.factory.settings.data,
                self.server_run,
                counts=lambda: self._read_counts(),
                endpoints=lambda: self.service.endpoint_health(),
                is_read_only=lambda: self.service.is_store_read_only,
                clock=self.factory.clock,
            )
            reporting = asyncio.create_task(reporter.run())
            try:
                yield
            finally:
                reporting.cancel()
                await asyncio.wait([reporting])
                if reopening is not None:
                    reopening.cancel()
                    await asyncio.wait([reopening])


async def reopen_store(app: Entrepot, stack: AsyncExitStack, retire_read_only_store: Callable[[], None]) -> None:
    """Replaces a store that was opened read-only because the disk was full.

    Tries every `REOPEN_SECONDS` to open a new service whose store is open for writing. After the first success, makes
    `app` answer with the new service, and calls `retire_read_only_store`, which closes the read-only store. `stack`
    closes the new service at the end of the application. The new service starts its background work only if
    `app.starts_background_work` is True and `app.is_retiring` is False."""
    logged_error = ""
    while True:
        await asyncio.sleep(REOPEN_SECONDS)
        try:
            starts_background_work = app.starts_background_work and not app.is_retiring
            opening = app.factory.open(may_open_read_only=False, starts_background_work=starts_background_work)
            service = await stack.enter_async_context(opening)
        except StorageFull:
            continue
        except Exception as error:
            # Retry after any error: while this worker has the store open read-only, its lock keeps other processes from
            # writing to the store. Log only an error that differs from the previous one.
            if logged_error != (logged_error := repr(error)):
                log.exception(
                    "the store cannot be opened again for writing; the next attempt is in %g s", REOPEN_SECONDS
                )
            continue
        app.use_service(service)
        retire_read_only_store()
        await _start_or_hand_over_work(app)
        log.warning("the disk has room again: the store is open for writing, so pushes and deletes work again")
        return


async def _start_or_hand_over_work(app: Entrepot) -> None:
    """Starts or hands over the background work of `app` after the store was opened for writing. During the opening,
    `app.starts_background_work` and `app.is_retiring` may have changed.

    - If `app.is_retiring` is True: hands over the work to the new application or process
      (`BackgroundWork.hand_over`).
    - Otherwise, if `app.starts_background_work` is True: starts the work, unless it runs already."""
    try:
        if app.work is not None and app.starts_background_work and not app.is_retiring:
            await app.work.start()
        if app.work is not None and app.is_retiring:
            await app.work.hand_over()
    except Exception:
        log.exception("the background work failed when the store was opened for writing")


async def _refuse_after_end(scope: Scope, receive: Receive, send: Send) -> None:
    raise RuntimeError("the application has ended")


def create_app(
    settings: Settings,
    registry: Registry | None = None,
    *,
    rate_limit: RateLimit | None = None,
    telemetry: Telemetry | None = None,
    clock: Callable[[], float] = time.time,
    server_run: ServerRun | None = None,
    starts_background_work: bool = True,
) -> Entrepot:
    """Returns the application.

    - `registry`: a registry to serve without accounts, so that every client may do everything. None: the application
      serves the store in the directory `settings.data`, which `storage.composition.prepare_data_dir` has prepared, and
      the mirrors of `settings.upstream`.
    - `rate_limit`: the rate limit that all workers share (`registry.service_factory.shared_rate_limit`); None: no
      limit.
    - `telemetry`: the server's metrics, which the caller creates before the fork, so that all workers share them; None:
      this process has its own metrics.
    - `clock`: returns seconds since 1970.
    - `server_run`, `starts_background_work`: see `Entrepot`."""
    has_shared_telemetry = telemetry is not None
    telemetry = telemetry or Telemetry(settings)
    factory = ServiceFactory(settings, rate_limit=rate_limit, telemetry=telemetry, clock=clock)
    service = None if registry is None else factory.without_accounts(registry)
    app = Entrepot(factory, telemetry, service, server_run, starts_background_work=starts_background_work)
    app.closes_telemetry = not has_shared_telemetry
    add_error_handlers(app)
    # The routing compares a request with the routes in their order, so the large groups of routes come last.
    routes = app.router.routes
    if registry is None and settings.pages.enabled:
        app.pages = Pages()
        routes += site.ROUTES
    routes += _COMMON_ROUTES
    if settings.metrics.enabled:
        store_metrics = StoreMetrics(settings, clock) if registry is None else None
        routes += metrics_route.metrics_router(telemetry, settings.metrics.allow, store_metrics).routes
    if registry is None:
        routes += _ROUTES
    routes += _DOCUMENTATION_ROUTES
    return app
