"""Health checks for load balancers and orchestrators.

- `/livez` and `/health/live` show that the process answers.
- `/readyz` checks the database and the disk, lists the results, and returns 503 if one of the checks fails.
- `/health/ready` returns 503 only if the registry cannot read from the store. On a full disk it returns 200, because
  reads and deletes work.
"""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel

from registry.status.worker_report import INSTANCE_HEADER
from storage.errors import RegistryError
from storage.interface import Lister

router = APIRouter(tags=["health"])


class Health(BaseModel):
    """The result of a health check. `reason` says what is wrong; it is missing if the status is `ok`. While the status
    is `disk full`, reads and deletes work, and pushes fail."""

    status: Literal["ok", "failing", "disk full"]
    reason: str | None = None


class ReadinessCheck(BaseModel):
    """One thing that the registry needs. `reason` says what is wrong; it is missing if the status is `ok`."""

    name: str
    status: Literal["ok", "failing"]
    reason: str | None = None


class ReadinessReport(BaseModel):
    """The status is `failing` if one of the checks fails. `read_only` says whether the registry refuses every push and
    delete. It does if the setting `read_only` is true, or if the disk was full when the server started. `read_only`
    does not affect the status."""

    status: Literal["ok", "failing"]
    read_only: bool
    checks: list[ReadinessCheck]


@router.get("/livez", response_model_exclude_none=True)
async def livez(request: Request, response: Response) -> Health:
    """Answers 200 whenever the process can answer. Checks nothing else. The header `X-Entrepot-Instance` has a random
    id that the server gets at each start. `entrepot doctor` compares ids to find out whether an address leads to this
    server."""
    response.headers[INSTANCE_HEADER] = request.app.server_run.instance
    response.headers["cache-control"] = "no-store"
    return Health(status="ok")


@router.get("/readyz", response_model_exclude_none=True, responses={503: {"model": ReadinessReport}})
async def readyz(
    request: Request,
    response: Response,
    exclude: Annotated[
        list[str] | None,
        Query(
            max_length=40,
            description="A check to leave out. Repeat the parameter to leave out more checks",
            examples=["disk"],
        ),
    ] = None,
) -> ReadinessReport:
    """Answers 200 if all checks succeed, otherwise 503:

    - `database`: the database can be read.
    - `migrations`: the database has the tables of this version of Entrepot.
    - `disk`: the disk can be written, and has more free space than `min_free` and `min_free_percent` of `[disk]` in the
      settings demand.

    No check sends requests to an upstream. A registry with a full disk still serves reads. If you have only one server,
    use `?exclude=disk`, so that the load balancer still sends requests to it when its disk is full."""
    results = await request.app.service.readiness.check(exclude or ())
    is_ready = all(result.reason is None for result in results)
    if not is_ready:
        response.status_code = 503
    response.headers["cache-control"] = "no-store"
    return ReadinessReport(
        status="ok" if is_ready else "failing",
        read_only=request.app.factory.settings.read_only or request.app.service.is_store_read_only,
        checks=[
            ReadinessCheck(name=result.name, status="ok" if result.reason is None else "failing", reason=result.reason)
            for result in results
        ],
    )


@router.get("/health/live", response_model_exclude_none=True)
async def live() -> Health:
    """Answers 200 whenever the process can answer. Checks nothing else."""
    return Health(status="ok")


@router.get("/health/ready", response_model_exclude_none=True, responses={503: {"model": Health}})
async def ready(request: Request, response: Response) -> Health:
    """Reads the name of one repository from the store, and answers 503 if the read fails. On a full disk it answers
    200, so that load balancers still send reads and deletes."""
    # `unchecked_registry` does not check the caller's rights: health checks come without a login.
    registry: Lister = request.app.service.unchecked_registry
    try:
        await registry.repositories(None, 1)  # reads one name
    except RegistryError as error:
        response.status_code = 503
        return Health(status="failing", reason=error.message)
    full_disk_reason: str | None = request.app.service.storage_problem()  # None unless the disk is full
    if full_disk_reason is not None:
        return Health(status="disk full", reason=full_disk_reason)
    return Health(status="ok")
