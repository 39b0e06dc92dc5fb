"""The page *System*, for admins: shows the state of the server."""

from __future__ import annotations

from typing import Final

from fastapi import APIRouter, Request, Response

from registry.admin.server_status import read_server_status
from registry.ui.languages import translatable
from registry.ui.page_route import PageRoute, admin_of, page_response

SYSTEM_PATH: Final = "/ui/system"
CHECK_NAMES: Final = {
    "database": translatable("Database"),
    "migrations": translatable("Version of the database"),
    "disk": translatable("Disk"),
}
"""Maps each check of `registry.status.readiness` to the name that the page shows."""
BREAKER_NAMES: Final = {
    "closed": translatable("in order"),
    "half-open": translatable("is tried again"),
    "open": translatable("fails"),
    "unknown": translatable("unknown"),
}
"""Maps each state of the circuit breaker of an upstream endpoint to the text that the page shows."""

router = APIRouter(route_class=PageRoute, include_in_schema=False)


@router.get(SYSTEM_PATH)
async def system(request: Request) -> Response:
    """Shows the version, the workers, the disk, the upstreams, and whether the registry is ready to serve. Raises
    Unauthorized, Denied."""
    caller = await admin_of(request)
    service = request.app.service
    # `with_cache=False`: the page does not show the number of cached images, which takes time to count.
    status = await read_server_status(caller.upkeep, with_cache=False)
    checks = await service.readiness.check(())
    settings = request.app.factory.settings  # `service` was made with these settings
    return await page_response(
        request,
        "system.html",
        section="system",
        status=status,
        checks=checks,
        check_names=CHECK_NAMES,
        breaker_names=BREAKER_NAMES,
        is_read_only=settings.read_only or service.is_store_read_only,
    )
