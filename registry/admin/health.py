"""Health, for load balancers and orchestrators: live says that the process answers, ready that it can serve."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from storage.errors import RegistryError
from storage.interface import Lister

router = APIRouter(prefix="/health", tags=["health"])


class Health(BaseModel):
    """What is wrong, where something is. `disk full`: reads and deletes work, nothing new is stored."""

    status: Literal["ok", "failing", "disk full"]
    reason: str | None = None


@router.get("/live", response_model_exclude_none=True)
async def live() -> Health:
    """The process answers."""
    return Health(status="ok")


@router.get("/ready", response_model_exclude_none=True, responses={503: {"model": Health}})
async def ready(request: Request, response: Response) -> Health:
    """The registry answers a small question; 503 where it does not. A full disk is told with 200: with 503, load
    balancers would keep those away who read, and who can make room."""
    registry: Lister = request.app.service.unguarded
    try:
        await registry.repositories(None, 1)
    except RegistryError as error:
        response.status_code = 503
        return Health(status="failing", reason=error.message)
    if (trouble := request.app.service.storage_problem()) is not None:
        return Health(status="disk full", reason=trouble)
    return Health(status="ok")
