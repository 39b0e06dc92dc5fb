"""The route `/metrics`, which Prometheus scrapes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from ipaddress import ip_address, ip_network
from typing import Final

from fastapi import APIRouter, HTTPException, Request, Response
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from registry.admin.caller import identify_caller, require_admin, require_login
from registry.asgi import client_address
from registry.telemetry.exposition import collector_of, render_metrics
from registry.telemetry.telemetry import Telemetry

log = logging.getLogger("registry")
METRICS_PATH: Final = "/metrics"
STORE_WAIT_SECONDS: Final = 4.0
"""How long a scrape waits for the metrics of the store. This must be less than the scrape timeout of Prometheus, which
is 10 s by default."""


class StoreReader:
    """Reads the metrics of the store for scrapes. Only one read runs at a time, so that scrapes do not block all
    threads of the default executor while the disk hangs."""

    def __init__(self, store: Collector, wait_seconds: float) -> None:
        self._store = store
        self._wait_seconds = wait_seconds
        self._latest_read: asyncio.Future[list[Metric]] | None = None
        """The latest read, which may be complete."""

    async def read(self) -> Sequence[Metric]:
        """Starts a read if none is running, waits for its end, and returns the metrics. Returns an empty list if the
        wait takes longer than `wait_seconds`. A timeout or a cancellation of this call does not stop the read. Raises
        the errors of the collector."""
        if self._latest_read is None or self._latest_read.done():
            self._latest_read = asyncio.get_running_loop().run_in_executor(None, lambda: list(self._store.collect()))
        reading = self._latest_read
        done, _ = await asyncio.wait([reading], timeout=self._wait_seconds)
        if not done:
            log.warning("metrics of the store are missing, because the disk has not answered yet")
            return []
        return reading.result()


def metrics_router(
    telemetry: Telemetry,
    allow: Iterable[str],
    store: Collector | None = None,
    store_wait_seconds: float = STORE_WAIT_SECONDS,
) -> APIRouter:
    """Returns the router of `/metrics`. `allow`: the networks whose clients need no login. `store`: collects the
    metrics of the store; None: the response has no such metrics. `store_wait_seconds`: how long a scrape waits for
    these metrics before it leaves them out."""
    router = APIRouter(tags=["health"])
    networks = [ip_network(network) for network in allow]
    store_reader = None if store is None else StoreReader(store, store_wait_seconds)

    @router.get(METRICS_PATH, response_class=Response)
    async def metrics(request: Request) -> Response:
        """The metrics of all worker processes, in the text format of Prometheus. If the Accept header asks for
        OpenMetrics, they are in the format of OpenMetrics."""
        if not _is_on_metrics_port(request, telemetry) and not _is_allowed(request):
            await _check_admin(request)
        collectors = telemetry.collectors()
        if store_reader is not None:
            store_metrics = await store_reader.read()
            collectors.append(collector_of(lambda: store_metrics))
        body, media_type = await asyncio.to_thread(render_metrics, collectors, request.headers.get("accept", ""))
        return Response(body, headers={"content-type": media_type})

    def _is_allowed(request: Request) -> bool:
        """Returns whether the client is in a network whose clients need no login."""
        try:
            address = ip_address(client_address(request.scope))
        except ValueError:
            return False
        return any(address in network for network in networks)

    return router


def _is_on_metrics_port(request: Request, telemetry: Telemetry) -> bool:
    server = request.scope.get("server")
    return telemetry.metrics_port is not None and server is not None and server[1] == telemetry.metrics_port


async def _check_admin(request: Request) -> None:
    """Checks that the caller is an admin. Raises Unauthorized if the caller is not logged in, and Denied if the caller
    is not an admin. Raises HTTPException (403) if the service cannot have accounts (`Service.access` is None)."""
    if request.app.service.access is None:
        raise HTTPException(403, "the settings do not allow this address to read the metrics")
    await require_admin(await require_login(await identify_caller(request)))
