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
    """The result of a health check. `reason` says what is wrong. While the status is `disk full`, reads and deletes
    work, and pushes fail."""

    status: Literal["ok", "failing", "disk full"]
    reason: str | None = None


@router.get("/live", response_model_exclude_none=True)
async def live() -> Health:
    """Answers 200 as long as the process can answer at all."""
    return Health(status="ok")


@router.get("/ready", response_model_exclude_none=True, responses={503: {"model": Health}})
async def ready(request: Request, response: Response) -> Health:
    """Reads one entry from the store and answers 503 if that fails. A full disk is reported with status 200, because a
    load balancer that sees 503 would stop sending requests, also the reads that still work and the deletes that make
    room."""
    registry: Lister = request.app.service.unchecked_registry
    try:
        await registry.repositories(None, 1)
    except RegistryError as error:
        response.status_code = 503
        return Health(status="failing", reason=error.message)
    if (problem := request.app.service.storage_problem()) is not None:
        return Health(status="disk full", reason=problem)
    return Health(status="ok")
