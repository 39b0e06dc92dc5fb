"""The route `/api/v1/status`, which shows the current state of the server."""

from __future__ import annotations

from registry.admin.caller import AdminCaller
from registry.admin.management_router import management_router
from registry.admin.server_status import ServerStatus, read_server_status

router = management_router()


@router.get("/status", tags=["status"])
async def read_status(caller: AdminCaller) -> ServerStatus:
    """Returns what the server does now: its processes, the disk, uploads and downloads that are not complete, jobs, the
    use of the cache and the quotas, and how its upstreams respond. Each worker process reports its numbers once a
    second, so these are up to a second old."""
    return await read_server_status(caller.upkeep)
