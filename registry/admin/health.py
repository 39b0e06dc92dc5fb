"""Health checks for load balancers and orchestrators: `/health/live` shows that the process answers, `/health/ready`
that it can serve content."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from storage.errors import RegistryError
from storage.interface import Lister

router = APIRouter(prefix="/health", tags=["health"])


class Health(BaseModel):
    """The result of a health check. `reason` says what is wrong; it is missing if the status is `ok`. While the status
    is `disk full`, reads and deletes work, and pushes fail."""

    status: Literal["ok", "failing", "disk full"]
    reason: str | None = None


@router.get("/live", response_model_exclude_none=True)
async def live() -> Health:
    """Answers 200 whenever the process can answer. It checks nothing else."""
    return Health(status="ok")


@router.get("/ready", response_model_exclude_none=True, responses={503: {"model": Health}})
async def ready(request: Request, response: Response) -> Health:
    """Reads the name of one repository from the store, and answers 503 if that fails. If the disk is full, the HTTP
    status is 200: a load balancer that saw 503 would send no more requests to this registry, but on a full disk reads
    still work, and deletes make room."""
    # The registry without the check of the caller's rights, because health checks come without a login.
    registry: Lister = request.app.service.unchecked_registry
    try:
        await registry.repositories(None, 1)  # a page of one name, from the first repository on
    except RegistryError as error:
        response.status_code = 503
        return Health(status="failing", reason=error.message)
    full_disk_reason: str | None = request.app.service.storage_problem()  # None unless the disk is full
    if full_disk_reason is not None:
        return Health(status="disk full", reason=full_disk_reason)
    return Health(status="ok")
