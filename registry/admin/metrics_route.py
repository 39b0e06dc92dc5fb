"""`/metrics`, for Prometheus and programs that read its format."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from ipaddress import ip_address, ip_network
from typing import Final

from fastapi import APIRouter, HTTPException, Request, Response
from prometheus_client.registry import Collector

from registry.admin.caller import identify_caller, require_admin, require_login
from registry.asgi import client_address
from registry.telemetry.exposition import render_metrics
from registry.telemetry.telemetry import Telemetry

METRICS_PATH: Final = "/metrics"


def metrics_router(telemetry: Telemetry, allow: Iterable[str], store: Collector | None = None) -> APIRouter:
    """Returns the router of `/metrics`. `allow`: the networks whose clients need no login. `store`: collects metrics of
    the store; None: there are none."""
    router = APIRouter(tags=["health"])
    networks = [ip_network(network) for network in allow]

    @router.get(METRICS_PATH, response_class=Response)
    async def metrics(request: Request) -> Response:
        """The metrics of all worker processes, in the text format of Prometheus, or in OpenMetrics if the Accept header
        asks for it."""
        if not _is_on_metrics_port(request, telemetry) and not _is_allowed(request):
            await _check_admin(request)
        collectors = [*telemetry.collectors(), *([] if store is None else [store])]
        body, media_type = await asyncio.to_thread(render_metrics, collectors, request.headers.get("accept", ""))
        return Response(body, headers={"content-type": media_type})

    def _is_allowed(request: Request) -> bool:
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
    """Raises Unauthorized or Denied unless the caller may administrate the registry."""
    if request.app.service.access is None:
        raise HTTPException(403, "the settings do not allow this address to read the metrics")
    await require_admin(await require_login(await identify_caller(request, None, None)))
