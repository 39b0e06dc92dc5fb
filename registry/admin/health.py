"""Health checks for load balancers and orchestrators: `live` tells that the process answers, `ready` that it can
serve."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from storage.errors import RegistryError
from storage.interface import Lister

router = APIRouter(prefix="/health", tags=["health"])


class Health(BaseModel):
    """`reason` tells what is wrong. With `disk full`, reads and deletes work, and nothing new is stored."""

    status: Literal["ok", "failing", "disk full"]
    reason: str | None = None


@router.get("/live", response_model_exclude_none=True)
async def live() -> Health:
    """The process answers."""
    return Health(status="ok")


@router.get("/ready", response_model_exclude_none=True, responses={503: {"model": Health}})
async def ready(request: Request, response: Response) -> Health:
    """Makes a small request to the registry; answers 503 if that fails. A full disk is reported with 200: with 503,
    load balancers would stop reads, and deletes that make room."""
    registry: Lister = request.app.service.unguarded
    try:
        await registry.repositories(None, 1)
    except RegistryError as error:
        response.status_code = 503
        return Health(status="failing", reason=error.message)
    if (problem := request.app.service.storage_problem()) is not None:
        return Health(status="disk full", reason=problem)
    return Health(status="ok")
