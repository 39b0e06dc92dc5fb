"""The routes of `/api/v1/imports`, which start jobs that import content from other registries. The docstrings of the
routes are the descriptions in the OpenAPI document."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

from pydantic import Field

from registry.admin.body_model import BodyModel, FailFastList
from registry.admin.caller import AdminCaller
from registry.admin.job_models import JobResponse
from registry.admin.job_routes import queue_job
from registry.admin.management_router import management_router
from storage.imports import ImportInvalid

router = management_router()
Patterns = Annotated[
    FailFastList[Annotated[str, Field(max_length=255)]],
    Field(max_length=1000, description="Patterns of repository names", examples=[["team/**"]]),
]


class DirectoryImportBody(BodyModel):
    """What to import from the directory of a CNCF Distribution registry."""

    path: str = Field(
        max_length=4096,
        description="Directory of the registry to import: an absolute path on the machine of this registry",
        examples=["/var/lib/docker-registry"],
    )
    include: Patterns = Field(default=[])
    exclude: Patterns = Field(default=[])
    copy_files: bool = Field(
        default=False, alias="copy", description="Copy all files, instead of making hard links where possible"
    )
    overwrite: bool = Field(
        default=False,
        description="true: import a tag even if somebody has changed it in this registry since the last import, or if "
        "retention has deleted it. false: leave such a tag as it is",
    )


class RemoteImportBody(BodyModel):
    """What to import from another registry over the network."""

    url: str = Field(
        max_length=2048,
        description="URL of the registry to import. It must be an endpoint of an `[[upstream]]` in the settings. The "
        "import uses the login of this upstream",
        examples=["https://old.example.com"],
    )
    jobs: int = Field(default=4, ge=1, le=32, description="How many images are copied at a time")
    repositories: FailFastList[Annotated[str, Field(max_length=255)]] | None = Field(
        default=None, max_length=10_000, description="Repositories to import; null: all that the other registry lists"
    )
    include: Patterns = Field(default=[])
    exclude: Patterns = Field(default=[])
    overwrite: bool = Field(
        default=False,
        description="true: import a tag even if somebody has changed it in this registry since the last import, or if "
        "retention has deleted it. false: leave such a tag as it is",
    )


@router.post("/imports/directory", status_code=202, tags=["jobs"])
async def import_directory(caller: AdminCaller, body: DirectoryImportBody) -> JobResponse:
    """Starts a job that imports the directory of a CNCF Distribution registry (`registry:2`), like the command
    `entrepot import-registry`."""
    from registry.migration.directory_import import KIND
    from registry.migration.distribution_directory import DistributionDirectory
    from registry.migration.import_report import RepositoryFilter

    RepositoryFilter(body.include, body.exclude)  # raises ImportInvalid for an invalid pattern
    if not Path(body.path).is_absolute():
        raise ImportInvalid(f"{body.path} is not an absolute path")
    await asyncio.to_thread(DistributionDirectory.find, Path(body.path))  # raises ImportInvalid if no registry is there
    return await queue_job(caller, KIND, body.model_dump(by_alias=True))


@router.post("/imports/remote", status_code=202, tags=["jobs"])
async def import_remote(caller: AdminCaller, body: RemoteImportBody) -> JobResponse:
    """Starts a job that copies the content of another registry over the network, like `entrepot import URL`."""
    from registry.migration.import_report import RepositoryFilter
    from registry.migration.remote_import import KIND

    # Without this check, an admin of the registry could make the server connect to any machine in its network.
    if not any(body.url in upstream.endpoints for upstream in caller.upkeep.settings.upstream):
        raise ImportInvalid(
            f"{body.url} is not an endpoint of an [[upstream]] in the settings; add it there, or run the command "
            "`entrepot import` on the server's machine"
        )
    RepositoryFilter(body.include, body.exclude)  # raises ImportInvalid for an invalid pattern
    return await queue_job(caller, KIND, body.model_dump(by_alias=True))
