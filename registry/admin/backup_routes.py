"""The routes of `/api/v1/backups`, which list and make backups of the registry. The setting `[backup] target` names the
directory of the backups. The docstrings of the routes are the descriptions in the OpenAPI document.

No route may take the directory as a parameter: a client could make the server write secrets to any directory.
"""

from __future__ import annotations

import asyncio
from datetime import datetime
from pathlib import Path
from typing import Self

from pydantic import BaseModel, Field

from registry.admin import models
from registry.admin.body_model import BodyModel
from registry.admin.caller import AdminCaller, Caller
from registry.admin.job_models import JobResponse
from registry.admin.job_routes import queue_job
from registry.admin.management_router import management_router
from registry.upkeep.backup_work import backup_arguments
from storage.backups import BackupTargetUnknown
from storage.data_dir.system import System
from storage.upkeep.backup.backup_directory import BackupDirectory, SnapshotManifest, with_backup_errors

router = management_router()


class BackupResponse(BaseModel):
    """A complete backup: the registry as it was at one time."""

    name: str = Field(description="Name of the backup, for example for `entrepot restore --snapshot`")
    time: datetime
    manifests: int
    tags: int
    blobs: int
    size: int = Field(description="Total size in bytes of the blobs, including blobs that other backups share")
    missing: int = Field(description="Number of blobs that could not be copied, and are not in the backup")

    @classmethod
    def from_stored(cls, stored: SnapshotManifest) -> Self:
        """Returns the response for a backup whose `manifest.json` has the content `stored`."""
        return cls(
            name=stored.name,
            time=models.to_datetime(stored.time),
            manifests=stored.totals.manifests,
            tags=stored.totals.tags,
            blobs=stored.totals.blobs,
            size=stored.totals.size,
            missing=len(stored.missing),
        )


class NewBackup(BodyModel):
    """The options of a new backup."""

    verify: bool = Field(default=False, description="Read all blobs of the backup and check their digests")
    # The option `--new` of the command for backups has the same meaning: the job ignores the earlier backups.
    new: bool = Field(
        default=False,
        description="If the disk with the earlier backups is not mounted: true makes a backup at the same path, false "
        "makes the job fail",
    )


@router.get("/backups", tags=["backups"])
async def list_backups(caller: AdminCaller) -> models.ListPage[BackupResponse]:
    """Lists the complete backups in the directory that `[backup] target` names, newest first."""
    directory = BackupDirectory(_target(caller), System())
    backups = await asyncio.to_thread(with_backup_errors, f"cannot read {directory.root}", directory.snapshots)
    return models.ListPage(items=[BackupResponse.from_stored(backup) for backup in reversed(backups)], next=None)


@router.post("/backups", tags=["backups"], status_code=202)
async def make_backup(caller: AdminCaller, body: NewBackup) -> JobResponse:
    """Starts a job that makes a backup in the directory that `[backup] target` names. The registry serves requests
    while the job runs. `GET /jobs/{job}` shows the progress of the job."""
    keep = caller.upkeep.settings.backup.keep
    arguments = backup_arguments(_target(caller), keep, verify=body.verify, ignores_earlier_backups=body.new)
    return await queue_job(caller, "backup", arguments)


def _target(caller: Caller) -> Path:
    """Returns the directory of the backups. Raises BackupTargetUnknown if the settings name none."""
    target = caller.upkeep.settings.backup.target
    if target is None:
        raise BackupTargetUnknown
    return target
