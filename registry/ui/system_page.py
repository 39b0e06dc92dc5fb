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
"""The names of the checks of `registry.status.readiness` on the page."""
BREAKER_NAMES: Final = {
    "closed": translatable("in order"),
    "half-open": translatable("is tried again"),
    "open": translatable("fails"),
    "unknown": translatable("unknown"),
}
"""The texts for the state of an upstream endpoint, by the state of its circuit breaker."""

router = APIRouter(route_class=PageRoute, include_in_schema=False)


@router.get(SYSTEM_PATH)
async def system(request: Request) -> Response:
    """Shows the version, the workers, the disk and the upstreams, and whether the registry is ready. Raises
    Unauthorized, Denied."""
    caller = await admin_of(request)
    service = request.app.service
    # The page does not show the cached images, and counting them would take time.
    status = await read_server_status(caller.upkeep, with_cache=False)
    checks = await service.readiness.check(())
    settings = request.app.factory.settings  # those with which the factory made `service`
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
