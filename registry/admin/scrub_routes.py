"""The routes of `/api/v1` for damaged content, and for scrub. Scrub reads all stored content again to find damage. The
docstrings of the routes are the descriptions in the OpenAPI document."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Query
from pydantic import Field

from registry.admin import models
from registry.admin.body_model import BodyModel
from registry.admin.caller import AdminCaller
from registry.admin.job_models import JobResponse
from registry.admin.job_routes import queue_job
from registry.admin.management_route import LimitQuery
from registry.admin.management_router import management_router
from registry.admin.scrub_status import (
    DamagedBlobResponse,
    QuarantinedResponse,
    ScrubStatus,
    delete_quarantined,
    read_quarantine,
    read_scrub_status,
)
from registry.http.query import MAX_NUMBER
from registry.upkeep.scrub_job import scrub_arguments
from storage.jobs import JobRunning
from storage.upkeep.scrubber import SCRUB_KIND

router = management_router()


class ScrubRequest(BodyModel):
    """The options of a scrub job."""

    rate: int | None = Field(
        default=None, gt=0, le=MAX_NUMBER, description="Bytes to read per second; null: the rate in the settings"
    )
    keep_going: bool = Field(default=False, description="Continue after twenty damaged blobs in a row")


DigestPath = Annotated[str, Path(max_length=200, examples=["sha256:…"])]


@router.get("/scrub", tags=["scrub"])
async def show_scrub(caller: AdminCaller) -> ScrubStatus:
    """Returns the rounds of scrub with their progress, the scrub job, and the damaged manifests."""
    return await read_scrub_status(caller.upkeep.store)


@router.post("/scrub", tags=["scrub"], status_code=202)
async def start_scrub(caller: AdminCaller, request: ScrubRequest | None = None) -> JobResponse:
    """Starts a job that completes the current round of scrub, or a new round if none is in progress. A restarted server
    continues the job. Answers 409 if a scrub job is already queued or running."""
    scrub_request = request or ScrubRequest()
    jobs = caller.upkeep.store.jobs
    if active := await jobs.active(SCRUB_KIND):
        raise JobRunning(f"{active[0].actor} has started scrub already (job {active[0].id})")
    arguments = scrub_arguments(scrub_request.rate, keep_going=scrub_request.keep_going)
    return await queue_job(caller, SCRUB_KIND, arguments)


@router.get("/damaged", tags=["scrub"])
async def list_damaged(
    caller: AdminCaller,
    after: Annotated[str | None, Query(description="The field `next` of the previous page", max_length=200)] = None,
    limit: LimitQuery = 100,
) -> models.ListPage[DamagedBlobResponse]:
    """Lists the damaged blobs. To restore a blob, push an image that contains the blob."""
    page = await caller.upkeep.store.damage.damaged_blobs(after, limit)
    return models.list_page(page, DamagedBlobResponse.from_stored, lambda blob: blob.digest)


@router.get("/quarantine", tags=["scrub"])
async def list_quarantine(caller: AdminCaller) -> list[QuarantinedResponse]:
    """Lists the quarantine, which keeps the damaged bytes of blobs for inspection: at most 1,000 entries, oldest first.
    The setting `scrub.quarantine_max` limits its size."""
    return await read_quarantine(caller.upkeep.store)


@router.delete("/quarantine/{digest}", tags=["scrub"], status_code=204)
async def delete_from_quarantine(caller: AdminCaller, digest: DigestPath) -> None:
    """Deletes the quarantined bytes of a blob for good. A damaged blob stays damaged until it is stored again."""
    await delete_quarantined(caller.upkeep.store, digest)
