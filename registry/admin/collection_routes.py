"""The routes of `/api/v1` that start a garbage collection or a check of the store. The docstrings of the routes are the
descriptions in the OpenAPI document."""

from __future__ import annotations

from pydantic import Field

from registry.admin.body_model import BodyModel
from registry.admin.caller import AdminCaller
from registry.admin.job_models import JobResponse
from registry.admin.job_routes import queue_job
from registry.admin.management_router import management_router
from registry.upkeep.fsck import FSCK
from storage.upkeep.collection_job import GC

router = management_router()


class CollectionRequest(BodyModel):
    """The options of a garbage collection."""

    dry_run: bool = Field(default=False, description="Remove nothing, and list what a collection would remove")
    strays: bool = Field(
        default=False,
        description="Whether to look for stray files among all files of blobs, which takes long in a large store. A "
        "stray file is a blob's file without a record in the metadata. False: the collection looks among a part of the "
        "files, and the next collection among the next part",
    )


class CheckRequest(BodyModel):
    """The options of a check of the store."""

    repair: bool = Field(default=False, description="Repair what can be repaired without losing data")
    hash: bool = Field(default=False, description="Also compare all stored bytes with their digests")


@router.post("/gc", tags=["upkeep"], status_code=202)
async def collect_garbage(caller: AdminCaller, request: CollectionRequest) -> JobResponse:
    """Starts a garbage collection. The result of its job, at `/jobs/{job}`, has the number and the size of the removed
    items of each kind. The result of a dry run also has the first thousand items that a collection would remove, with
    the reasons."""
    arguments = {"dry_run": request.dry_run, "strays": request.strays}
    return await queue_job(caller, GC, arguments)


@router.post("/fsck", tags=["upkeep"], status_code=202)
async def check_store(caller: AdminCaller, request: CheckRequest) -> JobResponse:
    """Starts a check of the metadata and the stored files. The result of its job, at `/jobs/{job}`, has the number of
    problems of each kind, and the first thousand problems. The `code` of a problem is its kind."""
    arguments = {"repair": request.repair, "hash": request.hash}
    return await queue_job(caller, FSCK, arguments)
